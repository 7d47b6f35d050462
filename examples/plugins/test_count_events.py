from guestpass.testing import edge_with

from count_events import CountEvents


async def test_events_are_counted() -> None:
    async with edge_with(CountEvents) as edge:
        await edge.new_share("bob@example.org")
        counts = edge.plugin(CountEvents).counts
        # One share is there from the beginning, for alice.
        await edge.until(lambda: counts["share.created"] == 2, "the share is counted")
        assert edge.faults() == {}
