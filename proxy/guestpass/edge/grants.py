"""The grant table: what every request and every live stream is held to.

A grant is what the data plane knows of one session. Plugins decided when it was made; the table only enforces. It is
a cache: dropping a grant sends the session's next request through the control plane, which asks the store and the
Revokers again. So *revoke* means: the store already says no, then the grant is dropped, then its streams are ended.

The indexes make a revocation cost what it ends: by share, recipient, session and gateway, never a walk over all.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

from guestpass.edge.static import Compiled
from guestpass.model import Revocation, Revoked, Session, SessionKind, Share
from guestpass_speedups.relay import Load

# Grants that served nothing for so long are dropped; the next request rebuilds them from the store.
IDLE_SECONDS = 3600.0

# A timer may not lie further ahead (event loops keep times as floats of seconds or integers of milliseconds); a
# later expiry is looked at again then.
MAX_TIMER = 86_400.0

Key = TypeVar("Key")


class Indexed(Protocol):
    """What the fast lane keeps of a grant, under the secret itself."""

    @property
    def secret(self) -> bytes: ...

    def dropped(self) -> None:
        """The grant is no longer in force."""

    def moved(self) -> None:
        """The grant has another gateway."""


class LiveStream(Protocol):
    """Something open on behalf of a grant."""

    grant: Grant

    def end(self, reason: str) -> None:
        """End it now: nothing more may reach the visitor. Called at most once; must not raise."""


class Tail(Protocol):
    """What is complete here and still on its way to the visitor: in our buffers, or in the kernel's."""

    grant: Grant

    def cut(self) -> bool:
        """Nothing more of it may reach the visitor; whether there was something. Must not raise."""


@dataclass(slots=True, eq=False)
class Grant:
    """One session's permission, and what is open under it. `digest` is the SHA-256 of the cookie or token."""

    kind: SessionKind
    digest: bytes
    share: Share
    session: Session
    gateway: str | None  # the pinned gateway's name; the relay moves it when that one is gone
    expires: float | None  # seconds since the epoch: the earlier of share and session
    last_used: float = 0.0
    streams: set[LiveStream] = field(default_factory=set)
    tails: dict[object, Tail] = field(default_factory=dict)  # by connection
    headers: bytes = (
        b""  # identity fields for the application, made by the relay, with an expiry of their own
    )
    headers_until: float = 0.0
    static: Compiled | None = None  # what filters said for every request
    stale: bool = False  # decided by plugins that are not asked any more: see `GrantTable.outdate`
    entry: Indexed | None = None
    load: Load = field(default_factory=Load)  # of all of the share's grants, once it is in the table
    _timer: asyncio.TimerHandle | None = None

    @property
    def email(self) -> str:
        return self.session.email

    @property
    def recipient_id(self) -> str:
        return self.session.recipient_id

    @property
    def site(self) -> str:
        return self.share.site

    @property
    def service(self) -> str:
        return self.share.service

    @staticmethod
    def end_of(share: Share, session: Session) -> float | None:
        """What `expires` is."""
        return min((t for t in (share.expires, session.expires) if t is not None), default=None)

    def expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


