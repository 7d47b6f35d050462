"""What filters say before there is a request (`RequestFilter.compile`), in the form that the lanes use.

`StaticCompiler.compile` joins the answers of all filters for one session into a `Compiled`, which the session's grant
keeps. Header edits become bytes; rules of scope and networks stay apart by filter, because a request must satisfy each
of them; a rate becomes a token bucket, shared by all grants of the session, recipient or share that it counts.

Whatever is malformed raises ValueError with words for the log: the session is not admitted.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from itertools import product

from guestpass import scope
from guestpass.edge import headers as h
from guestpass.errors import Invalid
from guestpass.model import Scope, Session, Share
from guestpass.plugin import Edits, Rate, Static
from guestpass_speedups.relay import Bucket

# RFC 9110 §5.1 and §5.5, in Latin-1.
HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

# Of the fields that a head has room for besides the visitor's (`headers.ADDED_FIELDS`), ours leave five.
MAX_ADDED_FIELDS = 5
# Half of what the fast lane has room for besides the head itself (INJECT_MAX in relay.pyx).
MAX_ADDED_BYTES = 4096
# What frames a message, or says who somebody is in the edge's own words.
NOT_EDITED = h.HOP_BY_HOP | {b"host", b"content-length", b"expect"}
OURS = b"x-guestpass-"

MAX_BURST = 1_000_000

# Hyphens of a name that are spelled in both ways: 64 names.
MAX_SEPARATORS = 6

# What has a bucket of its own, by `Rate.each`.
EACH = {
    "session": lambda share, session: session.id,
    "recipient": lambda share, session: session.recipient_id,
    "share": lambda share, session: share.id,
}

Networks = tuple[IPv4Network | IPv6Network, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What holds for every request of one session. Texts are what is said to who is refused; "" the usual words."""

    removed: tuple[bytes, ...] = ()  # names in lower case
    added: bytes = b""  # complete lines
    scopes: tuple[tuple[tuple[Scope, ...], str], ...] = ()
    networks: tuple[tuple[Networks, str], ...] = ()
    buckets: tuple[Bucket, ...] = ()

    def elsewhere(self, address: str) -> str | None:
        """None when the client may be there, else words."""
        return next((words for nets, words in self.networks if not h.within(address, nets)), None)

    def outside(self, method: str, target: str) -> str | None:
        """None when every scope admits the request, else words."""
        return next((w for rules, w in self.scopes if not scope.admits(rules, method, target)), None)

    def take(self, now: float) -> float | None:
        """Take a token of every rate; None, or the seconds to wait when one has none."""
        empty = [bucket.wait() for bucket in self.buckets if not bucket.take(now)]
        return max(empty, default=None)


NOTHING = Compiled()


class StaticCompiler:
    """Joins what filters say. Buckets live as long as a grant has them."""

    def __init__(self) -> None:
        self._buckets: weakref.WeakValueDictionary[tuple[str, str, str, float, int], Bucket] = (
            weakref.WeakValueDictionary()
        )

    def compile(
        self, answers: Iterable[tuple[str, Static]], share: Share, session: Session
    ) -> Compiled | None:
        """`answers` by the filter's name, in order; None when nothing is limited or edited. Raises ValueError."""
        removed: dict[bytes, None] = {}
        added: list[tuple[str, str]] = []
        scopes: list[tuple[tuple[Scope, ...], str]] = []
        networks: list[tuple[Networks, str]] = []
        buckets: list[Bucket] = []
        for name, static in answers:
            if static.edits is not None:
                removed |= dict.fromkeys(_name(n).lower() for n in sorted(static.edits.remove))
                added += static.edits.add
            if static.scope is not None:
                scopes.append((tuple(_rule(rule) for rule in static.scope), static.message))
            if static.networks is not None:
                networks.append((_networks(static.networks), static.message))
            if static.rate is not None:
                buckets.append(self._bucket(name, static.rate, share, session))
        lines = added_lines(added)
        if not (removed or lines or scopes or networks or buckets):
            return None
        return Compiled(tuple(removed), lines, tuple(scopes), tuple(networks), tuple(buckets))

    def _bucket(self, name: str, rate: Rate, share: Share, session: Session) -> Bucket:
        if rate.each not in EACH:
            raise ValueError(f"a rate is for each {', '.join(EACH)}, not {rate.each!r}")
        if not (rate.per_second > 0 and 1 <= rate.burst <= MAX_BURST):
            raise ValueError(f"a rate of {rate.per_second!r} per second, {rate.burst!r} at once, is none")
        key = (name, rate.each, EACH[rate.each](share, session), rate.per_second, rate.burst)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(rate.per_second, rate.burst)
        return bucket


def added_lines(added: Sequence[tuple[str, str]]) -> bytes:
    """Raises ValueError."""
    if len(added) > MAX_ADDED_FIELDS:
        raise ValueError(f"{len(added)} fields are added, {MAX_ADDED_FIELDS} are allowed")
    lines = b"".join(_name(name) + b": " + _value(name, value) + b"\r\n" for name, value in added)
    if len(lines) > MAX_ADDED_BYTES:
        raise ValueError(f"{len(lines)} bytes of fields are added, {MAX_ADDED_BYTES} are allowed")
    return lines


def check_edits(edits: Edits) -> None:
    """Whether a filter's edits of one request can be written. Raises ValueError."""
    for name, value in edits.add:
        _name(name)
        _value(name, value)  # may come from the request: it must not bring further fields along
    for name in edits.remove:
        _name(name)


def spellings(names: Iterable[str]) -> Iterable[str]:
    """Each name with each of its hyphens as it is, and as the underscore that servers take for one."""
    for name in names:
        parts = name.split("-")
        for separators in product("-_", repeat=min(len(parts) - 1, MAX_SEPARATORS)):
            rest = "-" * (len(parts) - 1 - len(separators))
            yield parts[0] + "".join(
                s + part for s, part in zip((*separators, *rest), parts[1:], strict=True)
            )


def _name(name: str) -> bytes:
    if not HEADER_NAME.fullmatch(name):
        raise ValueError(f"the field name {name!r} is malformed")
    raw = name.encode("ascii")
    if raw.lower() in NOT_EDITED or h.fold(raw).startswith(OURS):
        raise ValueError(f"the field {name!r} is not a filter's to edit")
    return raw


def _value(name: str, value: str) -> bytes:
    if not HEADER_VALUE.fullmatch(value):
        raise ValueError(f"the field {name!r} that it adds is malformed")
    return value.encode("latin-1")


def _rule(rule: Scope) -> Scope:
    try:
        return scope.parse_scope(str(rule))
    except Invalid as exc:
        raise ValueError(str(exc)) from exc


def _networks(networks: Sequence[IPv4Network | IPv6Network]) -> Networks:
    for network in networks:
        if not isinstance(network, IPv4Network | IPv6Network):
            raise ValueError(f"{network!r} is not a network")
    return tuple(networks)
