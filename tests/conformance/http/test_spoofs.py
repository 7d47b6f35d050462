"""Nobody but the edge tells an application who somebody is: attempts to bring identity past it, through both lanes to
real servers, judged by what a program behind them sees.

Programs get fields as CGI variables, `X-Forwarded-For` and `x_forwarded.for` alike as HTTP_X_FORWARDED_FOR (RFC 3875,
4.1.18; WSGI the same). nginx and Apache are asked for just these; for the others they are made here of the fields that
arrived. An attempt has reached the application if a value of ours stands in a variable that is the edge's to fill, or
if the visitor's secret stands anywhere.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvloop
from conformance.http.origins import START
from conformance.http.world import EMAIL, LANES, SCHEMES, Answer, Lane, World, cut
from support.scoreboard import LONG, row

SEED = 7
AT_ONCE = 8
EVIL = "eve@evil.example"

# What applications and their frameworks believe, as variables; on purpose not read from the edge's own tables.
BELIEVED = re.compile(
    r"HTTP_(?:FORWARDED|FORWARDED_FOR|X_FORWARDED|X_FORWARDED_.*|X_GUESTPASS_.*|X_REAL_IP|X_CLIENT_IP|CLIENT_IP"
    r"|TRUE_CLIENT_IP|X_CLUSTER_CLIENT_IP|CF_CONNECTING_IP|CF_ACCESS_.*|X_ORIGINAL_.*|X_REWRITE_URL"
    r"|X_HTTP_METHOD_OVERRIDE|X_HTTP_METHOD|X_METHOD_OVERRIDE|REMOTE_USER|X_REMOTE_USER|X_WEBAUTH_.*"
    r"|X_AUTH_REQUEST_.*|X_MS_CLIENT_PRINCIPAL.*|X_GOOG_IAP_.*|X_AMZN_OIDC_.*|FRONT_END_HTTPS|X_URL_SCHEME|X_SCHEME"
    r"|X_HOST|X_SCRIPT_NAME|PROXY|VIA|HOST)"
)
# Some of each kind; the first ones are also disguised in all ways.
NAMES = (
    ("X-Guestpass-Email", "X-Guestpass-Share", "X-Guestpass-Assertion", "X-Guestpass-Anything")
    + ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-User", "Forwarded")
    + ("X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override", "Remote-User", "X-Real-IP")
)  # fmt: skip
OTHERS = (
    ("X-Forwarded", "X-Forwarded-Prefix", "X-Forwarded-Port", "X-Forwarded-Server", "Forwarded-For", "Client-IP")
    + ("X-Client-IP", "True-Client-IP", "X-Cluster-Client-IP", "CF-Connecting-IP", "CF-Access-Jwt-Assertion")
    + ("X-Remote-User", "X-Remote-Group", "X-WebAuth-User", "X-Auth-Request-Email", "X-MS-Client-Principal-Name")
    + ("X-Goog-IAP-JWT-Assertion", "X-Amzn-Oidc-Data", "X-Original-Host", "X-Method-Override", "X-HTTP-Method")
    + ("Front-End-Https", "X-Url-Scheme", "X-Scheme", "X-Host", "X-Script-Name", "Proxy", "X-Original-Method")
)  # fmt: skip
SEPARATORS = "_.!#$%&'*+^`|~"


@dataclass(frozen=True, slots=True)
class Attempt:
    name: str
    lines: tuple[bytes, ...]
    target: str = "/spoof"
    body: bytes = b""
    method: str = "GET"
    token: bool = True
    """False: `lines` have the Authorization."""


def swapped(name: str, rng: random.Random) -> str:
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in name)


def attempts(token: bytes) -> Iterator[Attempt]:
    """All of them. `token`: the visitor's own."""
    rng = random.Random(SEED)
    evil = EVIL.encode()

    def one(what: str, *lines: bytes, **more: object) -> Attempt:
        return Attempt(what, lines, **more)  # type: ignore[arg-type]

    for name in NAMES + OTHERS:
        raw = name.encode()
        yield one(f"{name}", raw + b": " + evil)
        yield one(f"{name}, lower case", raw.lower() + b": " + evil)
        yield one(f"{name}, upper case", raw.upper() + b": " + evil)
        yield one(f"{name}, _", raw.replace(b"-", b"_") + b": " + evil)
    for name in NAMES:
        raw = name.encode()
        for separator in SEPARATORS:
            yield one(f"{name}, {separator}", raw.replace(b"-", separator.encode()) + b": " + evil)
        mixed = name.replace("-", rng.choice(SEPARATORS), 1).replace("-", rng.choice(SEPARATORS), 1)
        for _ in range(3):
            yield one(f"{name}, mixed", swapped(mixed, rng).encode() + b": " + evil)
        yield one(f"{name}, twice", raw + b": a", raw + b": " + evil)
        yield one(
            f"{name}, in two spellings", raw + b": " + evil, raw.replace(b"-", b"_").lower() + b": " + evil
        )
        yield one(f"{name}, no blank", raw + b":" + evil)
        yield one(f"{name}, blanks", raw + b": \t  " + evil + b" \t")
        yield one(f"{name}, blank before the colon", raw + b" : " + evil)
        yield one(f"{name}, tab before the colon", raw + b"\t: " + evil)
        yield one(f"{name}, blank before", b" " + raw + b": " + evil)
        yield one(f"{name}, folded", b"X-A: b", b" " + raw + b": " + evil)
        yield one(f"{name}, folded value", raw + b":", b"\t" + evil)
        yield one(f"{name}, behind a bare LF", b"X-A: b\n" + raw + b": " + evil)
        yield one(f"{name}, behind a bare CR", b"X-A: b\r" + raw + b": " + evil)
        yield one(f"{name}, behind NUL", b"X-A: b\0" + raw + b": " + evil)
        yield one(f"{name}, NUL in it", raw[:3] + b"\0" + raw[3:] + b": " + evil)
        yield one(f"{name}, not ASCII", raw.replace(b"-", b"\xe2\x80\x90") + b": " + evil)
        yield one(f"{name}, no-break space behind", raw + b"\xa0: " + evil)
        yield one(f"{name}, nominated", b"Connection: " + raw)
        yield one(
            f"{name}, nominated and sent", b"Connection: keep-alive, " + raw.lower(), raw + b": " + evil
        )
        yield one(f"{name}, nominated by Proxy-Connection", b"Proxy-Connection: " + raw, raw + b": " + evil)
        yield one(f"{name}, in Keep-Alive", b"Keep-Alive: timeout=5, " + raw + b"=" + evil)
        yield one(
            f"{name}, in a trailer",
            b"Transfer-Encoding: chunked",
            b"Trailer: " + raw,
            method="POST",
            body=b"1\r\nx\r\n0\r\n" + raw + b": " + evil + b"\r\n\r\n",
        )
        yield one(
            f"{name}, in a trailer nobody announced",
            b"Transfer-Encoding: chunked",
            method="POST",
            body=b"1\r\nx\r\n0\r\n" + raw.replace(b"-", b"_") + b": " + evil + b"\r\n\r\n",
        )
        yield one(
            f"{name}, in a chunk extension",
            b"Transfer-Encoding: chunked",
            method="POST",
            body=b'1;x="\r\n' + raw + b": " + evil + b'"\r\nx\r\n0\r\n\r\n',
        )
        yield one(
            f"{name}, in a body",
            b"Content-Length: %d" % (len(raw) + len(evil) + 4),
            method="POST",
            body=raw + b": " + evil + b"\r\n",
        )
        yield one(f"{name}, in the target", target=f"/x%0d%0a{name}:%20{EVIL}")
        yield one(f"{name}, behind many", *(b"X-%d: y" % n for n in range(90)), raw + b": " + evil)
    for line in (
        b"Cookie: __Host-guestpass=" + token,
        b"cookie: a=1; __host-GUESTPASS=" + token,
        b"COOKIE: __Host-guestpass=x; a=1; __Host-guestpass=" + token,
        b"Cookie: a=1;__Host-guestpass=" + token + b";b=2",
        b"Cookie: \t__Host-guestpass = " + token,
        b"Cookie: __Host-guestpass-2=" + token,
        b"Cookie: __Host-gp-nonce=" + token,
        b"Proxy-Authorization: Bearer " + token,
        b"Proxy-Authorization: Basic " + token,
    ):
        yield one(f"secret: {line[:40].decode('latin-1')}", line)
    for line in (
        b"Authorization: Bearer " + token,
        b"authorization: bearer " + token,
        b"AUTHORIZATION: BEARER    " + token,
        b"Authorization:Bearer\t" + token,
        b"Authorization: Bearer " + token + b"  ",
        b"Authorization: \tBeArEr \t " + token,
    ):
        yield one(f"secret: {line[:30].decode('latin-1')}", line, token=False)


