"""Requests that parsers disagree on, made by a seeded generator: method × framing × whitespace × case × position ×
split points. No I/O.

A Vector is the bytes of one request, with what may become of it:

    FORWARD   it is what HTTP says, in an odd form: it is forwarded, and the origin reads this method and this body
    REFUSE    nobody knows where it ends, or what it says: a 4xx or 5xx of the edge's own, and the connection closes
    EITHER    refused or forwarded; what matters is that the bytes behind it keep their meaning
    WAIT      it is not complete: nothing is answered, and the origin reads nothing to its end

The body of each, where there is one, is itself a request for /smuggled/… with the visitor's own token: read as one by
anybody it would be answered. A marker request follows right behind.
"""

from __future__ import annotations

import enum
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND")


class Verdict(enum.Enum):
    FORWARD = enum.auto()
    REFUSE = enum.auto()
    EITHER = enum.auto()
    WAIT = enum.auto()


FORWARD, REFUSE, EITHER, WAIT = Verdict


@dataclass
class Draft:
    """A request while the generator's steps work on it."""

    method: str
    target: str
    body: bytes
    lines: list[bytes] = field(default_factory=list)
    """Fields of the framing."""
    payload: bytes = b""
    verdict: Verdict = FORWARD
    version: bytes = b"HTTP/1.1"
    framed: bool = True
    """False: the payload is not part of the request: the edge sees it as the next one."""

    def worsen(self, verdict: Verdict) -> None:
        """REFUSE beats WAIT beats EITHER beats FORWARD."""
        order = (FORWARD, EITHER, WAIT, REFUSE)
        self.verdict = max(self.verdict, verdict, key=order.index)


@dataclass(frozen=True, slots=True)
class Vector:
    number: int
    name: str
    method: str
    target: str
    pieces: tuple[bytes, ...]
    verdict: Verdict
    sha256: str
    """Of the body that the origin must read, if it is forwarded."""
    keep_alive: bool


# ── framing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def chunks(body: bytes, *sizes: int, line: bytes = b"%x\r\n", end: bytes = b"0\r\n\r\n") -> bytes:
    out = b""
    at = 0
    for size in (*sizes, len(body)):
        part = body[at : at + size]
        at += size
        if part:
            out += line % len(part) + part + b"\r\n"
    return out + end


def length(value: bytes, verdict: Verdict = REFUSE) -> Callable[[Draft], None]:
    """A Content-Length of this form; %d is the true one."""

    def step(it: Draft) -> None:
        it.lines.append(b"Content-Length: " + (value % len(it.body) if b"%" in value else value))
        it.payload = it.body
        it.worsen(verdict)

    return step


def coding(value: bytes, verdict: Verdict = REFUSE) -> Callable[[Draft], None]:
    """A Transfer-Encoding of this form, and a body in chunks."""

    def step(it: Draft) -> None:
        it.lines.append(b"Transfer-Encoding: " + value)
        it.payload = chunks(it.body)
        it.worsen(verdict)

    return step


def fields(*lines: bytes, chunked: bool, verdict: Verdict = REFUSE) -> Callable[[Draft], None]:
    """Several fields at once; %d is the true length."""

    def step(it: Draft) -> None:
        it.lines += [line % len(it.body) if b"%" in line else line for line in lines]
        it.payload = chunks(it.body) if chunked else it.body
        it.worsen(verdict)

    return step


def chunked(make: Callable[[bytes], bytes], verdict: Verdict) -> Callable[[Draft], None]:
    """A good Transfer-Encoding, and a body as `make` makes it."""

    def step(it: Draft) -> None:
        it.lines.append(b"Transfer-Encoding: chunked")
        it.payload = make(it.body)
        it.worsen(verdict)

    return step


def nothing(it: Draft) -> None:
    it.body = b""


def disguised(*lines: bytes, chunked: bool = False) -> Callable[[Draft], None]:
    """What only a careless parser takes for framing: for the edge there is no body, and the payload is the next
    request; for the origin it must be the same."""

    def step(it: Draft) -> None:
        it.lines += [line % len(it.body) if b"%" in line else line for line in lines]
        it.payload = chunks(it.body) if chunked else it.body
        it.framed = False
        it.worsen(EITHER)

    return step


