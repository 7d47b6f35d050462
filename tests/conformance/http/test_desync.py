"""No generated vector desynchronises: of each, the edge answers what it forwards and nothing else is read by anybody.

A vector and a marker request go out together. Then all of this must hold:

* what comes back is answers, cut without a byte left over; each is the origin's (it says what it read) or a refusal of
  the edge's own, after which the connection is closed and nothing follows;
* the origin's answers come in the order of the requests, each once, and the marker's is to the marker;
* the origin has read to its end exactly what the edge answered for it: no request that nobody sent, none twice;
* a vector that must be forwarded was read with its method and its body; one that must be refused was not forwarded.

As all origins' connections are pooled and used again, a request that an origin reads differently from the gateway
would show as an answer to a later one. At the end each pooled connection is used once more.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from conformance.http.origins import START
from conformance.http.vectors import FRAMING, Vector, Verdict, vectors
from conformance.http.world import LANES, Lane, World, cut
from support.scoreboard import LONG, row

SEED = 5
COUNT = 60 * len(FRAMING) if LONG else 500
AT_ONCE = 8
# What is not complete is waited for so long.
PATIENCE = 0.5
EMPTY = hashlib.sha256().hexdigest()
# More than there were at once, so more than are pooled.
SWEEP = 40


@dataclass
class Tally:
    vectors: int = 0
    forwarded: int = 0
    refused: int = 0
    again: int = 0
    """Requests on a pooled connection that a vector had been on."""
    desyncs: list[str] = field(default_factory=list)


def scheme_of(number: int) -> str:
    return ("plain", "tls")[number // 2 % 2]


async def run(lane: Lane, origin: str, chosen: list[Vector], tally: Tally) -> dict[str, Counter[str]]:
    """Send them all; by vector's number what was answered by the origin, as targets."""
    answered: dict[str, Counter[str]] = {}
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(vector: Vector) -> None:
        async with gate:
            problem, targets = await send(lane, origin, vector, tally)
        answered[str(vector.number)] = Counter(targets)
        if problem:
            tally.desyncs.append(
                f"{lane.name}/{origin} {scheme_of(vector.number)} {vector.number} ({vector.name}): {problem}"
            )

    await asyncio.gather(*(one(vector) for vector in chosen))
    return answered


async def send(lane: Lane, origin: str, vector: Vector, tally: Tally) -> tuple[str, list[str]]:
    """One vector and its marker: what was wrong ("" if nothing), and the targets that the origin answered."""
    marker = lane.head(origin, "GET", f"/marker/{vector.number}", "Connection: close")
    pieces = (*vector.pieces[:-1], vector.pieces[-1] + marker)
    received, closed = await lane.send(
        scheme_of(vector.number), pieces, seconds=PATIENCE if vector.verdict is Verdict.WAIT else 20
    )
    # A refusal has no body where the method could be read at all.
    named = b"".join(vector.pieces).removeprefix(b"\r\n").startswith(f"{vector.method} ".encode())
    answers = [answer for answer in cut(received, [vector.method] if named else []) if not answer.interim]
    targets = [answer.seen["target"] for answer in answers if answer.seen]
    tally.vectors += 1
    if not all(answer.whole for answer in answers):
        return "an answer breaks off", targets
    if any(answer.seen is None and answer.error_id is None for answer in answers[1:]) or (
        answers and answers[0].seen is None and answers[0].error_id is None and vector.method != "HEAD"
    ):
        return f"an answer of neither: {received[:300]!r}", targets
    refusals = [at for at, answer in enumerate(answers) if answer.seen is None]
    if refusals and refusals != [len(answers) - 1]:
        return "something follows a refusal", targets
    if vector.verdict is Verdict.WAIT:
        return ("" if not answers and not closed else f"{answers} for half a request"), targets
    if not closed:
        return "the connection stays open", targets
    if not answers:
        return "no answer", targets
    own, smuggled, marked = vector.target, f"/smuggled/{vector.number}", f"/marker/{vector.number}"
    allowed = [own, marked]
    if vector.verdict is Verdict.EITHER and smuggled in targets:
        allowed = [own, smuggled, marked]
    if targets != allowed[: len(targets)]:
        return f"the origin answered {targets}", targets
    if targets[:1] == [own]:
        tally.forwarded += 1
        seen: dict[str, Any] = answers[0].seen or {}
        if vector.verdict is Verdict.REFUSE:
            return "it was forwarded", targets
        if seen["method"] != vector.method or seen["sha256"] != vector.sha256:
            return f"the origin read {seen}", targets
        if vector.keep_alive and len(targets) < 2 and not refusals:
            return "the marker was not answered", targets
    else:
        tally.refused += 1
        if vector.verdict is Verdict.FORWARD:
            return f"it was refused: {received[:200]!r}", targets
    return "", targets


