from __future__ import annotations

from guestpass_latency import FastestGateway

from guestpass.model import Candidate, Session, SessionKind, Share
from guestpass.plugin import Choice, PluginConfig
from guestpass.testing import edge_with

SHARE = Share("s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None)
SESSION = Session("e1", "s1", "r1", "a@example.org", SessionKind.COOKIE, "email-code", 0.0, 0.0, None, "c")


def chooser(**settings: float) -> FastestGateway:
    config: PluginConfig = FastestGateway.Config(**settings)
    return FastestGateway("latency", config)


def chosen(plugin: FastestGateway, **gateways: tuple[float | None, int]) -> str:
    candidates = [Candidate("plant", n, rtt=rtt, streams=s) for n, (rtt, s) in gateways.items()]
    found = plugin.choose(Choice(SHARE, SESSION, candidates))
    assert found is not None
    return found.name


def test_the_fastest_serves() -> None:
    assert chosen(chooser(), near=(0.010, 50), far=(0.080, 0)) == "near"


def test_of_nearly_equal_ones_the_least_busy_serves() -> None:
    assert chosen(chooser(), a=(0.010, 5), b=(0.011, 2)) == "b"
    assert chosen(chooser(close=0.0), a=(0.010, 5), b=(0.011, 2)) == "a"


def test_what_was_never_measured_is_tried() -> None:
    assert chosen(chooser(), known=(0.010, 0), new=(None, 0)) == "new"


def test_one_slow_answer_is_no_reason_to_move() -> None:
    plugin = chooser()
    for _ in range(10):
        chosen(plugin, a=(0.010, 0), b=(0.020, 0))
    assert chosen(plugin, a=(0.025, 0), b=(0.020, 0)) == "a"
    for _ in range(10):
        chosen(plugin, a=(0.100, 0), b=(0.020, 0))
    assert chosen(plugin, a=(0.100, 0), b=(0.020, 0)) == "b"


async def test_in_an_edge() -> None:
    async with edge_with(FastestGateway, gateways=2) as edge:
        for _ in range(4):
            assert (await (await edge.admitted()).get("/")).status == 200
        assert edge.faults() == {}
