from guestpass.testing import edge_with, use

from near_gateways import NearGateways

GATEWAYS = ({"zone": "north"}, {"zone": "south"})


async def test_the_zone_is_preferred() -> None:
    async with edge_with(use(NearGateways, zone="south"), gateways=GATEWAYS) as edge:
        for _ in range(5):
            visitor = await edge.admitted("alice@example.org")
            assert (await visitor.get("/")).request["gateway"] == "gw-2"


async def test_without_one_in_the_zone_others_serve() -> None:
    async with edge_with(use(NearGateways, zone="west"), gateways=GATEWAYS) as edge:
        visitor = await edge.admitted("alice@example.org")
        assert (await visitor.get("/")).status == 200
