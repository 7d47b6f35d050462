"""Thousands of texts that look like somebody's address, or that some program reads as it: none is taken for it.

Two texts *match* when both are accepted and have the same canonical form. By definition that is so for the ASCII case
of the whole address (the local part too: no mail system in use tells `Alice` from `alice`), for white space around it,
and for the two spellings of an IDNA domain. For nothing else: not for dots or tags in the local part, which are one
mailbox at some providers and two at others.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator

from support.scoreboard import row

from guestpass.addresses import canonical
from guestpass.errors import InvalidEmail

ADDRESSES = (
    "alice@example.org",
    "mike.kelly@plant-a.example.com",
    "o-brien+line3@sharing.example.co.uk",
    "bob@xn--mnchen-3ya.de",
    "kim@kiosk.example",
    "ss.fi@strasse.example",
)

# ASCII letter → what looks like it in other scripts (from Unicode's confusables: Cyrillic, Greek, Armenian, …).
CONFUSABLES = {
    "a": "\u0430\u0251\u03b1\u237a", "b": "\u042c\u0184", "c": "\u0441\u03f2\u217d", "d": "\u0501\u217e",
    "e": "\u0435\u212e\u04bd", "f": "\u0192\u1e9d", "g": "\u0261\u0581", "h": "\u04bb\u0570", "i": "\u0456\u0131\u03b9",
    "j": "\u0458\u03f3", "k": "\u03ba\u043a", "l": "\u04cf\u217c\u01c0", "m": "\u217f\u043c", "n": "\u0578\u057c",
    "o": "\u043e\u03bf\u0585\u06f5", "p": "\u0440\u03c1", "q": "\u051b\u0566", "r": "\u0433\u1d26", "s": "\u0455\u01bd",
    "t": "\u03c4\u0442", "u": "\u057d\u03c5", "v": "\u03bd\u2174", "w": "\u051d\u0461", "x": "\u0445\u2179",
    "y": "\u0443\u03b3", "z": "\u1d22\u0290", "-": "\u2010\u2011\u2212\u2013", ".": "\u0701\u0660\u2024\ua4f8",
    "@": "\uff20\ufe6b", "+": "\uff0b\u2795", "3": "\u0417\u04e0", "1": "l", "0": "\u041e",
}  # fmt: skip

INVISIBLE = (
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e\u034f\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2066\u2069\u115f\u3164\uffa0\ufe0f\u0300\u0307\u0323\u0000\u0001\u0008\u001b\u007f\u0085\u2028\u2029"
)

# Whatever Unicode makes an ASCII letter by changing case, width or compatibility.
FOLDS = [
    c
    for c in map(chr, range(0x80, 0x1FFFF))
    if unicodedata.category(c) not in ("Cs", "Cn")
    and any(
        f.isascii() and len(f) == 1 and (f.isalnum() or f in ".@+-")
        for f in (c.lower(), c.upper(), c.casefold(), unicodedata.normalize("NFKC", c).lower())
    )
]


def folded(c: str) -> str:
    """The one ASCII character that some folding makes of it."""
    forms = (c.lower(), c.upper().lower(), c.casefold(), unicodedata.normalize("NFKC", c).lower())
    return next(f for f in forms if f.isascii() and len(f) == 1)


def replaced(address: str, at: int, by: str) -> str:
    return address[:at] + by + address[at + 1 :]


def confusable(address: str) -> Iterator[str]:
    for at, c in enumerate(address):
        for other in CONFUSABLES.get(c, ""):
            yield replaced(address, at, other)


def folding(address: str) -> Iterator[str]:
    for c in FOLDS:
        at = address.find(folded(c))
        if at >= 0:
            yield replaced(address, at, c)
        domain = address.find(folded(c), address.index("@"))
        if domain >= 0:
            yield replaced(address, domain, c)


def invisible(address: str) -> Iterator[str]:
    local = address.index("@")
    for c in INVISIBLE:
        for at in (0, 1, local, local + 1, local + 2, len(address) - 1, len(address)):
            yield address[:at] + c + address[at:]


def structure(address: str) -> Iterator[str]:
    """What mail programs, `parseaddr`, URL parsers and people read as the address."""
    local, _, domain = address.partition("@")
    evil = "mallory@evil.example"
    yield from (
        f"{address}.", f"{local}.@{domain}", f".{address}", f"{local}@.{domain}", f"{local}@{domain}..",
        f'"{local}"@{domain}', f"'{local}'@{domain}", f'"{local[0]}\\{local[1:]}"@{domain}', f"`{address}`",
        f"({address})", f"{local}(x)@{domain}", f"(x){address}", f"{local}@(x){domain}", f"{address}(x)",
        f"<{address}>", f"<{address}", f"{address}>", f"A <{address}>", f'"{address}" <{evil}>', f"{address} <{evil}>",
        f"{address},{evil}", f"{evil},{address}", f"{address};{evil}", f"{address} {evil}", f"{address}\n{evil}",
        f"{address})bob@evil.example", f"{address}]bob@evil.example", f"{address}>bob@evil.example",
        f"{address}@evil.example", f"{local}@evil.example@{domain}", f"{evil}@{domain}", f"@evil.example:{address}",
        f"{local}%{domain}@evil.example", f"evil.example!{address}", f"{local}%40{domain}", f"{local}%00@{domain}",
        f"mailto:{address}", f"{address}?cc={evil}", f"{address}#x", f"{address}/x", f"{address}\\x", f"{address}:25",
        f"{local}@{domain}%0d%0aBcc:{evil}", f"{address}\r\nBcc: {evil}", f"{address}\0{evil}", f"{local}\t@{domain}",
        f"{local} @{domain}", f"{local}@ {domain}", f"{local}\n@{domain}", f"{local}@{domain} .",
        f"=?utf-8?q?{local}?=@{domain}", f"{local}@evil{domain}",
        f"{local}@[{domain}]", f"{local}@{domain}\\.evil.example", f"{local}@{domain}.evil.example",
        f"{local}@{domain.replace('.', '..', 1)}", f"{local}@{domain.replace('.', '-', 1)}", f"{local}@www.{domain}",
        f"{local}@{domain.partition('.')[2] or 'x'}", f"{local}{domain}", f"{local}@@{domain}", f"{local}@{domain}@",
        f"{local} at {domain}", f"{local}&#64;{domain}", f"{local}&commat;{domain}", f"{local}\u2460@{domain}",
    )  # fmt: skip


def local_parts(address: str) -> Iterator[str]:
    """One mailbox at some providers, two at others."""
    local, _, domain = address.partition("@")
    for at in range(1, len(local)):
        if "." not in local[at - 1 : at + 1]:
            yield f"{local[:at]}.{local[at:]}@{domain}"
    for tag in ("x", "spam", "1", "line3", "a.b", "+"):
        yield f"{local}+{tag}@{domain}"
        yield f"{local}-{tag}@{domain}"
        yield f"{local}_{tag}@{domain}"
        yield f"{local}={tag}@{domain}"
    yield f"{local.replace('.', '')}x@{domain}"
    yield f"{local.partition('+')[0]}@{domain}" if "+" in local else f"{local}+@{domain}"
    yield f"{local}{local}@{domain}"


def domains(address: str) -> Iterator[str]:
    """Other spellings of domains, and names that only resemble them."""
    local, _, domain = address.partition("@")
    for at, by in itertools.product(range(len(domain)), "0ol1ivwmn"):
        if domain[at].isalpha() and domain[at] != by and not domain.startswith("xn--"):
            yield f"{local}@{replaced(domain, at, by)}"
    for dot in "\u3002\uff0e\uff61\u2024\ufe52\u00b7\u0387":
        yield f"{local}@{domain.replace('.', dot)}"
        yield f"{local}@{domain.replace('.', dot, 1)}"
    for change in (
        ("rn", "m"),
        ("m", "rn"),
        ("vv", "w"),
        ("w", "vv"),
        ("ss", "\u00df"),
        ("fi", "\ufb01"),
        ("ss", "\u1e9e"),
    ):
        if change[0] in domain:
            yield f"{local}@{domain.replace(*change)}"
    yield f"{local}@xn--{domain}"
    yield f"{local}@{domain.replace('.', '.xn--', 1)}"


WAYS = (confusable, folding, invisible, structure, local_parts, domains)

EQUAL = [
    ("alice@example.org", "ALICE@example.org"),
    ("alice@example.org", "alice@EXAMPLE.ORG"),
    ("alice@example.org", "  Alice@Example.Org\r\n"),
    ("bob@xn--mnchen-3ya.de", "bob@m\u00fcnchen.de"),
    ("bob@xn--mnchen-3ya.de", "BOB@M\u00dcNCHEN.DE"),
    ("bob@xn--mnchen-3ya.de", "bob@mu\u0308nchen.de"),
    ("bob@xn--mnchen-3ya.de", "bob@XN--MNCHEN-3YA.DE"),
]


def form(text: str) -> str | None:
    try:
        return canonical(text)
    except InvalidEmail:
        return None


def test_no_look_alike_matches() -> None:
    pairs = {
        (address, other)
        for address in ADDRESSES
        for way in WAYS
        for other in way(address)
        # The same by definition: white space around it, ASCII case.
        if other.strip(" \t\r\n").lower() != address or not other.isascii()
    }
    matches = [(a, b) for a, b in pairs if form(a) is not None and form(a) == form(b)]
    unequal = [(a, b) for a, b in EQUAL if form(a) is None or form(a) != form(b)]
    assert len(pairs) >= 2000
    row(
        "look-alike addresses",
        f"{len(pairs):,} pairs: other scripts, case and width folding, invisible characters, comments, quotes, "
        f"lists, dots, tags, domains; and {len(EQUAL)} that are the same",
        f"{len(matches)} false matches, {len(unequal)} missed: {(matches + unequal)[:5]!a}",
        "0; 0",
        ok=not matches and not unequal,
        figure=9,
    )


def test_what_is_accepted_is_its_own_canonical_form() -> None:
    """So it does not matter how often, or where, a text went through it."""
    for address in ADDRESSES:
        for way in WAYS:
            for other in way(address):
                found = form(other)
                assert found is None or (found.isascii() and form(found) == found), ascii(other)
