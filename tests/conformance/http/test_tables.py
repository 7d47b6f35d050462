"""The tables of tables.py, one row one test: on both lanes, for plain visitors and over TLS, in front of all origins
(the short form takes two of these for each row, in turn).

Behind each row comes a request that must get its own answer and nothing else: on the visitor's connection where that
goes on, on another one where it does not; the application's connections are pooled, so it meets what the row left.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import uvloop
from conformance.http.origins import RAW, START
from conformance.http.tables import ANSWERS, ATTACKS, DUTIES, Answered, Attack, Duty
from conformance.http.world import LANES, SCHEMES, Answer, Lane, World, cut
from support.scoreboard import LONG, row

NUMBERS = itertools.count()
# Of the ways to try a row, in the short form.
SAMPLE = 2
# Rows that were tried and rows that passed, on which lane.
TRIED: dict[str, set[tuple[str, str]]] = {"attacks": set(), "duties": set(), "answers": set()}
DONE: dict[str, set[tuple[str, str]]] = {"attacks": set(), "duties": set(), "answers": set()}


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, world: World) -> Lane:
    return world.lanes[request.param]


@pytest.fixture(scope="module", autouse=True)
def board(world: World) -> Iterator[None]:
    yield
    for kind, table, name, figure in (
        ("attacks", ATTACKS, "requests that an edge refuses", None),
        ("duties", DUTIES, "proxy duties of RFC 9110, 9112", 3),
        ("answers", ANSWERS, "what applications cannot do", None),
    ):
        tried = {it for it, _ in TRIED[kind]}
        failed = {it for it, _ in TRIED[kind] - DONE[kind]}
        if tried:  # some of the tests may have been selected
            row(
                name,
                f"{len(tried)} of {len(table)} rows, both lanes, plain and TLS",
                f"{len(tried - failed)} pass",
                "all",
                ok=not failed,
                figure=figure,
            )


def cells(index: int, lane: Lane, origins: Sequence[str]) -> list[tuple[str, str]]:
    """(scheme, origin) to try a row with: all of them; in the short form two, others for the next row and lane."""
    found = [(scheme, origin) for origin in origins for scheme in SCHEMES]
    if LONG or len(found) <= SAMPLE:
        return found
    first = index * SAMPLE + LANES.index(lane.name)
    return [found[(first + step * 3) % len(found)] for step in range(SAMPLE)]


async def next_one(lane: Lane, scheme: str, origin: str) -> None:
    """A request on a connection of its own gets its own answer."""
    target = f"/next/{next(NUMBERS)}"
    received, closed = await lane.send(scheme, [lane.head(origin, "GET", target, "Connection: close")])
    (answer,) = cut(received, ["GET"])
    assert closed
    assert answer.seen, answer
    assert answer.seen["target"] == target


@contextmanager
def counted(kind: str, name: str, lane: Lane) -> Iterator[None]:
    """A row passes when nothing is raised, on any lane."""
    TRIED[kind].add((name, lane.name))
    yield
    DONE[kind].add((name, lane.name))


# ── refused ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda it: it.name)
def test_refused(world: World, lane: Lane, attack: Attack) -> None:
    async def one(scheme: str, origin: str) -> None:
        target, smuggled = f"/attack/{next(NUMBERS)}", f"/smuggled/{next(NUMBERS)}"
        data = attack.data
        for name, value in (
            ("{host}", lane.host(origin)),
            ("{token}", lane.token(origin)),
            ("{target}", target),
            ("/smuggled", smuggled),
        ):
            data = data.replace(name.encode(), value.encode())
        before = world.mark(origin)
        behind = lane.head(origin, "GET", smuggled, "Connection: close")
        received, closed = await lane.send(scheme, [data + behind])
        answers = cut(received, ["GET"])
        assert [answer.status for answer in answers] == [attack.status], (scheme, origin, received)
        assert answers[0].error_id
        assert answers[0].all("Connection") == ["close"]
        assert closed
        read = {entry["target"] for entry in world.seen(origin, before)}
        assert not read & {target, smuggled}, read
        await next_one(lane, scheme, origin)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(scheme, origin) for scheme, origin in chosen))

    chosen = cells(ATTACKS.index(attack), lane, list(START))
    with counted("attacks", attack.name, lane):
        refused = lane.metric("guestpass_refused_total", status=str(attack.status))
        uvloop.run(all_of_them())
        count = lane.metric("guestpass_refused_total", status=str(attack.status)) - refused
        assert count == len(chosen), "each refusal is counted"


# ── done ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def values(answer: Answer, name: str) -> tuple[str, ...]:
    """All values of a field that the origin received, as fields or as a CGI variable (None of the latter is empty)."""
    variable = "HTTP_" + re.sub(r"[^A-Z0-9]", "_", name.upper())
    found = [value for key, value in answer.received if key.lower() == name.lower() or key == variable]
    return tuple(found)


def filled(text: str, lane: Lane, scheme: str, world: World, origin: str) -> str:
    url = world.origins[origin].url
    host = lane.host(origin)
    public = ("https" if scheme == "tls" else "http") + "://" + host
    for name, value in {"{host}": host, "{url}": url, "{app}": url[7:], "{origin}": public}.items():
        text = text.replace(name, value)
    return text


@pytest.mark.parametrize("duty", DUTIES, ids=lambda it: it.name)
def test_done(world: World, lane: Lane, duty: Duty) -> None:
    async def one(scheme: str, origin: str) -> None:
        def fill(text: str) -> str:
            return filled(text, lane, scheme, world, origin)

        lines = [fill(line) for line in duty.lines]
        data = lane.head(origin, duty.method, duty.target, *lines, version=duty.version) + duty.body
        marker = f"/marker/{next(NUMBERS)}"
        data += lane.head(origin, "GET", marker, "Connection: close")
        received, closed = await lane.send(scheme, [data])
        where = (lane.name, scheme, origin, received)
        method = duty.method.strip()
        answers = cut(received, [method, "GET"])
        assert closed, where
        interim = tuple(answer.status for answer in answers if answer.interim and answer.status != 100)
        assert interim == duty.interim, where
        answer, *more = [answer for answer in answers if not answer.interim]
        assert answer.status == duty.status, where
        assert answer.whole, where
        assert len(answer.all("Date")) == 1, where  # RFC 9110, 6.6.1
        for name, expected in duty.answer.items():
            assert tuple(answer.all(name)) == expected, (name, where)
        if duty.content is not None:
            assert answer.body == duty.content, where
        if answer.seen is not None:
            digest = hashlib.sha256(duty.read).hexdigest()
            assert (answer.seen["method"], answer.seen["target"]) == (method, duty.target), where
            assert (answer.seen["length"], answer.seen["sha256"]) == (len(duty.read), digest), where
        for name, expected in duty.received.items():
            found = values(answer, name)
            wanted = tuple(fill(value) for value in expected)
            # Programs behind nginx and Apache are told a repeated field as one, or (nginx) each in turn.
            assert ", ".join(found) == ", ".join(wanted) if found else not wanted, (name, found, where)
        if duty.keeps:
            assert len(more) == 1, where
            assert more[0].seen, where
            assert more[0].seen["target"] == marker, where
        else:
            assert not more, where
            await next_one(lane, scheme, origin)

    async def all_of_them() -> None:
        chosen = cells(DUTIES.index(duty), lane, duty.origins)
        await asyncio.gather(*(one(scheme, origin) for scheme, origin in chosen))

    with counted("duties", duty.name, lane):
        uvloop.run(all_of_them())


# ── what an application cannot do ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("answered", ANSWERS, ids=lambda it: it.name)
def test_answers(world: World, lane: Lane, answered: Answered) -> None:
    async def one(scheme: str) -> None:
        def fill(text: str) -> str:
            return filled(text, lane, scheme, world, RAW)

        encoded = base64.urlsafe_b64encode(fill(answered.data).encode("latin-1")).decode()
        target = f"/{answered.kind}/{encoded}"
        marker = f"/marker/{next(NUMBERS)}"
        if answered.kind == "unasked":  # with a request under way, anything is an answer to it
            data = lane.head(RAW, answered.method, target, "Connection: close")
        else:
            data = lane.head(RAW, answered.method, target)
            data += lane.head(RAW, "GET", marker, "Connection: close")
        received, closed = await lane.send(scheme, [data])
        where = (lane.name, scheme, received)
        assert closed, where
        assert b"X-Seen: evil" not in received, where
        answers = [it for it in cut(received, [answered.method, "GET"]) if not it.interim]
        if answered.status is None:
            # The head may have gone out already, and then the connection is cut; or there was still time to say so.
            assert all(not it.whole or it.status == 502 for it in answers[:1]), where
            more = answers[1:]
        else:
            answer, *more = answers
            assert answer.status == answered.status, where
            assert answer.whole, where
            assert len(answer.all("Date")) == 1, (
                where
            )  # also where the application sends none (RFC 9110, 6.6.1)
            for name, expected in answered.fields.items():
                assert tuple(answer.all(name)) == tuple(map(fill, expected)), (name, where)
            if answered.body is not None:
                assert answer.body == answered.body, where
            if answered.status == 502:
                assert answer.error_id, where
                assert answer.error_id in lane.log
        if more:
            assert [it.seen["target"] for it in more if it.seen] == [marker], where
        if answered.kind == "unasked":
            await asyncio.sleep(0.1)  # what nobody asked for is on its way
        await asyncio.gather(*(next_one(lane, scheme, RAW) for _ in range(8)))

    async def all_of_them() -> None:
        for scheme, _ in cells(ANSWERS.index(answered), lane, (RAW,)):
            await one(scheme)

    with counted("answers", answered.name, lane):
        uvloop.run(all_of_them())


def test_there_is_no_empty_table() -> None:
    names: Mapping[str, list[str]] = {
        "attacks": [it.name for it in ATTACKS],
        "duties": [it.name for it in DUTIES],
        "answers": [it.name for it in ANSWERS],
    }
    for kind, found in names.items():
        assert len(found) > 40, kind
        assert len(set(found)) == len(found), f"two rows of {kind} have one name"
