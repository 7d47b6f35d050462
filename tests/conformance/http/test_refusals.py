"""Every refusal has a status, a short body with an id, a line in the log that has the id, and is counted."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from conformance.http.origins import RAW
from conformance.http.world import LANES, SCHEMES, Lane, World
from support.programs import wait_until

# An id, a title, what happened: enough to ask for help with, nothing to read anything out of.
SHORT = 400


@dataclass(frozen=True, slots=True)
class Refusal:
    name: str
    status: int
    make: Callable[[Lane], bytes]
    metric: tuple[str, dict[str, str]]


def refused(status: int) -> tuple[str, dict[str, str]]:
    return "guestpass_refused_total", {"status": str(status)}


def failed(code_class: str) -> tuple[str, dict[str, str]]:
    return "guestpass_requests_total", {"service": RAW, "code_class": code_class}


def bare(first: str, *lines: str) -> bytes:
    return "\r\n".join((first, *lines, "Connection: close", "", "")).encode()


def raw(data: bytes, kind: str = "close") -> str:
    return f"/{kind}/{base64.urlsafe_b64encode(data).decode()}"


REFUSALS = (
    Refusal("malformed", 400, lambda it: bare("GET / HTTP/1.1", "A b: c"), refused(400)),
    Refusal("no Host", 400, lambda it: bare("GET / HTTP/1.1"), refused(400)),
    Refusal("CONNECT", 405, lambda it: it.head(RAW, "CONNECT", "/"), refused(405)),
    Refusal("unknown method", 501, lambda it: it.head(RAW, "FROB", "/"), refused(501)),
    Refusal("unknown expectation", 417, lambda it: it.head(RAW, "GET", "/", "Expect: x"), refused(417)),
    Refusal("large head", 431, lambda it: it.head(RAW, "GET", "/", "A: " + "a" * 20000), refused(431)),
    Refusal("long target", 414, lambda it: it.head(RAW, "GET", "/" + "a" * 20000), refused(414)),
    Refusal("version", 505, lambda it: it.head(RAW, "GET", "/", version="HTTP/3.0"), refused(505)),
    Refusal(
        "malformed body",
        400,
        lambda it: it.head(RAW, "POST", "/", "Transfer-Encoding: chunked") + b"x\r\n",
        refused(400),
    ),
    Refusal("unknown host", 421, lambda it: bare("GET / HTTP/1.1", "Host: rebound.example"), refused(421)),
    Refusal(
        "unknown share",
        421,
        lambda it: bare("GET / HTTP/1.1", f"Host: nothing.localhost:{it.port}", "Authorization: Bearer gp_x"),
        refused(421),
    ),
    Refusal("nobody", 401, lambda it: bare("GET / HTTP/1.1", f"Host: {it.host(RAW)}"), refused(401)),
    Refusal(
        "wrong token",
        401,
        lambda it: bare("GET / HTTP/1.1", f"Host: {it.host(RAW)}", "Authorization: Bearer gp_x"),
        refused(401),
    ),
    Refusal(
        "a token as a cookie",
        401,
        lambda it: bare(
            "GET / HTTP/1.1", f"Host: {it.host(RAW)}", f"Cookie: __Host-guestpass={it.token(RAW)}"
        ),
        refused(401),
    ),
    Refusal(
        "a token twice",
        401,
        lambda it: it.head(RAW, "GET", "/", f"Authorization: Bearer {it.token(RAW)}", "Connection: close"),
        refused(401),
    ),
    Refusal(
        "another share's token",
        401,
        lambda it: it.head(RAW, "GET", "/", "Connection: close").replace(
            it.token(RAW).encode(), it.token("node").encode()
        ),
        refused(401),
    ),
    Refusal(
        "beyond the scope",
        403,
        lambda it: it.head(f"{RAW}-limited", "GET", "/x", "Connection: close"),
        refused(403),
    ),
    Refusal(
        "beyond the gateway's rules",
        403,
        lambda it: it.head(f"{RAW}-guarded", "GET", "/x", "Connection: close"),
        ("guestpass_requests_total", {"service": f"{RAW}-limited", "code_class": "4xx"}),
    ),
    Refusal("no answer", 502, lambda it: it.head(RAW, "GET", raw(b""), "Connection: close"), failed("5xx")),
    Refusal(
        "not an answer",
        502,
        lambda it: it.head(RAW, "POST", raw(b"hello\r\n\r\n"), "Content-Length: 0", "Connection: close"),
        failed("5xx"),
    ),
)


# What `[limits]` refuse stands in the log once a second.
LIMITED = {"large head"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda it: it.name)
def test_refusals(world: World, refusal: Refusal, lane: str, scheme: str) -> None:
    it = world.lanes[lane]
    name, labels = refusal.metric
    before = it.metric(name, **labels)
    if refusal.name in LIMITED:
        time.sleep(1.1)
    (answer,) = it.ask(scheme, refusal.make(it))
    assert answer.status == refusal.status
    assert answer.get("Content-Type") == "text/plain; charset=utf-8"
    assert len(answer.body) <= SHORT
    error_id = answer.error_id
    assert error_id, answer.body
    line = wait_until(
        "the refusal is in the log",
        lambda: re.search(rf".*error {error_id}: {refusal.status}: (.+)", it.log),
        seconds=10,
    )
    assert it.token(RAW) not in line[0]
    assert it.metric(name, **labels) == before + 1


@pytest.mark.parametrize("lane", LANES)
def test_a_page_for_people_has_the_id_too(world: World, lane: str) -> None:
    it = world.lanes[lane]
    (answer,) = it.ask(
        "plain", it.head(f"{RAW}-limited", "GET", "/x", "Accept: text/html", "Connection: close")
    )
    assert answer.status == 403
    found = re.search(rb"give this id: <code>([0-9a-f]{8})</code>", answer.body)
    assert found
    assert found[1].decode() in it.log
