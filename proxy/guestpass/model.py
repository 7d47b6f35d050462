"""Frozen domain types, in the words of docs/architecture.md. No I/O, nothing of ours imported but errors.

Times are seconds since the epoch (float, UTC) everywhere; only the API and pages turn them into RFC 3339 text.
Email addresses are canonical (see `guestpass.addresses.canonical`) wherever a field is called `email`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Delivery(StrEnum):
    """What became of a mail, as the owner sees it."""

    QUEUED = "queued"
    SENT = "sent"
    BOUNCED = "bounced"  # refused for good by the server that should take it
    FAILED = "failed"  # given up after the last retry


class SessionKind(StrEnum):
    """How a session proves itself: a browser's cookie, or a script's bearer token."""

    COOKIE = "cookie"
    TOKEN = "token"


class ShareState(StrEnum):
    ACTIVE = "active"
    EXPIRED = "expired"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Scope:
    """One rule of what a share admits: `GET /x/**`. `*` as method is any; `**` matches any rest, `*` one segment."""

    method: str
    path: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class Recipient:
    id: str
    share_id: str
    email: str
    delivery: Delivery | None = None  # None: no invitation was to be sent
    delivery_detail: str = ""  # what the mail server said, for the owner
    first_opened: float | None = None
    last_opened: float | None = None
    removed: float | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """An owner's permission for recipients to open `path` of `site`/`service`."""

    id: str  # stands in the host name of its origin; not a secret
    name: str
    site: str
    service: str
    path: str  # where recipients land, starts with "/"
    scope: tuple[Scope, ...]  # empty: the whole service
    owner: str
    message: str
    created: float
    expires: float | None
    max_sessions: int | None
    deleted: float | None = None
    recipients: tuple[Recipient, ...] = ()
    sign_in: tuple[str, ...] = ()  # names of the authenticators that it takes; empty: all that there are

    def takes(self, authenticator: str) -> bool:
        """Whether one may sign in to this share by this authenticator."""
        return not self.sign_in or authenticator in self.sign_in

    def state(self, now: float) -> ShareState:
        """Whether it is active, expired or deleted at `now`."""
        if self.deleted is not None:
            return ShareState.DELETED
        if self.expires is not None and self.expires <= now:
            return ShareState.EXPIRED
        return ShareState.ACTIVE

    def recipient(self, email: str) -> Recipient | None:
        """The recipient with this canonical address, unless removed."""
        return next((r for r in self.recipients if r.email == email and r.removed is None), None)


@dataclass(frozen=True, slots=True)
class Identity:
    """Someone whose email address is proven."""

    email: str
    provider: str  # name of the authenticator in the configuration
    subject: str = ""  # the provider's own stable id of the person
    proven: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """One identity admitted to one share in one browser or client. The secret itself is stored nowhere."""

    id: str
    share_id: str
    recipient_id: str
    email: str
    kind: SessionKind
    provider: str
    created: float
    last_seen: float
    expires: float | None
    client: str  # address and user agent, for the owner's list
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class Gateway:
    """An enrolled gateway. Its name is unique in its site and bound to its key."""

    site: str
    name: str
    public_key: bytes  # Ed25519, 32 bytes
    enrolled: float
    last_seen: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A connected gateway, as a BackendChooser sees it."""

    site: str
    name: str
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    streams: int = 0  # live streams of this edge on it
    rtt: float | None = None  # seconds
    healthy: bool = True  # the service that is asked for


@dataclass(frozen=True, slots=True)
class Revocation:
    """Ends every session that matches all the fields that are set (at least one)."""

    reason: str  # "deleted", "expired", "recipient_removed", "session_ended", "gateway_removed", …
    share_id: str | None = None
    recipient_id: str | None = None
    session_id: str | None = None
    gateway: tuple[str, str] | None = None  # (site, name)
    site: str | None = None
    error_id: str | None = None  # set when a Revoker failed and so denied: what stands in the log


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a revocation ended."""

    sessions: int
    streams: int
    took_ms: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for observers and the audit. `detail` holds no link, token, code, path or query."""

    type: str  # "share.created", "share.opened", "share.deleted", "signin.denied", "gateway.connected", …
    at: float
    actor: str = ""  # owner, recipient's email, gateway "site/name"
    share_id: str | None = None
    session_id: str | None = None
    detail: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
