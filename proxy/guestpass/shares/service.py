"""Shares and everything that hangs on them: the rules, in transactions.

Each method that changes something is one transaction: when it returns the change is on disk, when it raises nothing
was changed. Events are emitted after that, and never hold a link, token, path or query.

Revocation has an order that nothing may break: commit, then publish on the bus, then have the store's journal remember
it, then answer. Commit first, so that whoever rebuilds a grant after the publication reads a store that already
refuses; publish always, also when the share was deleted before, so that repeating a deletion that failed half-way
completes it. A caller who goes away in between (a closed connection cancels the API's handler) does not stop it: see
`_unstoppable`.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeVar

import orjson
from sqlalchemy.engine import Connection

from guestpass import tokens
from guestpass.addresses import canonical
from guestpass.errors import (
    Conflict,
    GuestpassError,
    Invalid,
    JoinTokenRejected,
    NotFound,
    ShareEnded,
    ShareNotFound,
    StoreError,
)
from guestpass.model import (
    Delivery,
    Event,
    Gateway,
    Recipient,
    Revocation,
    Revoked,
    Scope,
    Session,
    SessionKind,
    Share,
    ShareState,
)
from guestpass.plugin import Client
from guestpass.shares import rules
from guestpass.shares.bus import Bus
from guestpass.shares.invitation import invitation
from guestpass.shares.pages import DEFAULT_LIMIT, Page, check_limit, from_cursor, to_cursor
from guestpass.shares.proofs import Proofs
from guestpass.shares.storage import PluginStorage, encode
from guestpass.shares.store import Store, audit, entries, gateways, mail, sessions, shares
from guestpass.shares.store.journal import limits_of
from guestpass.shares.store.rows import AuditEntry, AuditFilter

log = logging.getLogger("guestpass.shares")

T = TypeVar("T")

# A browser stays signed in this long unless the authenticator says less; a working week and the weekend.
COOKIE_LIFETIME = 7 * 86400.0

# Each resend makes a link; the mails before stay good, within reason.
LINKS_KEPT = 10

# An answer to a request that came twice is repeated for a day, as Stripe does it.
IDEMPOTENCY_SECONDS = 86400.0
MAX_IDEMPOTENCY_KEY = 255

# A join token is typed or piped within minutes; it is as good as a key until then.
MAX_JOIN_TOKEN_SECONDS = 3600.0

# A hand-over code lives for one redirect.
MAX_HANDOVER_SECONDS = 60.0

# Where what is remembered of proofs is stored: no plugin has such a name.
PROOFS = "/proofs"

# When sessions and gateways were last seen is written this often, all together.
SEEN_SECONDS = 60.0

# Idle sessions that are looked at together.
MAX_IDLE = 1000

# Sessions and used join tokens stay in the owner's lists this long after their end.
KEPT_SECONDS = 30 * 86400.0

# What has expired is deleted this often.
SWEEP_SECONDS = 600.0

# A share list that a recipient can look through; older ones are found by their links.
MAX_SHARED_WITH = 200

# Longer secrets are none of ours, and not worth hashing.
MAX_SECRET = 128

KEY_BYTES = 32  # Ed25519


class Unset:
    """The type of UNSET: a value of an update that is to stay as it is."""


UNSET: Final = Unset()

NOTHING_REVOKED: Final = Revoked(sessions=0, streams=0, took_ms=0.0)


@dataclass(frozen=True, slots=True)
class NewShare:
    """What an owner asks for. `scope` empty: the whole service. `expires`: seconds since the epoch."""

    site: str
    service: str
    to: Sequence[str]
    name: str | None = None
    path: str = "/"
    scope: Sequence[Scope] = ()
    expires: float | None = None
    max_sessions: int | None = None
    message: str = ""
    owner: str | None = None
    invite: bool = True  # mail each recipient their link
    sign_in: Sequence[str] = ()  # names of the authenticators that it takes; empty: all


@dataclass(frozen=True, slots=True)
class CreatedShare:
    """`links` are secrets, by address: they cannot be read again, only made anew. `repeated`: the request had been
    answered before; the share is the one from then, the links are new ones for it (the old ones work as well)."""

    share: Share
    links: Mapping[str, str]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class UpdatedShare:
    """`links`: for recipients who were added. `revoked`: what the change ended."""

    share: Share
    links: Mapping[str, str] = field(default_factory=dict)
    revoked: Revoked = NOTHING_REVOKED


class ShareService:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        *,
        now: Callable[[], float],
        emit: Callable[[Event], None],
        public_url: str,
        share_origin: Callable[[str], str],
        default_owner: str,
        renew: Callable[[Share, Mapping[str, Session]], None] = lambda share, sessions: None,
        ways: Callable[[], Collection[str]] = lambda: (),
    ) -> None:
        """`renew(share, sessions)` is told of a change that takes nothing away: the live sessions by id. `ways` are the
        names of the authenticators among which visitors can choose."""
        self._store = store
        self._bus = bus
        self._now = now
        self._emit = emit
        self._public_url = public_url
        self.share_origin = share_origin
        self._default_owner = default_owner
        self._renew = renew
        self._ways = ways
        self._running: set[asyncio.Task[Any]] = set()
        self._sessions_seen: dict[str, float] = {}
        self._gateways_seen: dict[tuple[str, str], float] = {}
        self._seen_timer: asyncio.TimerHandle | None = None
        self._swept = 0.0
        self.proofs = Proofs(self.storage(PROOFS), now)

    async def close(self) -> None:
        """Finish what is under way and write what is held back. Before the store is closed."""
        if self._seen_timer is not None:
            self._seen_timer.cancel()
            self._seen_timer = None
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)
        await self._write_seen()

    # ── Shares ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def create(
        self, new: NewShare, *, idempotency_key: str | None = None, request: bytes | None = None
    ) -> CreatedShare:
        """Create a share, its links and, with `invite`, the mails that bring them: all or nothing.

        With an `idempotency_key` that was used in the last 24 hours nothing is created: the same request gets the
        same share again, with newly made links (links are stored as digests only, so the first ones cannot be
        repeated), another request raises Conflict. Requests are the same when `request`, the bytes as they came, is
        the same; without it, when `new` is.

        Raises Invalid, InvalidEmail, Conflict, StoreError.
        """
        now = self._now()
        share = self._share(new, now)
        fingerprint = hashlib.sha256(
            request if request is not None else orjson.dumps(asdict(new))
        ).hexdigest()
        remembered = None if idempotency_key is None else _idempotency(idempotency_key)

        def work(db: Connection) -> CreatedShare:
            if remembered is not None:
                before = entries.get(db, "idempotency", remembered, now)
                if before is not None:
                    return self._again(db, before, fingerprint, now)
                value = orjson.dumps({"request": fingerprint, "share": share.id})
                entries.put(db, "idempotency", remembered, value, now + IDEMPOTENCY_SECONDS)
            shares.insert(db, share)
            links = {
                recipient.email: self._link(db, share, recipient, now, invite=new.invite)
                for recipient in share.recipients
            }
            return CreatedShare(share, links)

        async def create() -> CreatedShare:
            created = await self._store.write(work)
            if not created.repeated:
                self._store.wake_courier()
                self._tell(
                    "share.created",
                    share.owner,
                    share,
                    site=share.site,
                    service=share.service,
                    recipients=len(share.recipients),
                    whole_service=not share.scope,
                )
                for recipient in share.recipients:
                    self._tell("recipient.added", share.owner, share, email=recipient.email)
            return created

        return await self._unstoppable(create())

    async def get(self, share_id: str) -> Share:
        """Any share, ended ones too. Raises ShareNotFound."""
        return _found(await self._store.read(lambda db: shares.get(db, share_id)), share_id)

    async def update(
        self,
        share_id: str,
        *,
        name: str | Unset = UNSET,
        message: str | Unset = UNSET,
        expires: float | Unset | None = UNSET,
        max_sessions: int | Unset | None = UNSET,
        path: str | Unset = UNSET,
        scope: Sequence[Scope] | Unset = UNSET,
        sign_in: Sequence[str] | Unset = UNSET,
        add: Sequence[str] = (),
        remove: Sequence[str] = (),
        invite: bool = True,
        by: str | None = None,
    ) -> UpdatedShare:
        """Change what is given. Who is removed is cut off at once; a change that takes something away (an earlier
        expiry, another scope, fewer sessions or ways to sign in) cuts off everybody, and who may still enter is let in
        again by what holds now. An expired share can be prolonged, a deleted one not. Adding who is there already does
        nothing.

        Raises ShareNotFound, ShareEnded (deleted), Invalid, InvalidEmail, NotFound (who is to be removed).
        """
        added, removed = rules.addresses(add), rules.addresses(remove)
        if both := set(added) & set(removed):
            raise Invalid(f"{min(both)} is both to be added and to be removed")
        now, seen = self._now(), dict(self._sessions_seen)
        wanted = {
            "name": name,
            "message": message,
            "path": path,
            "scope": scope,
            "expires": expires,
            "max_sessions": max_sessions,
            "sign_in": sign_in,
        }

        def work(
            db: Connection,
        ) -> tuple[Share, Share, dict[str, str], builtins.list[Recipient], int, dict[str, Session]]:
            before = _found(shares.get(db, share_id), share_id)
            if before.deleted is not None:
                raise _ended(before)
            changed = self._changed(before, wanted, now)
            gone = [self._recipient(changed, email) for email in removed]
            ended = sum(self._remove(db, recipient, now, seen) for recipient in gone)
            new = [email for email in added if changed.recipient(email) is None]
            staying = sum(r.removed is None for r in changed.recipients) - len(gone)
            if staying + len(new) > rules.MAX_RECIPIENTS:
                raise Invalid(f"a share has at most {rules.MAX_RECIPIENTS} recipients")
            if new and changed.state(now) is not ShareState.ACTIVE:
                raise _ended(changed)
            shares.update(db, changed)
            links = {}
            for email in new:
                recipient = _recipient(share_id, email, invite)
                shares.insert_recipient(db, recipient)
                links[email] = self._link(db, changed, recipient, now, invite=invite)
            after = _found(shares.get(db, share_id), share_id)
            live = sessions.page(db, share_id=share_id, live_at=now, after=None, limit=None)
            return before, after, links, gone, ended, {s.id: _within(s, after) for s in live}

        async def change() -> UpdatedShare:
            before, after, links, gone, ended, live = await self._store.write(work, revoking=True)
            self._store.wake_courier()
            revocations = [
                Revocation("recipient_removed", share_id=share_id, recipient_id=r.id) for r in gone
            ]
            if _narrower(before, after):
                revocations.append(Revocation("share_updated", share_id=share_id))
            else:
                self._renew(after, live)
            revoked = await self._publish(revocations, ended, limits_of(after))
            actor = before.owner if by is None else by
            if different := [f for f in wanted if getattr(before, f) != getattr(after, f)]:
                self._tell("share.updated", actor, after, changed=" ".join(different))
            for recipient in gone:
                self._tell("recipient.removed", actor, after, email=recipient.email)
            for email in links:
                self._tell("recipient.added", actor, after, email=email)
            return UpdatedShare(after, links, revoked)

        return await self._unstoppable(change())

    async def delete(self, share_id: str, *, by: str | None = None) -> Revoked:
        """End a share: links, sessions, live streams, mail that waits. Returns after the last stream is closed.

        `sessions` counts the sessions that somebody had used, whether they had something open or not. Deleting again
        changes nothing and counts nothing. Raises ShareNotFound, StoreError.
        """
        now, seen = self._now(), dict(self._sessions_seen)

        def work(db: Connection) -> tuple[Share, int]:
            share = _found(shares.get(db, share_id), share_id)
            sessions.seen(db, seen)
            ended = sessions.end(db, now, "deleted", share_id=share_id)
            shares.delete(db, share_id, now)
            mail.cancel(db, share_id)
            return share, ended

        async def end() -> Revoked:
            share, ended = await self._store.write(work, revoking=True)
            revoked = await self._publish([Revocation("deleted", share_id=share_id)], ended)
            if share.deleted is None:
                actor = share.owner if by is None else by
                self._tell("share.deleted", actor, share, sessions=revoked.sessions, streams=revoked.streams)
            return revoked

        return await self._timed(self._unstoppable(end()))

    async def remove_recipient(self, share_id: str, email: str, by: str | None = None) -> Revoked:
        """Raises ShareNotFound, NotFound, InvalidEmail."""
        address = canonical(email)
        now, seen = self._now(), dict(self._sessions_seen)

        def work(db: Connection) -> tuple[Share, Recipient, int]:
            share = _found(shares.get(db, share_id), share_id)
            recipient = self._recipient(share, address)
            return share, recipient, self._remove(db, recipient, now, seen)

        async def remove() -> Revoked:
            share, recipient, ended = await self._store.write(work, revoking=True)
            revoked = await self._publish(
                [Revocation("recipient_removed", share_id=share_id, recipient_id=recipient.id)], ended
            )
            self._tell("recipient.removed", share.owner if by is None else by, share, email=address)
            return revoked

        return await self._timed(self._unstoppable(remove()))

    async def resend(self, share_id: str, email: str) -> str:
        """Mail the invitation again, with a new link, which is returned; the links before it stay good.

        Raises ShareNotFound, ShareEnded, NotFound, InvalidEmail.
        """
        return await self._new_link(share_id, email, invite=True)

    async def new_link(self, share_id: str, email: str) -> str:
        """A further link for a recipient, without mail. Raises as `resend` does."""
        return await self._new_link(share_id, email, invite=False)

    async def resolve_link(self, secret: str) -> tuple[Share, Recipient]:
        """Whose link this is. Raises ShareNotFound, ShareEnded (for everybody, or for this recipient)."""
        found = None
        if 0 < len(secret) <= MAX_SECRET and secret.isascii():
            digest = tokens.digest(secret)
            found = await self._store.read(lambda db: shares.by_link(db, digest))
        if found is None:
            raise ShareNotFound("there is no such link", hint="Check that the link was copied as a whole.")
        share, recipient = found
        if share.state(self._now()) is not ShareState.ACTIVE or recipient.removed is not None:
            raise _ended(share)
        return share, recipient

    async def shared_with(self, email: str) -> builtins.list[Share]:
        """Active shares of this recipient, newest first. `email` is canonical."""
        now = self._now()
        return await self._store.read(lambda db: shares.shared_with(db, email, now, MAX_SHARED_WITH))

    async def list(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT, include_ended: bool = False
    ) -> Page[Share]:
        """Newest first. Raises Invalid (cursor, limit)."""
        check_limit(limit)
        after = None if cursor is None else from_cursor(cursor, float, str)
        active_at = None if include_ended else self._now()
        found = await self._store.read(
            lambda db: shares.page(db, after=_position(after), limit=limit + 1, active_at=active_at)
        )
        return _page(found, limit, lambda share: to_cursor(share.created, share.id))

    # ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def open_session(
        self,
        share_id: str,
        email: str,
        kind: SessionKind,
        provider: str,
        client: Client,
        expires: float | None = None,
    ) -> tuple[Session, str]:
        """A session and its secret: what the cookie, or the bearer token, holds. Marks the recipient as having opened
        the share. Without `expires` a cookie's session lasts COOKIE_LIFETIME, a token's as long as the share; no
        session outlives its share.

        Raises ShareNotFound, ShareEnded, NotFound (not a recipient).
        """
        now = self._now()
        secret = tokens.new_secret(tokens.BEARER_PREFIX if kind is SessionKind.TOKEN else "")
        if expires is None and kind is SessionKind.COOKIE:
            expires = now + COOKIE_LIFETIME
        described = rules.one_line(f"{client.address} {client.user_agent}", 250)
        opened = kind is SessionKind.COOKIE

        def work(db: Connection) -> tuple[Session, Share]:
            share = _active(shares.get(db, share_id), share_id, now)
            recipient = self._recipient(share, email)
            session = Session(
                id=tokens.new_id(),
                share_id=share_id,
                recipient_id=recipient.id,
                email=email,
                kind=kind,
                provider=provider,
                created=now,
                last_seen=now,
                expires=expires,
                client=described,
            )
            sessions.insert(db, session, tokens.digest(secret))
            if opened:
                shares.opened(db, recipient.id, now)
            return _within(session, share), share

        async def open_() -> Session:
            session, share = await self._store.write(work)
            self._tell(
                "share.opened" if opened else "token.created",
                email if opened else share.owner,
                share,
                session.id,
                email=email,
                provider=provider,
                address=client.address,
            )
            return session

        return await self._unstoppable(open_()), secret

    async def create_token(
        self, share_id: str, email: str, expires: float | None = None
    ) -> tuple[Session, str]:
        """A bearer token for a recipient's scripts. Raises as `open_session` does, and Invalid for a past expiry."""
        address = canonical(email)
        if expires is not None and not expires > self._now():
            raise Invalid("the token would expire in the past", hint="Choose a later time.")
        return await self.open_session(
            share_id, address, SessionKind.TOKEN, "bearer-token", Client(address=""), expires
        )

    async def find_session(
        self, kind: SessionKind, secret_digest: bytes
    ) -> tuple[Session, Share, Recipient] | None:
        """The live session with this secret; None when there is none, or it ended or expired on its own.

        Raises ShareEnded when its share ended, or its recipient was removed: whoever holds the secret was a guest.
        """
        now = self._now()

        def work(db: sqlite3.Connection) -> tuple[Session, Share] | None:
            session = sessions.by_secret(db, kind, secret_digest)
            share = None if session is None else shares.find(db, session.share_id)
            return None if session is None or share is None else (session, share)

        found = await self._store.find(work)
        if found is None:
            return None
        session, share = found
        recipient = next((r for r in share.recipients if r.id == session.recipient_id), None)
        if recipient is None or recipient.removed is not None or share.state(now) is not ShareState.ACTIVE:
            raise _ended(share)
        if session.ended is not None or (session.expires is not None and session.expires <= now):
            return None
        return self._as_seen(_within(session, share)), share, recipient

    async def get_session(self, session_id: str) -> Session:
        """Any session, ended ones too. Raises NotFound."""
        return self._as_seen(
            _found_session(await self._store.read(lambda db: sessions.get(db, session_id)), session_id)
        )

    async def sessions(self, share_id: str | None = None, *, live: bool = True) -> builtins.list[Session]:
        """All of them, newest first; with `live`, only those that can still be used."""
        live_at = self._now() if live else None
        found = await self._store.read(
            lambda db: sessions.page(db, share_id=share_id, live_at=live_at, after=None, limit=None)
        )
        return [self._as_seen(session) for session in found]

    async def list_sessions(
        self,
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        share_id: str | None = None,
        live: bool = True,
    ) -> Page[Session]:
        """`sessions`, page by page. Raises Invalid (cursor, limit)."""
        check_limit(limit)
        after = None if cursor is None else from_cursor(cursor, float, str)
        live_at = self._now() if live else None
        found = await self._store.read(
            lambda db: sessions.page(
                db, share_id=share_id, live_at=live_at, after=_position(after), limit=limit + 1
            )
        )
        return _page(
            [self._as_seen(session) for session in found],
            limit,
            lambda session: to_cursor(session.created, session.id),
        )

    async def end_session(
        self, session_id: str, reason: str = "session_ended", *, by: str | None = None
    ) -> Revoked:
        """Raises NotFound. Ending again changes nothing and counts nothing."""
        now, seen = self._now(), dict(self._sessions_seen)

        def work(db: Connection) -> tuple[Session, int]:
            session = _found_session(sessions.get(db, session_id), session_id)
            sessions.seen(db, seen)
            return session, sessions.end(db, now, reason, session_id=session_id)

        async def end() -> Revoked:
            session, ended = await self._store.write(work, revoking=True)
            revoked = await self._publish(
                [Revocation(reason, share_id=session.share_id, session_id=session_id)], ended
            )
            if session.ended is None:
                self._emit(
                    Event(
                        "session.ended",
                        now,
                        session.email if by is None else by,
                        session.share_id,
                        session_id,
                        {"reason": reason, "email": session.email},
                    )
                )
            return revoked

        return await self._timed(self._unstoppable(end()))

    async def end_signed_in_by(self, provider: str, reason: str) -> int:
        """End every live session that rests on this authenticator; returns how many."""
        now = self._now()
        found = await self._store.read(lambda db: sessions.signed_in_by(db, provider, now))
        for session_id in found:
            await self.end_session(session_id, reason)
        return len(found)

    async def idle_sessions(self, before: float, *, tokens: bool = False) -> builtins.list[Session]:
        """Live browser sessions that were last used before, the longest ago first; at most MAX_IDLE. With `tokens`,
        those of bearer tokens are among them."""
        now, kinds = self._now(), tuple(SessionKind) if tokens else (SessionKind.COOKIE,)
        found = await self._store.read(lambda db: sessions.idle(db, now, before, kinds, MAX_IDLE))
        return [session for session in map(self._as_seen, found) if session.last_seen < before]

    async def sign_out(self, email: str, reason: str, *, tokens: bool = False) -> int:
        """End all browser sessions of a canonical address and void its proofs; with `tokens`, its bearer tokens too.
        Returns how many sessions ended."""
        await self.proofs.void(email)
        now = self._now()
        found = await self._store.read(lambda db: sessions.of_address(db, now, email))
        mine = [s for s in found if tokens or s.kind is SessionKind.COOKIE]
        for session in mine:
            await self.end_session(session.id, reason)
        return len(mine)

    def touch(self, session_id: str, at: float) -> None:
        """The session was used. Written with all others every SEEN_SECONDS; lists know it at once."""
        self._sessions_seen[session_id] = at
        self._arm_seen()

    # ── Gateways ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def create_join_token(self, site: str, ttl: float = MAX_JOIN_TOKEN_SECONDS) -> str:
        """A single-use secret with which one gateway enrols for `site`. Raises Invalid."""
        rules.site(site)
        if not 0 < ttl <= MAX_JOIN_TOKEN_SECONDS:
            raise Invalid(f"a join token lives at most {MAX_JOIN_TOKEN_SECONDS:.0f} seconds")
        secret, now = tokens.new_secret(tokens.JOIN_PREFIX), self._now()
        digest = tokens.digest(secret)
        await self._store.write(lambda db: gateways.insert_join_token(db, digest, site, now, now + ttl))
        self._emit(Event("join_token.created", now, detail={"site": site}))
        return secret

    async def enroll(self, join_token: str, name: str, public_key: bytes) -> Gateway:
        """Enrol a gateway: its name is bound to its Ed25519 key from now on. A gateway whose answer was lost asks
        again with the same token, name and key and gets the same answer.

        Raises JoinTokenRejected, Conflict (the name has another key, or the key another name; the token stays good),
        Invalid.
        """
        rules.gateway(name)
        if len(public_key) != KEY_BYTES:
            raise Invalid(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
        now, digest = self._now(), tokens.digest(join_token[:MAX_SECRET])

        def work(db: Connection) -> tuple[Gateway, bool]:
            token = gateways.join_token(db, digest)
            if token is None or token.expires <= now:
                raise _rejected("is unknown or has expired")
            gateway = gateways.get(db, token.site, name)
            same = gateway is not None and gateway.public_key == public_key
            if token.used_key is not None:
                if gateway is None or not same or token.used_key != public_key or token.used_name != name:
                    raise _rejected("has been used")
                return gateway, False
            if gateway is not None and not same:
                raise Conflict(
                    f"the site {token.site} has a gateway {name} with another key",
                    hint=f"Choose another name, or remove the old one first: guestpass gateway remove {name}",
                    code="gateway_exists",
                )
            other = gateways.by_key(db, public_key)
            if gateway is None and other is not None:
                raise Conflict(
                    f"this key belongs to the gateway {other.site}/{other.name}",
                    hint="Give each gateway a key file of its own.",
                    code="gateway_key_exists",
                )
            gateways.use_join_token(db, digest, name, public_key)
            if gateway is None:
                gateway = Gateway(token.site, name, public_key, enrolled=now)
                gateways.insert(db, gateway)
                return gateway, True
            return gateway, False

        async def enroll() -> Gateway:
            gateway, is_new = await self._store.write(work)
            if is_new:
                self._emit(Event("gateway.enrolled", now, f"{gateway.site}/{gateway.name}"))
            return gateway

        return await self._unstoppable(enroll())

    async def remove_gateway(self, site: str | None, name: str) -> Revoked:
        """Forget a gateway and its key, and end its tunnels; sessions move to another of its site, or wait for one.

        Without `site`, the only gateway of that name. Raises NotFound, Conflict (several).
        """
        now = self._now()

        def work(db: Connection) -> Gateway:
            found = [g for g in gateways.listed(db, name) if site is None or g.site == site]
            if not found:
                which = name if site is None else f"{site}/{name}"
                raise NotFound(
                    f"there is no gateway {which}",
                    hint="See: guestpass gateway list",
                    code="gateway_not_found",
                )
            if len(found) > 1:
                sites = ", ".join(g.site for g in found)
                raise Conflict(f"several sites have a gateway {name}: {sites}", hint="Name it as SITE/NAME.")
            gateways.delete(db, found[0].site, name)
            return found[0]

        async def remove() -> Revoked:
            gateway = await self._store.write(work, revoking=True)
            self._gateways_seen.pop((gateway.site, gateway.name), None)
            revoked = await self._publish(
                [Revocation("gateway_removed", gateway=(gateway.site, gateway.name))]
            )
            self._emit(Event("gateway.removed", now, f"{gateway.site}/{gateway.name}"))
            return revoked

        return await self._timed(self._unstoppable(remove()))

    async def find_gateway(self, site: str, name: str) -> Gateway | None:
        found = await self._store.read(lambda db: gateways.get(db, site, name))
        return None if found is None else self._gateway_as_seen(found)

    async def list_gateways(self) -> builtins.list[Gateway]:
        """By site and name."""
        return [self._gateway_as_seen(g) for g in await self._store.read(gateways.listed)]

    def seen(self, site: str, name: str, at: float | None = None) -> None:
        """The gateway is connected. Written with all others every SEEN_SECONDS; lists know it at once."""
        self._gateways_seen[site, name] = self._now() if at is None else at
        self._arm_seen()

    # ── Audit ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def record(self, event: Event) -> None:
        """Keep an event in the audit."""
        await self._store.write(lambda db: audit.insert(db, event))

    async def audit(
        self,
        which: AuditFilter = AuditFilter(),  # noqa: B008 - frozen
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
    ) -> Page[AuditEntry]:
        """Newest first. Raises Invalid (cursor, limit)."""
        check_limit(limit)
        before = None if cursor is None else from_cursor(cursor, int)[0]
        found = await self._store.read(lambda db: audit.page(db, which, before=before, limit=limit + 1))
        return _page(found, limit, lambda entry: to_cursor(entry.id))

    # ── What lives briefly: sign-in flows, hand-over codes ───────────────────────────────────────────────────────

    async def create_flow(self, data: Mapping[str, Any], ttl: float) -> str:
        """Keep the state of a sign-in; returns its id, which is as good as the sign-in. Raises Invalid (> 64 KiB)."""
        return await self._put_secret("flow", data, ttl)

    async def get_flow(self, flow_id: str) -> dict[str, Any] | None:
        key, now = _key(flow_id), self._now()
        found: dict[str, Any] | None = await self._store.read(lambda db: entries.get(db, "flow", key, now))
        return found

    async def update_flow(self, flow_id: str, data: Mapping[str, Any]) -> bool:
        """New data, old expiry. False when the flow has ended."""
        key, now, encoded = _key(flow_id), self._now(), encode(dict(data), "the state of a sign-in")
        return await self._store.write(lambda db: entries.replace(db, "flow", key, encoded, now))

    async def end_flow(self, flow_id: str) -> bool:
        """Whether it was there: of several callers one is told so."""
        key, now = _key(flow_id), self._now()
        return await self._store.write(lambda db: entries.delete(db, "flow", key, now))

    async def create_handover(self, data: Mapping[str, Any], ttl: float = MAX_HANDOVER_SECONDS) -> str:
        """A single-use code for `data`, good for at most MAX_HANDOVER_SECONDS."""
        return await self._put_secret("handover", data, min(ttl, MAX_HANDOVER_SECONDS))

    async def take_handover(self, code: str) -> dict[str, Any] | None:
        """The data, once: of several callers one gets it."""
        key, now = _key(code), self._now()
        taken = await self._store.write(lambda db: entries.take(db, "handover", key, now))
        return None if taken is None else orjson.loads(taken)

    def storage(self, plugin: str) -> PluginStorage:
        """Key-value storage of one plugin."""
        return PluginStorage(self._store, plugin, self._now)

    async def sweep(self) -> None:
        """Delete what has expired, if the last time is SWEEP_SECONDS ago. Call it now and then. Raises StoreError."""
        now = self._now()
        if 0 <= now - self._swept < SWEEP_SECONDS:
            return

        def work(db: Connection) -> None:
            entries.forget(db, now)
            sessions.forget(db, now - KEPT_SECONDS)
            gateways.forget_join_tokens(db, now - KEPT_SECONDS)

        await self._store.write(work)
        self._swept = now

    # ── Inside transactions (in the store's thread) ──────────────────────────────────────────────────────────────

    def _link(self, db: Connection, share: Share, recipient: Recipient, now: float, *, invite: bool) -> str:
        secret = tokens.new_secret()
        shares.add_link(db, tokens.digest(secret), recipient.id, now, LINKS_KEPT)
        link = f"{self._public_url}/s/{secret}"
        if invite:
            mail.insert(db, invitation(share, recipient, link), now)
        return link

    def _again(self, db: Connection, before: Mapping[str, str], request: str, now: float) -> CreatedShare:
        if before["request"] != request:
            raise Conflict(
                "this Idempotency-Key was used for another request",
                hint="Use a new key for each share, and the same one only to repeat a request.",
                code="idempotency_key_reused",
            )
        share = _found(shares.get(db, before["share"]), before["share"])
        links = {}
        if share.state(now) is ShareState.ACTIVE:
            here = (recipient for recipient in share.recipients if recipient.removed is None)
            links = {r.email: self._link(db, share, r, now, invite=False) for r in here}
        return CreatedShare(share, links, repeated=True)

    def _remove(self, db: Connection, recipient: Recipient, now: float, seen: Mapping[str, float]) -> int:
        """Returns how many sessions ended. `seen`: a token counts once it was used."""
        shares.remove_recipient(db, recipient.id, now)
        mail.cancel(db, recipient.share_id, recipient.id)
        sessions.seen(db, seen)
        return sessions.end(db, now, "recipient_removed", recipient_id=recipient.id)

    def _recipient(self, share: Share, email: str) -> Recipient:
        recipient = share.recipient(email)
        if recipient is None:
            raise NotFound(
                f"{email} is not a recipient of the share {share.id}",
                hint=f"See: guestpass share show {share.id}",
                code="recipient_not_found",
            )
        return recipient

    # ── Helpers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _share(self, new: NewShare, now: float) -> Share:
        share_id, scope = tokens.new_id(), rules.rules(new.scope)
        site, service, path = rules.site(new.site), rules.service(new.service), rules.landing(new.path, scope)
        to = rules.addresses(new.to)
        if not to:
            raise Invalid("a share needs a recipient", hint="Name at least one email address.")
        return Share(
            id=share_id,
            name=rules.default_name(service, path) if new.name is None else rules.name(new.name),
            site=site,
            service=service,
            path=path,
            scope=scope,
            owner=rules.owner(self._default_owner if new.owner is None else new.owner),
            message=rules.message(new.message),
            created=now,
            expires=rules.expiry(new.expires, now),
            max_sessions=rules.max_sessions(new.max_sessions),
            sign_in=rules.sign_in(new.sign_in, self._ways()),
            recipients=tuple(_recipient(share_id, email, new.invite) for email in to),
        )

    def _changed(self, share: Share, wanted: Mapping[str, Any], now: float) -> Share:
        """The share with what is wanted of its fields, as far as that is not UNSET. Raises Invalid."""
        accept: Mapping[str, Callable[[Any], Any]] = {
            "name": rules.name,
            "message": rules.message,
            "expires": lambda at: rules.expiry(at, now),
            "max_sessions": rules.max_sessions,
            "sign_in": lambda names: rules.sign_in(names, self._ways()),
            "scope": rules.rules,
        }
        given = {field: value for field, value in wanted.items() if not isinstance(value, Unset)}
        changed = replace(share, **{f: rule(given[f]) for f, rule in accept.items() if f in given})
        if "path" in given or "scope" in given:
            changed = replace(changed, path=rules.landing(given.get("path", share.path), changed.scope))
        return changed

    async def _new_link(self, share_id: str, email: str, *, invite: bool) -> str:
        address, now = canonical(email), self._now()

        def work(db: Connection) -> tuple[Share, str]:
            share = _active(shares.get(db, share_id), share_id, now)
            recipient = self._recipient(share, address)
            if invite:
                # One invitation at a time: what waits is out of date.
                mail.cancel(db, share_id, recipient.id)
                shares.set_delivery(db, recipient.id, Delivery.QUEUED, "")
            return share, self._link(db, share, recipient, now, invite=invite)

        async def make() -> str:
            share, link = await self._store.write(work)
            if invite:
                self._store.wake_courier()
            self._tell("link.created", share.owner, share, email=address, mailed=invite)
            return link

        return await self._unstoppable(make())

    async def _put_secret(self, namespace: str, data: Mapping[str, Any], ttl: float) -> str:
        secret, expires, encoded = tokens.new_secret(), self._now() + ttl, encode(dict(data), namespace)
        await self._store.write(lambda db: entries.put(db, namespace, _key(secret), encoded, expires))
        return secret

    async def _publish(
        self,
        revocations: Sequence[Revocation],
        ended: int = 0,
        limits: Mapping[str, Any] | None = None,
    ) -> Revoked:
        """`ended`: how many sessions ended in the store; not each of them had a grant. `limits`: of a share that was
        narrowed."""
        done: builtins.list[Revoked] = []
        failure: GuestpassError | None = None
        for revocation in revocations:
            try:
                done.append(await self._bus.publish(revocation))
            except GuestpassError as exc:
                failure = exc
        if revocations:
            await self._store.remember(revocations, self._now(), limits)
        if failure is not None:
            raise failure
        return Revoked(
            sessions=max(ended, sum(d.sessions for d in done)),
            streams=sum(d.streams for d in done),
            took_ms=sum(d.took_ms for d in done),
        )

    async def _timed(self, work: Coroutine[Any, Any, Revoked]) -> Revoked:
        """With the time that all of it took, the disk included."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        revoked = await work
        return replace(revoked, took_ms=(loop.time() - started) * 1000)

    async def _unstoppable(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end even when the caller is cancelled: a deletion that is on disk must be published."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    def _tell(
        self, type_: str, actor: str, share: Share, session_id: str | None = None, **detail: str | int | bool
    ) -> None:
        self._emit(Event(type_, self._now(), actor, share.id, session_id, detail))

    # ── When sessions and gateways were last seen ────────────────────────────────────────────────────────────────

    def _arm_seen(self) -> None:
        if self._seen_timer is None:
            self._seen_timer = asyncio.get_running_loop().call_later(SEEN_SECONDS, self._seen_due)

    def _seen_due(self) -> None:
        self._seen_timer = None
        task = asyncio.get_running_loop().create_task(self._write_seen())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _write_seen(self) -> None:
        if not self._sessions_seen and not self._gateways_seen:
            return
        of_sessions, of_gateways = dict(self._sessions_seen), dict(self._gateways_seen)

        def work(db: Connection) -> None:
            sessions.seen(db, of_sessions)
            gateways.seen(db, of_gateways)

        try:
            await self._store.write(work)
        except StoreError as exc:
            log.warning("when sessions were last seen is not written: %s", exc)
            return
        for session_id, at in of_sessions.items():
            if self._sessions_seen.get(session_id) == at:
                del self._sessions_seen[session_id]
        for gateway, at in of_gateways.items():
            if self._gateways_seen.get(gateway) == at:
                del self._gateways_seen[gateway]

    def _as_seen(self, session: Session) -> Session:
        seen = self._sessions_seen.get(session.id, 0.0)
        return session if seen <= session.last_seen else replace(session, last_seen=seen)

    def _gateway_as_seen(self, gateway: Gateway) -> Gateway:
        return replace(
            gateway, last_seen=self._gateways_seen.get((gateway.site, gateway.name), gateway.last_seen)
        )


def _recipient(share_id: str, email: str, invite: bool) -> Recipient:
    return Recipient(tokens.new_id(), share_id, email, delivery=Delivery.QUEUED if invite else None)


def _found(share: Share | None, share_id: str) -> Share:
    if share is None:
        raise ShareNotFound(
            f"there is no share {rules.one_line(share_id, 64)}", hint="See: guestpass share list"
        )
    return share


def _active(share: Share | None, share_id: str, now: float) -> Share:
    share = _found(share, share_id)
    if share.state(now) is not ShareState.ACTIVE:
        raise _ended(share)
    return share


def _ended(share: Share) -> ShareEnded:
    return ShareEnded(f"the share {share.id} has ended", hint="Create a new share.")


def _found_session(session: Session | None, session_id: str) -> Session:
    if session is None:
        raise NotFound(f"there is no session {rules.one_line(session_id, 64)}", code="session_not_found")
    return session


def _rejected(why: str) -> JoinTokenRejected:
    return JoinTokenRejected(
        f"the join token {why}", hint="Make a new one at the edge: guestpass gateway token --site SITE"
    )


def _within(session: Session, share: Share) -> Session:
    """No session outlives its share. Computed when read: a share's expiry may move."""
    if share.expires is None or (session.expires is not None and session.expires <= share.expires):
        return session
    return replace(session, expires=share.expires)


def _narrower(before: Share, after: Share) -> bool:
    """Whether somebody who is in might not be admitted any more."""
    earlier = after.expires is not None and (before.expires is None or after.expires < before.expires)
    fewer = after.max_sessions is not None and (
        before.max_sessions is None or after.max_sessions < before.max_sessions
    )
    other_ways = bool(after.sign_in) and not (before.sign_in and set(before.sign_in) <= set(after.sign_in))
    return earlier or fewer or other_ways or before.scope != after.scope


def _idempotency(key: str) -> str:
    if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY or not key.isprintable():
        raise Invalid(f"an Idempotency-Key has 1 to {MAX_IDEMPOTENCY_KEY} printable characters")
    return _key(key)


def _key(secret: str) -> str:
    """Under what a secret's entry is kept."""
    return tokens.digest(secret).hex()


def _position(after: tuple[Any, ...] | None) -> tuple[float, str] | None:
    return None if after is None else (after[0], after[1])


def _page(found: Sequence[T], limit: int, cursor: Callable[[T], str]) -> Page[T]:
    """`found` has one more than `limit` when there is a page after this one."""
    items = list(found[:limit])
    return Page(items, cursor(items[-1]) if len(found) > limit else None)
