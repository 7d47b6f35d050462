"""The choosers on their own, in the simulation that docs/plots shows, and with what a real edge tells them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random as Generator
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from support import choosers
from support.people import plugin
from support.scoreboard import row
from support.served import serving
from support.stack import SERVICE, SITE, running

from guestpass.model import Candidate, Session, SessionKind
from guestpass.plugin import BackendChooser, Choice
from guestpass_plugins.choose.consistent_hash import ConsistentHash
from guestpass_plugins.choose.failover import Failover
from guestpass_plugins.choose.least_loaded import LeastLoaded
from guestpass_plugins.choose.weighted import Weighted

SESSION = Session("e1", "s1", "r1", "a@example.org", SessionKind.COOKIE, "p", 0.0, 0.0, None, "c")


def gateway(name: str, **more: Any) -> Candidate:
    return Candidate(SITE, name, **more)


def choice(*candidates: Candidate, **session: Any) -> Choice:
    return Choice(choosers.SHARE, replace(SESSION, **session), candidates)


def chosen(chooser: Any, question: Choice) -> str:
    return str(chooser.choose(question).name)


def counted(chooser: Any, *candidates: Candidate, times: int = 4000) -> Counter[str]:
    chooser.generator = Generator(7)
    return Counter(chosen(chooser, choice(*candidates)) for _ in range(times))


# ── one decision ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("one", "other", "winner"),
    [
        ({"streams": 3}, {"streams": 2}, "b"),
        ({"streams": 3, "weight": 2}, {"streams": 2, "weight": 1}, "a"),
        ({"streams": 0, "rtt": 0.2}, {"streams": 0, "rtt": 0.01}, "b"),  # nothing to do: the nearer one
        ({"streams": 10, "rtt": 0.01}, {"streams": 1, "rtt": 0.2}, "b"),  # distance does not outweigh load
        ({"streams": 1, "rtt": None}, {"streams": 1, "rtt": 0.05}, "a"),
        ({"streams": 0, "weight": 0}, {"streams": 500, "weight": 1}, "b"),  # being emptied
    ],
)
def test_least_loaded_of_two(one: dict[str, Any], other: dict[str, Any], winner: str) -> None:
    chooser = plugin(LeastLoaded, "least-loaded")
    for pair in ((gateway("a", **one), gateway("b", **other)), (gateway("b", **other), gateway("a", **one))):
        assert counted(chooser, *pair, times=20) == {winner: 20}


def test_least_loaded_has_no_favourite_among_equals_and_never_the_worst() -> None:
    chooser = plugin(LeastLoaded, "least-loaded")
    equal = counted(chooser, *(gateway(n, streams=5) for n in "abcd"))
    assert min(equal.values()) > 800
    assert "z" not in counted(chooser, *(gateway(n) for n in "abc"), gateway("z", streams=1))


def test_weighted_is_in_proportion() -> None:
    chooser = plugin(Weighted, "weighted")
    found = counted(chooser, gateway("a", weight=1), gateway("b", weight=3), gateway("c", weight=0))
    assert set(found) == {"a", "b"}
    assert 2.6 < found["b"] / found["a"] < 3.4
    assert set(counted(chooser, gateway("c", weight=0), gateway("d", weight=0))) == {"c", "d"}


@pytest.mark.parametrize("key", ["recipient", "share", "session"])
def test_consistent_hash_looks_at_its_key_only(key: str) -> None:
    chooser = plugin(ConsistentHash, "consistent-hash", key=key)
    gateways = [gateway(f"g{n}") for n in range(5)]
    reached = {
        "recipient": {chosen(chooser, choice(*gateways, email=f"p{n}@example.org")) for n in range(100)},
        "session": {chosen(chooser, choice(*gateways, id=f"e{n}")) for n in range(100)},
    }
    for name, found in reached.items():
        assert len(found) == (5 if name == key else 1)
    busy = [gateway(c.name, streams=99, rtt=1.0, labels={"x": "y"}) for c in reversed(gateways)]
    assert chosen(chooser, choice(*gateways)) == chosen(chooser, choice(*busy))


def test_consistent_hash_is_the_same_everywhere() -> None:
    """Other processes, other versions: where a person's data is must not change with an update."""
    chooser = plugin(ConsistentHash, "consistent-hash")
    gateways = [gateway(f"g{n}") for n in range(5)]
    found = [chosen(chooser, choice(*gateways, email=f"p{n}@example.org")) for n in range(8)]
    assert found == STABLE


