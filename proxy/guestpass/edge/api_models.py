"""What the management API takes and gives. The OpenAPI document is made from these, so that it cannot lie.

Bodies are strict: an unknown key is an error, a number in quotes is not a number. Times are RFC 3339 in UTC on the
way out; on the way in a duration counted from now (`90s`, `15m`, `12h`, `7d`) is as good.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Body(BaseModel):
    """Base of what comes as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Query(BaseModel):
    """Base of what comes as a query string: everything is text and is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CreateShare(Body):
    site: str
    service: str
    to: list[str] = Field(description="email addresses")
    name: str | None = Field(None, description="default: SERVICE PATH")
    path: str | None = Field(None, description="where recipients land; default: /")
    scope: list[str] = Field([], description="rules like 'GET /x/**'; none: the whole service")
    expires: str | None = Field(None, description="a duration or an RFC 3339 time; none: never")
    max_sessions: int | None = None
    message: str | None = Field(None, description="a note in the invitation")
    owner: str | None = Field(None, description="who shares, as recipients read it")
    invite: bool = Field(True, description="mail each recipient their link")
    sign_in: list[str] = Field([], description="names of the ways of signing in that it takes; none: all")


class UpdateShare(Body):
    """Only what is given changes; `null` lifts `expires` and `max_sessions`."""

    name: str | None = None
    message: str | None = None
    path: str | None = None
    scope: list[str] | None = None
    expires: str | None = None
    max_sessions: int | None = None
    sign_in: list[str] | None = Field(None, description="an empty list lifts the limit")
    add: list[str] = Field([], description="email addresses")
    remove: list[str] = Field([], description="email addresses, cut off at once")
    invite: bool = Field(True, description="mail the added recipients their link")


class AddRecipients(Body):
    to: list[str] = Field(description="email addresses", min_length=1)
    invite: bool = True


class OneRecipient(Body):
    email: str


class CreateToken(Body):
    email: str
    expires: str | None = Field(None, description="a duration or an RFC 3339 time; none: with the share")


class CreateJoinToken(Body):
    site: str
    expires: str | None = Field(None, description="a duration of at most 1h, the default")


class Enroll(Body):
    join_token: str
    name: str
    public_key: str = Field(description="Ed25519, 32 bytes in base64url")


class PageQuery(Query):
    cursor: str | None = Field(None, description="`next` of the page before")
    limit: int = Field(50, ge=1, le=200)


class SharesQuery(PageQuery):
    include_ended: bool = False


class SessionsQuery(PageQuery):
    share: str | None = None
    live: bool = Field(True, description="only sessions that can still be used")


class AuditQuery(Query):
    share: str | None = None
    actor: str | None = None
    type: str | None = None
    since: str | None = Field(None, description="an RFC 3339 time, or a duration before now; inclusive")
    until: str | None = Field(None, description="as since; exclusive")
    format: Literal["json", "csv", "jsonl"] = Field(
        "json", description="csv and jsonl export everything that matches, without pages"
    )
    cursor: str | None = Field(None, description="`next` of the page before")
    limit: int | None = Field(None, ge=1, le=200, description="default: 50")


class EventsQuery(Query):
    share: str | None = None
    type: str | None = None


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Answer(BaseModel):
    """Base of what goes out as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipientOut(Answer):
    email: str
    delivery: Literal["queued", "sent", "bounced", "failed"] | None
    delivery_detail: str = Field(description="what the mail server said")
    first_opened: str | None
    last_opened: str | None


class LiveOut(Answer):
    sessions: int
    streams: int


class ShareOut(Answer):
    id: str
    name: str
    site: str
    service: str
    path: str
    scope: list[str]
    owner: str
    message: str
    created: str
    expires: str | None
    max_sessions: int | None
    sign_in: list[str]
    state: Literal["active", "expired", "deleted"]
    origin: str
    recipients: list[RecipientOut]
    live: LiveOut


class CreatedShareOut(ShareOut):
    links: dict[str, str] = Field(
        description="secrets, by address: they cannot be read again, only made anew"
    )
    notice: str = Field("", description="only when the whole service is shared")
    warning: str = Field("", description="only when no gateway that is connected offers the service")


class RevokedOut(Answer):
    sessions: int
    streams: int
    took_ms: float


class UpdatedShareOut(ShareOut):
    links: dict[str, str] = Field(description="of the recipients who were added")
    revoked: RevokedOut


class SharesOut(Answer):
    shares: list[ShareOut]
    next: str | None


class EndedOut(Answer):
    revoked: RevokedOut


class LinkOut(Answer):
    share: str
    email: str
    link: str


class TokenOut(Answer):
    share: str
    email: str
    session: str
    token: str
    expires: str | None


class SessionOut(Answer):
    id: str
    share: str
    email: str
    kind: Literal["cookie", "token"]
    provider: str
    created: str
    last_seen: str
    expires: str | None
    ended: str | None
    client: str
    streams: int


class SessionsOut(Answer):
    sessions: list[SessionOut]
    next: str | None


class GatewayOut(Answer):
    site: str
    name: str
    state: Literal["connected", "service_down", "not_connected"]
    connected: bool
    enrolled: str
    last_seen: str | None
    connected_since: str | None
    tunnels: int
    streams: int
    rtt: float | None = Field(description="seconds")
    services: dict[str, bool] = Field(description="whether the gateway reaches them")


class GatewaysOut(Answer):
    gateways: list[GatewayOut]
    next: str | None


class JoinTokenOut(Answer):
    site: str
    join_token: str
    expires: str


class EnrolledOut(Answer):
    site: str
    name: str
    edge: str = Field(description="the edge's name, part of what the gateway's proofs sign")


class EventOut(Answer):
    type: str
    at: str
    actor: str
    share: str | None
    session: str | None
    detail: dict[str, str | int | float | bool | None]


class AuditEntryOut(EventOut):
    id: int


class AuditOut(Answer):
    events: list[AuditEntryOut]
    next: str | None


class Problem(Answer):
    """RFC 9457, with a code for scripts and the next step for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