FRAMING: dict[str, Callable[[Draft], None]] = {
    "no body": nothing,
    "length": length(b"%d", FORWARD),
    "length, spaces around": length(b"   %d  ", FORWARD),
    "length, tabs around": length(b"\t%d\t", FORWARD),
    "length +": length(b"+%d"),
    "length -": length(b"-%d"),
    "length 00": length(b"00%d"),
    "length list": length(b"31, 31"),
    "length list of two": length(b"0, 31"),
    "length hex": length(b"0x1f"),
    "length exponent": length(b"1e1"),
    "length fraction": length(b"1.0"),
    "length empty": length(b""),
    "length blank inside": length(b"1 0"),
    "length tab inside": length(b"1\t0"),
    "length with ;": length(b"10;5"),
    "length quoted": length(b'"10"'),
    "length not ASCII": length(b"\xd9\xa1\xd9\xa0"),
    "length superscript": length(b"1\xb2"),
    "length underscore": length(b"1_0"),
    "length huge": length(b"18446744073709551617"),
    "length 2^63": length(b"9223372036854775808"),
    "two lengths, same": fields(b"Content-Length: %d", b"Content-Length: %d", chunked=False),
    "two lengths, 0 first": fields(b"Content-Length: 0", b"Content-Length: %d", chunked=False),
    "two lengths, 0 last": fields(b"Content-Length: %d", b"content-length: 0", chunked=False),
    "CL.TE": fields(b"Content-Length: %d", b"Transfer-Encoding: chunked", chunked=False),
    "CL.TE, chunks": fields(b"Content-Length: 4", b"Transfer-Encoding: chunked", chunked=True),
    "TE.CL": fields(b"Transfer-Encoding: chunked", b"Content-Length: 4", chunked=True),
    "TE.CL 0": fields(b"Transfer-Encoding: chunked", b"Content-Length: 0", chunked=True),
    "TE.TE, second odd": fields(b"Transfer-Encoding: chunked", b"Transfer-Encoding: cow", chunked=True),
    "TE.TE, first odd": fields(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked", chunked=True),
    "TE.TE, same": fields(b"Transfer-Encoding: chunked", b"transfer-encoding: chunked", chunked=True),
    "TE gzip, chunked": coding(b"gzip, chunked"),
    "TE chunked, gzip": coding(b"chunked, gzip"),
    "TE chunked, chunked": coding(b"chunked, chunked"),
    "TE ,chunked": coding(b",chunked"),
    "TE chunked,": coding(b"chunked,"),
    "TE chunked;": coding(b"chunked;q=1"),
    "TE xchunked": coding(b"xchunked"),
    "TE chunkedx": coding(b"chunkedx"),
    "TE identity": coding(b"identity"),
    "TE quoted": coding(b'"chunked"'),
    "TE single-quoted": coding(b"'chunked'"),
    "TE empty": coding(b""),
    "TE vertical tab": coding(b"\x0bchunked"),
    "TE form feed": coding(b"chunked\x0c"),
    "TE no-break space": coding(b"\xa0chunked"),
    "TE long s": coding(b"chun\xc5\xbfed"),
    "TE kelvin": coding(b"chun\xe2\x84\xaaed"),
    "TE upper case": coding(b"CHUNKED", FORWARD),
    "TE mixed case": coding(b"cHuNkEd", FORWARD),
    "TE trailing tab": coding(b"chunked\t", EITHER),
    "TE leading tab": coding(b"\tchunked", FORWARD),
    "chunks": chunked(chunks, FORWARD),
    "chunks of 1, 2, 3": chunked(lambda body: chunks(body, 1, 2, 3), FORWARD),
    "chunks, upper-case hex": chunked(lambda body: chunks(body, 11, 26, line=b"%X\r\n"), FORWARD),
    "chunks, zeros before": chunked(lambda body: chunks(body, 5, line=b"000%x\r\n"), EITHER),
    "chunks, many zeros": chunked(lambda body: chunks(body, line=b"0" * 40 + b"%x\r\n"), EITHER),
    "chunks, extension": chunked(lambda body: chunks(body, 7, line=b"%x;a=b\r\n"), FORWARD),
    "chunks, quoted extension": chunked(lambda body: chunks(body, line=b'%x;a="b;c"\r\n'), EITHER),
    "chunks, extension with CRLF in quotes": chunked(
        lambda body: chunks(body, line=b'%x;a="\r\n"\r\n'), REFUSE
    ),
    "chunks, extension with bare LF": chunked(lambda body: chunks(body, line=b"%x;a\nb\r\n"), REFUSE),
    "chunks, extension with bare CR": chunked(lambda body: chunks(body, line=b"%x;a\rb\r\n"), REFUSE),
    "chunks, extension with NUL": chunked(lambda body: chunks(body, line=b"%x;a\0b\r\n"), REFUSE),
    "chunks, huge extension": chunked(
        lambda body: chunks(body, line=b"%x;" + b"a" * 20000 + b"\r\n"), REFUSE
    ),
    "chunks, blank before size": chunked(lambda body: chunks(body, line=b" %x\r\n"), REFUSE),
    "chunks, blank after size": chunked(lambda body: chunks(body, line=b"%x \r\n"), EITHER),
    "chunks, size 0x": chunked(lambda body: chunks(body, line=b"0x%x\r\n"), REFUSE),
    "chunks, size +": chunked(lambda body: chunks(body, line=b"+%x\r\n"), REFUSE),
    "chunks, size -": chunked(lambda body: chunks(body, line=b"-%x\r\n"), REFUSE),
    "chunks, size _": chunked(lambda body: chunks(body, line=b"0_%x\r\n"), REFUSE),
    "chunks, size beyond 64 bits": chunked(
        lambda body: chunks(body, line=b"10000000000000000%x\r\n"), REFUSE
    ),
    "chunks, no size": chunked(lambda body: b"\r\n" + body + b"\r\n0\r\n\r\n", REFUSE),
    "chunks, bare LF after size": chunked(lambda body: chunks(body, line=b"%x\n"), REFUSE),
    "chunks, bare CR after size": chunked(lambda body: chunks(body, line=b"%x\r"), REFUSE),
    "chunks, spill": chunked(lambda body: b"5\r\n" + body + b"\r\n0\r\n\r\n", REFUSE),
    "chunks, no CRLF behind": chunked(lambda body: b"%x\r\n" % len(body) + body + b"0\r\n\r\n", REFUSE),
    "chunks, bare LF behind": chunked(lambda body: b"%x\r\n" % len(body) + body + b"\n0\r\n\r\n", REFUSE),
    "chunks, two bytes too few": chunked(
        lambda body: b"%x\r\n" % (len(body) + 2) + body + b"\r\n0\r\n\r\n", REFUSE
    ),
    "chunks, last with bare LF": chunked(lambda body: chunks(body, end=b"0\n\n"), REFUSE),
    "chunks, last 00": chunked(lambda body: chunks(body, end=b"00\r\n\r\n"), EITHER),
    "chunks, last with extension": chunked(lambda body: chunks(body, end=b"0;a=b\r\n\r\n"), FORWARD),
    "chunks, trailer": chunked(lambda body: chunks(body, end=b"0\r\nX-Checksum: 1\r\n\r\n"), FORWARD),
    "chunks, trailer Content-Length": chunked(
        lambda body: chunks(body, end=b"0\r\nContent-Length: 40\r\n\r\n"), REFUSE
    ),
    "chunks, trailer Transfer-Encoding": chunked(
        lambda body: chunks(body, end=b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), REFUSE
    ),
    "chunks, trailer Host": chunked(lambda body: chunks(body, end=b"0\r\nHost: evil\r\n\r\n"), REFUSE),
    "chunks, trailer of ours": chunked(
        lambda body: chunks(body, end=b"0\r\nX-Guestpass-Email: eve@evil.example\r\n\r\n"), EITHER
    ),
    "chunks, trailer folded": chunked(lambda body: chunks(body, end=b"0\r\nA: b\r\n c\r\n\r\n"), REFUSE),
    "chunks, trailer without a colon": chunked(
        lambda body: chunks(body, end=b"0\r\nnothing\r\n\r\n"), REFUSE
    ),
    "chunks, trailer with bare LF": chunked(lambda body: chunks(body, end=b"0\r\nA: b\n\r\n"), REFUSE),
    "chunks, no end": chunked(lambda body: chunks(body, end=b"0\r\n"), EITHER),
    "Transfer_Encoding": disguised(b"Transfer_Encoding: chunked", chunked=True),
    "Transfer.Encoding": disguised(b"Transfer.Encoding: chunked", chunked=True),
    "Content_Length": disguised(b"Content_Length: %d"),
    "Content-Length-": disguised(b"Content-Length-: %d"),
    "X-Content-Length": disguised(b"X-Content-Length: %d"),
    "TE: chunked": disguised(b"TE: chunked", chunked=True),
    "Connection: close, Content-Length": fields(
        b"Connection: Content-Length", b"Content-Length: %d", chunked=False
    ),
    "Connection: Transfer-Encoding": fields(
        b"Connection: Transfer-Encoding", b"Transfer-Encoding: chunked", chunked=True, verdict=EITHER
    ),
    "Expect twice": fields(
        b"Content-Length: %d", b"Expect: 100-continue", b"Expect: 100-continue", chunked=False
    ),
    "Expect unknown": fields(b"Content-Length: %d", b"Expect: 200-ok", chunked=False),
    "Expect": fields(b"Content-Length: %d", b"Expect: 100-continue", chunked=False, verdict=FORWARD),
    "Upgrade: h2c": fields(
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
        b"Content-Length: %d",
        chunked=False,
        verdict=EITHER,
    ),
    "Upgrade: websocket with a body": fields(
        b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: %d", chunked=False
    ),
    "length too large": fields(b"Content-Length: 100000", chunked=False, verdict=WAIT),
    "chunk too large": chunked(lambda body: b"fffff\r\n" + body, WAIT),
}

# ── white space, line ends and what else a head may be broken by ──────────────────────────────────────────────────

Bend = Callable[[bytes, random.Random], bytes]


def _line(head: bytes, rng: random.Random) -> int:
    """Where a random field line begins."""
    starts = [at + 2 for at in range(len(head) - 4) if head[at : at + 2] == b"\r\n"]
    return rng.choice(starts)


def _insert(what: bytes, *, where: str) -> Bend:
    def bend(head: bytes, rng: random.Random) -> bytes:
        if where == "start":
            return what + head
        if where == "line":
            at = _line(head, rng)
        elif where == "colon":
            at = head.index(b":", _line(head, rng))
        elif where == "value":
            at = head.index(b"\r\n", _line(head, rng))
        elif where == "version":
            at = head.index(b"\r\n")
        else:
            at = head.index(b" ") + (where == "target")
        return head[:at] + what + head[at:]

    return bend


def _line_end(what: bytes) -> Bend:
    def bend(head: bytes, rng: random.Random) -> bytes:
        at = head.index(b"\r\n", _line(head, rng))
        return head[:at] + what + head[at + 2 :]

    return bend


WHITESPACE: dict[str, tuple[Bend, Verdict]] = {
    "plain": (lambda head, rng: head, FORWARD),
    "no space after colons": (lambda head, rng: head.replace(b": ", b":"), FORWARD),
    "tabs after colons": (lambda head, rng: head.replace(b": ", b":\t \t"), FORWARD),
    "space behind a value": (_insert(b" ", where="value"), EITHER),
    "CRLF before": (_insert(b"\r\n", where="start"), FORWARD),
    "two CRLF before": (_insert(b"\r\n\r\n", where="start"), EITHER),
    "LF before": (_insert(b"\n", where="start"), REFUSE),
    "space before": (_insert(b" ", where="start"), REFUSE),
    "NUL before": (_insert(b"\0", where="start"), REFUSE),
    "space before colon": (_insert(b" ", where="colon"), REFUSE),
    "tab before colon": (_insert(b"\t", where="colon"), REFUSE),
    "NUL before colon": (_insert(b"\0", where="colon"), REFUSE),
    "line begins with space": (_insert(b" ", where="line"), REFUSE),
    "line begins with tab": (_insert(b"\t", where="line"), REFUSE),
    "line begins with CR": (_insert(b"\r", where="line"), REFUSE),
    "folded value": (_insert(b"\r\n folded", where="value"), REFUSE),
    "NUL in a value": (_insert(b"\0", where="value"), REFUSE),
    "DEL in a value": (_insert(b"\x7f", where="value"), REFUSE),
    "bare CR in a value": (_insert(b"\rX: y", where="value"), REFUSE),
    "bare LF ends a line": (_line_end(b"\n"), REFUSE),
    "CR CR LF ends a line": (_line_end(b"\r\r\n"), REFUSE),
    "LF CR ends a line": (_line_end(b"\n\r"), REFUSE),
    "two spaces before target": (_insert(b" ", where="target"), REFUSE),
    "tab before target": (_insert(b"\t", where="method"), REFUSE),
    "space behind version": (_insert(b" ", where="version"), REFUSE),
    "line without a colon": (_insert(b"nothing\r\n", where="line"), REFUSE),
    "field without a name": (_insert(b": nothing\r\n", where="line"), REFUSE),
    "name not ASCII": (_insert(b"X-\xc3\xa9: 1\r\n", where="line"), REFUSE),
    "second Host": (_insert(b"Host: evil.example\r\n", where="line"), REFUSE),
}
# Most vectors have one oddity: with two it is not known which of them was seen.
PLAIN_SHARE = 0.6

VERSIONS: dict[bytes, Verdict] = {
    b"HTTP/1.1": FORWARD,
    b"HTTP/1.0": EITHER,
    b"HTTP/1.2": REFUSE,
    b"HTTP/2.0": REFUSE,
    b"HTTP/0.9": REFUSE,
    b"http/1.1": REFUSE,
    b"HTTP/1.1.1": REFUSE,
    b"HTTP/01.1": REFUSE,
    b"HTTP/1,1": REFUSE,
}
POSITIONS = ("first", "last", "middle", "behind many")
CASES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "as usual": lambda name, rng: name,
    "lower": lambda name, rng: name.lower(),
    "upper": lambda name, rng: name.upper(),
    "mixed": lambda name, rng: bytes(
        byte ^ 32 if rng.random() < 0.5 and chr(byte).isalpha() else byte for byte in name
    ),
}