class GrantTable:
    """All grants of this worker. Used from the event loop only."""

    def __init__(
        self, *, now: Callable[[], float] = time.time, touched: Callable[[str, float], None] | None = None
    ) -> None:
        self._now = now
        self._touched = touched  # session id, time: told when a session is used
        self._by_digest: dict[tuple[SessionKind, bytes], Grant] = {}
        self._by_share: defaultdict[str, set[Grant]] = defaultdict(set)
        self._by_recipient: defaultdict[str, set[Grant]] = defaultdict(set)
        self._by_session: dict[str, Grant] = {}
        # The fast lane's: what came as a cookie is not good as a token, nor the other way round.
        self.cookies: dict[bytes, Indexed] = {}
        self.tokens: dict[bytes, Indexed] = {}
        self._by_gateway: defaultdict[tuple[str, str], set[Grant]] = defaultdict(set)
        self._by_site: defaultdict[str, set[Grant]] = defaultdict(set)
        self._loads: WeakValueDictionary[str, Load] = WeakValueDictionary()
        self.generation = 0  # rises with each revocation: see `add`

    def __len__(self) -> int:
        return len(self._by_digest)

    def get(self, kind: SessionKind, digest: bytes, share_id: str) -> Grant | None:
        """The grant of this cookie or token *for this share*; None sends the request to the control plane."""
        grant = self._by_digest.get((kind, digest))
        if grant is None or grant.share.id != share_id or grant.stale:
            return None
        now = self._now()
        if grant.expired(now):
            self._end(grant, "expired")
            return None
        self.used(grant, now)
        return grant

    def used(self, grant: Grant, now: float) -> None:
        """The grant admits a request."""
        grant.last_used = now
        if self._touched is not None:
            self._touched(grant.session.id, now)

    def index(self, grant: Grant, entry: Indexed) -> None:
        """Find the grant by its secret as well, until it is dropped."""
        current = self._by_digest.get((grant.kind, grant.digest))
        if current is grant and grant.entry is None and not grant.stale:
            grant.entry = entry
            self._index_of(grant)[entry.secret] = entry

    def _index_of(self, grant: Grant) -> dict[bytes, Indexed]:
        return self.cookies if grant.kind is SessionKind.COOKIE else self.tokens

    def add(self, grant: Grant, generation: int) -> bool:
        """Put a grant in force. `generation` is the table's from *before* the store was asked: when something was
        revoked since, the answer may be stale, nothing is added and the caller asks again (returns False)."""
        if generation != self.generation:
            return False
        old = self._by_digest.get((grant.kind, grant.digest))
        if old is not None:
            grant.streams |= old.streams
            for stream in old.streams:
                stream.grant = grant
            old.streams = set()
            grant.tails |= old.tails
            for tail in grant.tails.values():
                tail.grant = grant
            old.tails = {}
            self._drop(old)
        grant.last_used = self._now()
        grant.load = self._loads.setdefault(grant.share.id, grant.load)
        self._by_digest[(grant.kind, grant.digest)] = grant
        self._add_to_share(grant)
        self._by_recipient[grant.recipient_id].add(grant)
        self._by_session[grant.session.id] = grant
        self._by_site[grant.site].add(grant)
        if grant.gateway is not None:
            self._by_gateway[(grant.site, grant.gateway)].add(grant)
        self._arm(grant)
        return True

    def _add_to_share(self, grant: Grant) -> None:
        others = self._by_share[grant.share.id]
        # The store makes a share anew each time, with all of its recipients: one is enough for all of its sessions.
        known = next((other.share for other in others), None)
        if known is not None and known == grant.share:
            grant.share = known
        others.add(grant)

    def move(self, grant: Grant, gateway: str) -> None:
        """Pin the session to another gateway of its site."""
        if grant.gateway is not None:
            self._discard(self._by_gateway, (grant.site, grant.gateway), grant)
        grant.gateway = gateway
        if grant.entry is not None:
            grant.entry.moved()
        if self._by_session.get(grant.session.id) is grant:
            self._by_gateway[(grant.site, gateway)].add(grant)

    def move_session(self, session_id: str, gateway: str) -> None:
        """Another worker has moved the session; nothing happens where there is no grant of it."""
        grant = self._by_session.get(session_id)
        if grant is not None and grant.gateway != gateway:
            self.move(grant, gateway)

    def session_ids(self, revocation: Revocation) -> list[str]:
        """The sessions that `revoke` would end."""
        return [grant.session.id for grant in self._matching(revocation)]

    def live(self) -> dict[str, dict[str, int]]:
        """By share: the streams of each session that has some, or was used in the last minute."""
        recent = self._now() - 60
        found: dict[str, dict[str, int]] = {}
        for grant in self._by_digest.values():
            if grant.streams or grant.last_used >= recent:
                found.setdefault(grant.share.id, {})[grant.session.id] = len(grant.streams)
        return found

    def is_live(self, grant: Grant) -> bool:
        """Whether this very grant is in force. A relay that awaited something asks before it opens a stream."""
        current = self._by_digest.get((grant.kind, grant.digest)) is grant
        return current and not grant.stale and not grant.expired(self._now())

    def renew(self, share: Share, sessions: Mapping[str, Session]) -> None:
        """The share changed, and nobody loses anything by it: what is open goes on, under the new name and until the
        new end. `sessions`: its live ones, by id."""
        self.generation += 1  # who is asking the store right now may have heard of the share as it was
        for grant in self._by_share.get(share.id, ()):
            if (session := sessions.get(grant.session.id)) is not None:
                grant.share, grant.session, grant.expires = share, session, Grant.end_of(share, session)
                self._disarm(grant)
                self._arm(grant)

    def outdate(self) -> list[Grant]:
        """Other plugins decide from now on: every session's next request makes its grant anew. What is open goes on
        under the old grants, which revocations still find. Returns those with something open: to be asked about."""
        self.generation += 1  # who is being admitted right now was asked about by the old ones
        for grant in self._by_digest.values():
            grant.stale = True
            self._forget_entry(grant)
        return [grant for grant in self._by_digest.values() if grant.streams]

    def revoke(self, revocation: Revocation) -> Revoked:
        """Drop what matches and end its streams, before returning."""
        start = time.perf_counter()
        self.generation += 1
        sessions = streams = 0
        for grant in self._matching(revocation):
            sessions += 1
            streams += self._end(grant, revocation.reason)
        return Revoked(sessions, streams, (time.perf_counter() - start) * 1000)

    def sessions(self, share_id: str) -> int:
        """Sessions of the share that have something open or were used in the last minute."""
        recent = self._now() - 60
        return sum(
            1 for grant in self._by_share.get(share_id, ()) if grant.streams or grant.last_used >= recent
        )

    def streams(self, share_id: str) -> int:
        return sum(len(grant.streams) for grant in self._by_share.get(share_id, ()))

    def session_streams(self, session_id: str) -> int:
        grant = self._by_session.get(session_id)
        return len(grant.streams) if grant is not None else 0

    @property
    def all_streams(self) -> int:
        return sum(len(grant.streams) for grant in self._by_digest.values())

    def sweep(self) -> int:
        """Drop grants that were idle for long; returns how many. What is open counts as use."""
        now = self._now()
        limit = now - IDLE_SECONDS
        for grant in self._by_digest.values():
            if grant.streams:
                self.used(grant, now)
        idle = [g for g in self._by_digest.values() if not g.streams and not g.tails and g.last_used < limit]
        for grant in idle:
            self._drop(grant)
        return len(idle)

    def end_all(self, reason: str, *, tails: bool = True) -> int:
        """Drop every grant and end its streams: the end of a drain, or nobody can say any more whom to admit. Returns
        how many streams. Without `tails`, what is complete here may still reach the visitors."""
        self.generation += 1
        return sum(self._end(grant, reason, tails=tails) for grant in list(self._by_digest.values()))

    # ── inner ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _matching(self, revocation: Revocation) -> list[Grant]:
        sets: list[Iterable[Grant]] = []
        if revocation.share_id is not None:
            sets.append(self._by_share.get(revocation.share_id, ()))
        if revocation.recipient_id is not None:
            sets.append(self._by_recipient.get(revocation.recipient_id, ()))
        if revocation.session_id is not None:
            grant = self._by_session.get(revocation.session_id)
            sets.append(() if grant is None else (grant,))
        if revocation.gateway is not None:
            sets.append(self._by_gateway.get(revocation.gateway, ()))
        if revocation.site is not None:
            sets.append(self._by_site.get(revocation.site, ()))
        if not sets:
            raise ValueError("a revocation that names nothing would end nothing, or everything")
        sets.sort(key=len)  # type: ignore[arg-type]
        return list(set(sets[0]).intersection(*sets[1:]))

    def _end(self, grant: Grant, reason: str, *, tails: bool = True) -> int:
        self._drop(grant)
        ended = list(grant.streams)
        grant.streams.clear()
        for stream in ended:
            stream.end(reason)
        cut = list(grant.tails.values()) if tails else []
        grant.tails.clear()
        return len(ended) + sum(tail.cut() for tail in cut)

    def _drop(self, grant: Grant) -> None:
        if self._by_digest.get((grant.kind, grant.digest)) is grant:
            del self._by_digest[(grant.kind, grant.digest)]
        self._forget_entry(grant)
        if self._by_session.get(grant.session.id) is grant:
            del self._by_session[grant.session.id]
        self._discard(self._by_share, grant.share.id, grant)
        self._discard(self._by_recipient, grant.recipient_id, grant)
        self._discard(self._by_site, grant.site, grant)
        if grant.gateway is not None:
            self._discard(self._by_gateway, (grant.site, grant.gateway), grant)
        self._disarm(grant)

    def _forget_entry(self, grant: Grant) -> None:
        if grant.entry is not None:
            grant.entry.dropped()
            self._index_of(grant).pop(grant.entry.secret, None)
            grant.entry = None

    @staticmethod
    def _disarm(grant: Grant) -> None:
        if grant._timer is not None:
            grant._timer.cancel()
            grant._timer = None

    @staticmethod
    def _discard(index: defaultdict[Key, set[Grant]], key: Key, grant: Grant) -> None:
        entry = index.get(key)
        if entry is not None:
            entry.discard(grant)
            if not entry:
                del index[key]

    def _arm(self, grant: Grant) -> None:
        if grant.expires is None:
            return
        delay = min(max(grant.expires - self._now(), 0.0), MAX_TIMER)
        grant._timer = asyncio.get_running_loop().call_later(delay, self._timer_fired, grant)

    def _timer_fired(self, grant: Grant) -> None:
        grant._timer = None
        if grant.expired(self._now()):
            self.generation += 1
            self._end(grant, "expired")
        else:
            self._arm(grant)