STABLE = ["g1", "g2", "g2", "g0", "g3", "g3", "g3", "g2"]


def test_consistent_hash_by_weight() -> None:
    chooser = plugin(ConsistentHash, "consistent-hash", weights=True)

    def placed(**weights: int) -> dict[str, str]:
        gateways = [gateway(name, weight=weight) for name, weight in weights.items()]
        people = [f"p{n}@example.org" for n in range(4000)]
        return {who: chosen(chooser, choice(*gateways, email=who)) for who in people}

    before = placed(a=1, b=3, c=0)
    count = Counter(before.values())
    assert count["c"] == 0
    assert 2.6 < count["b"] / count["a"] < 3.4
    after = placed(a=1, b=4, c=0)
    assert {after[who] for who in before if before[who] != after[who]} == {"b"}


@pytest.mark.parametrize(
    ("labels", "reached"),
    [
        ({"a": "1", "b": "2"}, {"a"}),
        ({"a": "10", "b": "9"}, {"b"}),  # numbers, not text
        ({"a": "-1", "b": "0"}, {"a"}),
        ({"a": "1", "b": "1", "c": "2"}, {"a", "b"}),
        ({"a": None, "b": "7"}, {"b"}),
        ({"a": "first", "b": "7"}, {"b"}),
        ({"a": None, "b": "first"}, {"a", "b"}),
    ],
)
def test_failover_ranks(labels: Mapping[str, str | None], reached: set[str]) -> None:
    chooser = plugin(Failover, "failover")
    chooser._told, chooser.host = set(), SimpleNamespace(logger=logging.getLogger("test"))  # type: ignore[attr-defined]
    gateways = [
        gateway(name, labels={} if rank is None else {"priority": rank}) for name, rank in labels.items()
    ]
    assert set(counted(chooser, *gateways, times=200)) == reached


def test_failover_says_once_that_a_label_is_no_rank(caplog: pytest.LogCaptureFixture) -> None:
    chooser = plugin(Failover, "failover", label="tier")
    chooser._told, chooser.host = set(), SimpleNamespace(logger=logging.getLogger("test"))  # type: ignore[attr-defined]
    for _ in range(3):
        chosen(chooser, choice(gateway("a", labels={"tier": "one"}), gateway("b")))
    (record,) = caplog.records
    assert "plant/a" in record.getMessage()
    assert "tier" in record.getMessage()


# ── the simulation ───────────────────────────────────────────────────────────────────────────────────────────────────


def steady(run: choosers.Run) -> float:
    values = run.balance[: choosers.LEAVES]
    return sum(values) / len(values)


def test_simulation() -> None:
    runs = {name: choosers.simulate(name) for name in choosers.CHOOSERS}
    away = slice(choosers.LEAVES, choosers.RETURNS)
    for run in runs.values():
        # A session stays where it is while it can, whoever chose.
        assert run.moved == run.of
        row(
            f"chooser {run.name}",
            "8 gateways, 4000 sessions; one gateway leaves and returns (simulated)",
            f"busiest/mean {steady(run):.3f}; meets the same gateway again "
            f"{sum(run.again[: choosers.LEAVES]) / choosers.LEAVES:.0%}, "
            f"{run.again[choosers.LEAVES]:.0%} after it left",
            "busiest/mean ≤ 1.15",
            ok=steady(run) <= 1.15,
        )
    assert max(runs["least-loaded"].balance[: choosers.LEAVES]) < 1.03
    assert max(runs["least-loaded"].balance[away]) < 1.03
    # The gateway that came back empty is filled soon, and not drowned in between.
    assert max(runs["least-loaded"].balance[choosers.RETURNS + 10 :]) < 1.03
    assert steady(runs["least-loaded"]) < steady(runs["random"])
    # Everybody meets their gateway again, but for those whose gateway is away, an eighth; and once when it is back.
    assert set(runs["consistent-hash"].again[: choosers.LEAVES]) == {1.0}
    assert runs["consistent-hash"].again[choosers.LEAVES] > 0.80
    assert runs["consistent-hash"].again[choosers.RETURNS - 1] > 0.97
    assert max(runs["random"].again) < 0.25