def vectors(seed: int, count: int, *, host: bytes, authorization: bytes) -> Iterator[Vector]:
    """`count` of them; the same ones for the same seed. Each framing comes as often as every other one."""
    rng = random.Random(seed)
    names = list(FRAMING)
    for number in range(count):
        name = names[number % len(names)]
        yield _make(number, name, rng, host=host, authorization=authorization)


def _make(number: int, name: str, rng: random.Random, *, host: bytes, authorization: bytes) -> Vector:
    smuggled = b"GET /smuggled/%d HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\n\r\n" % (
        number,
        host,
        authorization,
    )
    draft = Draft(rng.choice(METHODS), f"/vector/{number}", smuggled)
    FRAMING[name](draft)
    labels = [name]

    version = b"HTTP/1.1"
    waits = draft.verdict is WAIT  # for the rest, if nothing else is wrong
    if rng.random() < 0.08 and not waits:
        version = rng.choice(list(VERSIONS))
        draft.worsen(VERSIONS[version])
        labels.append(version.decode())

    if version == b"HTTP/1.0" and name == "Expect unknown":
        draft.verdict = EITHER  # RFC 9110, 10.1.1: it is ignored then

    case = rng.choice(list(CASES))
    lines = []
    for line in draft.lines:
        field_name, colon, value = line.partition(b":")
        lines.append(CASES[case](field_name, rng) + colon + value)
    position = rng.choice(POSITIONS)
    others = [b"Host: " + host, b"Authorization: " + authorization, b"Accept: */*", b"X-Filler: 1"]
    if position == "first":
        ordered = lines + others
    elif position == "last":
        ordered = others + lines
    elif position == "middle":
        ordered = others[:2] + lines + others[2:]
    else:
        ordered = others + [b"X-Many-%d: %d" % (n, n) for n in range(80)] + lines
    head = b"\r\n".join(
        (b"%s %s %s" % (draft.method.encode(), draft.target.encode(), version), *ordered, b"", b"")
    )
    labels += [case, position]

    keep_alive = version == b"HTTP/1.1"
    white = "plain" if rng.random() < PLAIN_SHARE or waits else rng.choice(list(WHITESPACE))
    bend, verdict = WHITESPACE[white]
    if version == b"HTTP/1.1":
        head = bend(head, rng)
        draft.worsen(verdict)
        labels.append(white)
    data = head + draft.payload
    return Vector(
        number,
        f"{draft.method}, " + ", ".join(labels),
        draft.method,
        draft.target,
        split(data, rng),
        draft.verdict,
        hashlib.sha256(draft.body if draft.framed else b"").hexdigest(),
        keep_alive,
    )


def split(data: bytes, rng: random.Random) -> tuple[bytes, ...]:
    """In one piece, or in up to five, cut where it hurts: inside line ends, sizes and names, or anywhere."""
    count = rng.choice((0, 0, 0, 1, 1, 2, 4))
    ends = [at + 1 for at in range(len(data) - 1) if data[at] == 13]
    points = sorted(
        {
            rng.choice(ends) if ends and rng.random() < 0.5 else rng.randrange(1, len(data))
            for _ in range(count)
        }
    )
    return tuple(data[a:b] for a, b in zip((0, *points), (*points, len(data)), strict=True))


__all__: Sequence[str] = ("METHODS", "Vector", "Verdict", "vectors")
