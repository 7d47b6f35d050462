from guestpass.testing import edge_with, use

from half_day import HalfDay


async def test_a_session_ends_in_time() -> None:
    async with edge_with(use(HalfDay, hours=2)) as edge:
        visitor = await edge.admitted("alice@example.org")
        assert (await visitor.get("/")).status == 200
        edge.clock.advance(3600)
        assert (await visitor.get("/")).status == 200
        edge.clock.advance(3600)
        await edge.until(lambda: not edge.plugin(HalfDay).ends, "the watch has told")
        assert (await visitor.get("/")).status == 403
