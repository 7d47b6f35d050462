"""Path limits, as real servers see what they let through: at the edge (a share's scope), and again at the gateway.

A rule is matched on the bytes that are forwarded. So a path that somebody could decode, normalise or cut differently is
refused wherever there is a rule, and without one it is nobody's business. Each row is tried on a share with the rule,
on one where only the gateway has it, and, where all is open, on one without any.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

import pytest
import uvloop
from conformance.http.origins import START
from conformance.http.world import LANES, SCHEMES, SCOPE, Lane, World, cut
from support.scoreboard import LONG, row

NUMBERS = itertools.count()
# Of SCOPE and of the gateway's own rules: see world.py.
assert SCOPE == ("GET /limited/**", "POST /limited/*/comments")


@dataclass(frozen=True, slots=True)
class Rule:
    method: str
    target: str
    edge: bool
    """Whether the share's scope admits it."""
    gateway: bool
    """Whether the gateway's rules do."""


def open_(method: str, target: str) -> Rule:
    return Rule(method, target, edge=True, gateway=True)


def shut(method: str, target: str) -> Rule:
    return Rule(method, target, edge=False, gateway=False)


AMBIGUOUS = (
    ("/limited/../secret", "/limited/%2e%2e/secret", "/limited/%2E%2e/secret", "/limited/.%2e/secret", "/limited/..")
    + ("/limited/./x", "/limited/%2e/x", "/./limited/x", "/limited/x/.", "/limited//x", "//limited/x", "/limited/x//")
    + ("/limited/..%2fsecret", "/limited/%2f..%2fsecret", "/limited%2fx", "/limited/x%2F", "/limited/..\\secret")
    + ("/limited/..%5csecret", "/limited/%5C", "/limited\\x", "/limited/..;/secret", "/limited/x;y", "/limited;/x")
    + ("/limited/%252e%252e/secret", "/limited/%25", "/limited/x%00", "/limited/x%00/../../secret")
    + ("/limited/%c0%ae%c0%ae/secret", "/limited/%c0%af", "/limited/%C1%9C", "/limited/%e0%80%ae")
    + ("/limited/%f0%80%80%ae",)
    + ("/limited/%u002e%u002e/secret", "/limited/%", "/limited/%2", "/limited/%zz", "/limited/x%0")
)  # fmt: skip

RULES = (
    open_("GET", "/limited/"),
    open_("GET", "/limited"),
    open_("GET", "/limited/a/b/c?d=/../../x"),
    open_("GET", "/limited/%41%20%E2%82%AC"),
    open_("GET", "/limited/.hidden/..."),
    open_("GET", "/limited/x?y=%2e%2e%2f;//"),
    open_("HEAD", "/limited/x"),
    open_("POST", "/limited/7/comments"),
    Rule("POST", "/limited/7", edge=False, gateway=True),
    Rule("POST", "/limited/7/8/comments", edge=False, gateway=True),
    Rule("POST", "/limited/7/comments/", edge=False, gateway=True),
    shut("PUT", "/limited/7/comments"),
    shut("DELETE", "/limited/x"),
    shut("PROPFIND", "/limited/x"),
    shut("OPTIONS", "/limited/x"),
    shut("GET", "/"),
    shut("GET", "/secret"),
    shut("GET", "/limitedx"),
    shut("GET", "/LIMITED/x"),
    shut("GET", "/%6cimited/x"),
    shut("GET", "/limite%64/x"),
    shut("GET", "/x/limited/x"),
    shut("GET", "/secret?/limited/x"),
    shut("OPTIONS", "*"),
    *(shut("GET", target) for target in AMBIGUOUS),
)
# Names that make some frameworks see another path or method than the one that was matched.
OVERRIDES = (
    "X-Original-URL: /secret",
    "X-Rewrite-URL: /secret",
    "X_Original_URL: /secret",
    "X-HTTP-Method-Override: DELETE",
    "X-HTTP-Method: DELETE",
    "X-Method-Override: DELETE",
    "X-Envoy-Original-Path: /secret",
    "X-Forwarded-Prefix: /secret",
)


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, world: World) -> Lane:
    return world.lanes[request.param]


async def ask(
    world: World, lane: Lane, scheme: str, origin: str, kind: str, rule: Rule, *lines: str
) -> tuple[int, bool, str]:
    """Status, whether the origin read it, and what is wrong besides ("" if nothing)."""
    number = next(NUMBERS)
    target = rule.target + (
        "" if rule.target == "*" else ("&" if "?" in rule.target else "?") + f"n={number}"
    )
    before = world.mark(origin)
    data = lane.head(f"{origin}{kind}", rule.method, target, *lines, "Connection: close")
    received, _ = await lane.send(scheme, [data])
    (answer,) = cut(received, [rule.method])
    read = [entry for entry in world.seen(origin, before) if entry["target"] == target]
    problem = ""
    if answer.seen is None:
        if rule.method != "HEAD" and answer.error_id is None:
            problem = f"neither answer nor refusal: {received[:200]!r}"
    elif [entry["method"] for entry in read] != [rule.method]:
        problem = f"the origin read {read}"
    return answer.status, bool(read), problem


@pytest.mark.parametrize("kind", ["-limited", "-guarded"])
def test_limits(world: World, lane: Lane, kind: str) -> None:
    wrong: list[str] = []

    async def one(index: int, rule: Rule, origin: str) -> None:
        scheme = SCHEMES[index % 2]
        admitted = rule.edge if kind == "-limited" else rule.gateway
        status, read, problem = await ask(world, lane, scheme, origin, kind, rule)
        if (status, read) != ((200, True) if admitted else (403, False)) or problem:
            wrong.append(f"{origin} {scheme} {rule.method} {rule.target}: {status}, read: {read} {problem}")

    async def all_of_them() -> None:
        for index, rule in enumerate(RULES):
            chosen = START if LONG else list(START)[index % len(START) :][:1]
            await asyncio.gather(*(one(index, rule, origin) for origin in chosen))

    uvloop.run(all_of_them())
    row(
        f"path limits of a {'share' if kind == '-limited' else 'gateway'}, {lane.name} lane",
        f"{len(RULES)} rows, plain and TLS, {', '.join(START)}",
        f"{len(wrong)} wrong {wrong[:5] if wrong else ''}".strip(),
        "0",
        ok=not wrong,
    )


def test_without_a_limit_a_path_is_nobodys_business(world: World, lane: Lane) -> None:
    """Applications have such paths; they are passed on as they are. (Apache refuses some by itself.)"""

    async def one(target: str, origin: str) -> tuple[str, str, int, bool, str]:
        found = await ask(world, lane, "plain", origin, "", Rule("GET", target, edge=True, gateway=True))
        return (target, origin, *found)

    async def all_of_them() -> list[tuple[str, str, int, bool, str]]:
        return [await one(target, "node") for target in AMBIGUOUS]

    for target, origin, status, read, problem in uvloop.run(all_of_them()):
        assert (status, read, problem) == (200, True, ""), (target, origin)


@pytest.mark.parametrize("line", OVERRIDES)
def test_nothing_else_says_what_is_asked_for(world: World, lane: Lane, line: str) -> None:
    async def one(origin: str) -> None:
        data = lane.head(f"{origin}-limited", "GET", "/limited/x", line, "Connection: close")
        received, _ = await lane.send("plain", [data])
        (answer,) = cut(received, ["GET"])
        assert answer.status == 200
        assert not [value for _, value in answer.received if value in ("/secret", "DELETE")], origin

    async def all_of_them() -> None:
        await asyncio.gather(*(one(origin) for origin in START))

    uvloop.run(all_of_them())