def test_consistent_hash_moves_only_what_it_must() -> None:
    chooser = plugin(ConsistentHash, "consistent-hash")
    assert isinstance(chooser, BackendChooser)
    gateways = choosers.gateways()
    people = [f"p{n}@example.org" for n in range(choosers.PEOPLE)]

    def placed(among: list[Candidate]) -> dict[str, str]:
        return {who: chosen(chooser, choice(*among, email=who)) for who in people}

    before = placed(gateways)
    after = placed([g for g in gateways if g.name != choosers.LEAVER])
    moved = {who for who in people if before[who] != after[who]}
    assert moved == {who for who in people if before[who] == choosers.LEAVER}
    # They spread over all that are left, and not to one neighbour.
    spread = Counter(after[who] for who in moved)
    assert len(spread) == choosers.GATEWAYS - 1
    assert max(spread.values()) < 2 * len(moved) / len(spread)
    assert placed(gateways) == before  # it came back
    joined = placed([*gateways, gateway("new")])
    gained = {who for who in people if joined[who] != before[who]}
    assert {joined[who] for who in gained} == {"new"}
    assert 0.5 < len(gained) / (len(people) / (choosers.GATEWAYS + 1)) < 1.5


# ── what a real edge tells them ──────────────────────────────────────────────────────────────────────────────────────


async def test_candidates_carry_what_the_gateways_are(tmp_path: Path) -> None:
    """Load, round trip, weight and labels come from the tunnels; a session goes where `failover` says, and to the next
    rank when that gateway is gone."""
    going = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        await going.wait()
        return response

    app = web.Application()
    app.router.add_get("/slow", slow)
    async with (
        serving(app) as url,
        running(tmp_path, url, gateways=0, config={"choose": [{"use": "failover"}]}) as stack,
    ):
        for name, priority, weight in (("gw-1", "2", 1), ("gw-2", "1", 5)):
            await stack.add_gateway(name, gateway={"labels": {"priority": priority}, "weight": weight})
        tunnels = stack.edge.tunnels

        def candidate(name: str) -> Candidate:
            return next(c for c in tunnels.candidates(SITE, SERVICE) if c.name == name)

        await stack.until(lambda: all(c.rtt for c in tunnels.candidates(SITE, SERVICE)), "round trips")
        assert candidate("gw-1").labels == {"priority": "2"}
        assert candidate("gw-2").weight == 5
        assert 0 < (candidate("gw-2").rtt or 0) < 5
        async with asyncio.timeout(30):
            responses = [
                await stack.session.get(
                    stack.url("/slow"), headers={"Host": stack.host, **stack.authorization}
                )
                for _ in range(3)
            ]
            for response in responses:
                await response.content.readexactly(5)
        assert (candidate("gw-1").streams, candidate("gw-2").streams) == (0, 3)
        going.set()
        for response in responses:
            await response.read()
        await stack.until(lambda: candidate("gw-2").streams == 0, "the streams ended")
        await stack.stop_gateway("gw-2")
        await stack.until(lambda: not tunnels.is_connected(SITE, "gw-2"), "gw-2 is gone")
        assert (await stack.get("/slow", headers=stack.authorization)).status == 200
