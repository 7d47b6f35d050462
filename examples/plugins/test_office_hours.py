from datetime import UTC, datetime

from guestpass.testing import edge_with, use

from office_hours import OfficeHours


async def test_office_hours() -> None:
    async with edge_with(use(OfficeHours, opens="08:00", closes="18:00")) as edge:
        visitor = await edge.admitted("alice@example.org")
        edge.clock.set(datetime(2026, 1, 5, 12, 0, tzinfo=UTC))
        assert (await visitor.get("/")).request["headers"]["x-office-closes"] == "18:00"
        edge.clock.set(datetime(2026, 1, 5, 23, 0, tzinfo=UTC))
        assert (await visitor.get("/")).status == 403