async def sweep(lane: Lane, origin: str) -> None:
    """One more request on each pooled connection."""

    async def one(number: int) -> None:
        received, _ = await lane.send(
            "plain", [lane.head(origin, "GET", f"/sweep/{number}", "Connection: close")]
        )
        (answer,) = cut(received, ["GET"])
        assert answer.seen is not None, received
        assert answer.seen["target"] == f"/sweep/{number}"

    await asyncio.gather(*(one(number) for number in range(SWEEP)))


async def against(world: World, origin: str, lanes: dict[str, list[Vector]], tally: Tally) -> None:
    """Every vector of `lanes` to one origin, and what the origin read."""
    for name, chosen in lanes.items():
        lane = world.lanes[name]
        before = world.mark(origin)
        answered = await run(lane, origin, chosen, tally)
        await sweep(lane, origin)
        read = world.seen(origin, before)
        by_number: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in read:
            kind, number = entry["target"].split("/")[1:3]
            if kind == "sweep":
                continue
            by_number[number][entry["target"]] += 1
            if kind == "marker" and (entry["method"], entry["sha256"]) != ("GET", EMPTY):
                tally.desyncs.append(f"{name}/{origin}: a marker was read as {entry}")
        for number, targets in answered.items():
            if by_number[number] != targets:
                tally.desyncs.append(
                    f"{name}/{origin} {number}: answered {dict(targets)}, read {dict(by_number[number])}"
                )
        strange = set(by_number) - set(answered)
        if strange:
            tally.desyncs.append(f"{name}/{origin}: nobody sent {strange}")
        soiled: set[str] = set()
        for entry in read:
            if entry["connection"] in soiled:
                tally.again += 1
            if entry["target"].startswith("/vector/"):
                soiled.add(entry["connection"])


@pytest.mark.timeout(3000 if LONG else 120)
def test_vectors(world: World) -> None:
    tally = Tally()
    for index, origin in enumerate(START):
        lanes: dict[str, list[Vector]] = {}
        for position, name in enumerate(LANES):
            lane = world.lanes[name]
            made = vectors(
                SEED,
                COUNT,
                host=lane.host(origin).encode(),
                authorization=b"Bearer " + lane.token(origin).encode(),
            )
            # The short form sends each vector to one origin on one lane; the next turn of the framings to others.
            cell = index * len(LANES) + position
            cells = len(START) * len(LANES)
            lanes[name] = [
                vector
                for vector in made
                if LONG or (vector.number // len(FRAMING) + vector.number) % cells == cell
            ]
        uvloop.run(against(world, origin, lanes, tally))
    for line in tally.desyncs[:40]:
        print(line)
    row(
        "desynchronisation",
        f"{COUNT} vectors, {tally.vectors} exchanges, both lanes, plain and TLS, {', '.join(START)}",
        f"{len(tally.desyncs)} desyncs; {tally.forwarded} forwarded, {tally.refused} refused, "
        f"{tally.again} requests on upstream connections that a vector had been on",
        "0 desyncs",
        ok=not tally.desyncs and tally.again > 0 and tally.forwarded > 0 and tally.refused > 0,
        figure=1,
    )