def variables(answer: Answer) -> dict[str, list[str]]:
    """The fields that arrived as CGI variables; a name that comes twice has two values."""
    found: dict[str, list[str]] = {}
    for name, value in answer.received:
        if not (name.startswith(("HTTP_", "CONTENT_")) and name.isupper()):
            name = "HTTP_" + re.sub(r"[^A-Z0-9]", "_", name.upper())
        found.setdefault(name, []).append(value)
    return found


def verdict(lane: Lane, origin: str, scheme: str, attempt: Attempt, answer: Answer) -> str:
    """What is wrong with an answer of the origin; "" when nothing is."""
    seen = variables(answer)
    share, token = lane.shares[origin]
    host = lane.host(origin)
    proto = "https" if scheme == "tls" else "http"
    for name, values in seen.items():
        if BELIEVED.fullmatch(name) and any(EVIL in value for value in values):
            return f"{name} is {values}"
        if any(token in value for value in values):
            return f"{name} has the visitor's secret"
    for name, value in {
        "HTTP_X_GUESTPASS_EMAIL": EMAIL,
        "HTTP_X_GUESTPASS_SHARE": share,
        "HTTP_X_FORWARDED_FOR": "127.0.0.1",
        "HTTP_X_FORWARDED_HOST": host,
        "HTTP_X_FORWARDED_PROTO": proto,
        "HTTP_FORWARDED": f'for=127.0.0.1;proto={proto};host="{host}"',
        "HTTP_VIA": "1.1 guestpass",
    }.items():
        if seen.get(name) != [value]:
            return f"{name} is {seen.get(name)}, not {value}"
    (assertion,) = seen["HTTP_X_GUESTPASS_ASSERTION"]
    if assertion.count(".") != 2 or EVIL in assertion:
        return f"the assertion is {assertion}"
    unknown = [
        name
        for name in seen
        if BELIEVED.fullmatch(name)
        and name
        not in (
            ("HTTP_HOST", "HTTP_VIA", "HTTP_FORWARDED", "HTTP_X_GUESTPASS_EMAIL", "HTTP_X_GUESTPASS_SHARE")
            + ("HTTP_X_GUESTPASS_ASSERTION", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST")
            + ("HTTP_X_FORWARDED_PROTO",)
        )
    ]
    return f"{unknown} reached the application" if unknown else ""


async def attack(
    lane: Lane, origin: str, chosen: list[tuple[int, Attempt]], found: list[str]
) -> tuple[int, int]:
    """How many were forwarded without what they wanted, and how many were refused."""
    gate = asyncio.Semaphore(AT_ONCE)
    counts = [0, 0]

    async def one(number: int, attempt: Attempt) -> None:
        scheme = SCHEMES[number % 2]
        first = [f"{attempt.method} {attempt.target} HTTP/1.1", f"Host: {lane.host(origin)}"]
        if attempt.token:
            first.append(f"Authorization: Bearer {lane.token(origin)}")
        head = b"\r\n".join((*(line.encode() for line in first), *attempt.lines, b"", b""))
        close = lane.head(origin, "HEAD", "/end", "Connection: close")
        async with gate:
            received, _ = await lane.send(scheme, [head + attempt.body + close])
        answers = cut(received, [attempt.method, "HEAD"])
        where = f"{lane.name}/{origin} {scheme}, {attempt.name}"
        if not answers:
            found.append(f"{where}: no answer")
        elif answers[0].seen is None:
            counts[1] += 1
            if answers[0].status != 400 or answers[0].error_id is None or len(answers) != 1:
                found.append(f"{where}: {answers}")
        else:
            counts[0] += 1
            problem = verdict(lane, origin, scheme, attempt, answers[0])
            if problem or len(answers) != 2:
                found.append(f"{where}: {problem or answers}")

    await asyncio.gather(*(one(number, attempt) for number, attempt in chosen))
    return counts[0], counts[1]


@pytest.mark.timeout(900 if LONG else 120)
def test_no_spoof_reaches_an_application(world: World) -> None:
    found: list[str] = []
    passed = refused = total = 0
    for lane in (world.lanes[name] for name in LANES):
        for index, origin in enumerate(START):
            all_of_them = list(enumerate(attempts(lane.token(origin).encode())))
            total = len(all_of_them)
            # The short form sends each attempt to one of the origins.
            chosen = [it for it in all_of_them if LONG or it[0] % len(START) == index]
            forwarded, denied = uvloop.run(attack(lane, origin, chosen, found))
            passed += forwarded
            refused += denied
    for line in found[:40]:
        print(line)
    row(
        "identity spoofs",
        f"{total} attempts, both lanes, plain and TLS, {', '.join(START)}",
        f"{len(found)} reached an application; {passed} forwarded without it, {refused} refused",
        "0 of at least 500",
        ok=not found and total >= 500 and passed > 0 and refused > 0,
        figure=7,
    )


@pytest.mark.parametrize("name", ["X-Guest-Email", "X-Forwards-For", "X-Origin-URL", "From"])
@pytest.mark.parametrize("origin", START)
@pytest.mark.parametrize("lane", LANES)
def test_what_is_nobodys_business_passes(world: World, lane: str, origin: str, name: str) -> None:
    """Names beside the reserved ones arrive: else the test above would find nothing wherever it looked."""
    it = world.lanes[lane]
    (answer,) = it.ask("plain", it.head(origin, "GET", "/x", f"{name}: {EVIL}", "Connection: close"))
    assert variables(answer)["HTTP_" + name.upper().replace("-", "_")] == [EVIL]


@pytest.mark.parametrize("origin", START)
@pytest.mark.parametrize("lane", LANES)
def test_a_foreign_bearer_token_passes(world: World, lane: str, origin: str) -> None:
    """Beside our own token there can be none; with our cookie there can. Only what begins like ours is taken away."""
    it = world.lanes[lane]
    (answer,) = it.ask(
        "plain", it.head(origin, "GET", "/x", "Cookie: a=1; b=__Host-guestpass", "Connection: close")
    )
    assert variables(answer)["HTTP_COOKIE"] == ["a=1; b=__Host-guestpass"]
    assert "HTTP_AUTHORIZATION" not in variables(answer)
