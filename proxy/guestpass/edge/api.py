"""The management API, `/api/v1`: what the command line, the owner's scripts and enrolling gateways speak.

`OPERATIONS` is the table of everything there is; routes and the OpenAPI document are made from it. A handler gets
the request with its validated query and body and returns a model or a response; errors are raised, and turned into
problem details (RFC 9457) in one place.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import csv
import hashlib
import hmac
import io
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ValidationError

from guestpass.config import duration, first_fault
from guestpass.edge import api_models as m
from guestpass.edge.browser import arrived
from guestpass.edge.events import EventHub
from guestpass.edge.openapi import Operation, document
from guestpass.errors import GuestpassError, Invalid, Unauthorized
from guestpass.model import Event, Gateway, Revoked, Scope, Session, Share
from guestpass.moments import parse_moment, to_text
from guestpass.scope import parse_scope
from guestpass.shares.pages import DEFAULT_LIMIT, MAX_LIMIT
from guestpass.shares.service import MAX_JOIN_TOKEN_SECONDS, UNSET, NewShare, ShareService, UpdatedShare
from guestpass.shares.store.rows import AuditEntry, AuditFilter

log = logging.getLogger("guestpass.api")

PREFIX = "/api/v1"

# The largest body is a share with MAX_RECIPIENTS addresses, MAX_RULES rules and a message: well below this.
MAX_BODY = 256 << 10

# Proxies cut connections on which nothing passes, often after 30 to 60 seconds.
HEARTBEAT_SECONDS = 15.0

# Each listener of the event stream costs every event a little.
MAX_LISTENERS = 32

JSON = "application/json"
PROBLEM = "application/problem+json"
CSV = "text/csv"
JSON_LINES = "application/jsonl"
EVENT_STREAM = "text/event-stream"

# A cell that begins like this is a formula to a spreadsheet (OWASP, "CSV Injection").
FORMULA = re.compile(r"[=+\-@\t\r\n]")

# Answers hold links and addresses.
PRIVATE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

# Set when a part of the answer may be out.
STARTED = web.RequestKey("guestpass.api.started", bool)

M = TypeVar("M", bound=BaseModel)


class Live(Protocol):
    """What the data plane knows of open things (the grant table)."""

    def sessions(self, share_id: str) -> int: ...
    def streams(self, share_id: str) -> int: ...
    def session_streams(self, session_id: str) -> int: ...


class GatewayStatus(Protocol):
    """A connected gateway."""

    @property
    def site(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def tunnels(self) -> int: ...
    @property
    def streams(self) -> int: ...
    @property
    def rtt(self) -> float | None: ...
    @property
    def services(self) -> Mapping[str, bool]: ...
    @property
    def since(self) -> float: ...


class Gateways(Protocol):
    """The tunnels."""

    def status(self) -> Sequence[GatewayStatus]: ...


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "POST",
        "/shares",
        "create_share",
        "Share a service with people and mail them their links",
        m.CreatedShareOut,
        body=m.CreateShare,
        status=201,
        idempotency_key=True,
    ),
    Operation("GET", "/shares", "list_shares", "Shares, newest first", m.SharesOut, query=m.SharesQuery),
    Operation("GET", "/shares/{id}", "get_share", "One share", m.ShareOut),
    Operation(
        "PATCH", "/shares/{id}", "update_share", "Change a share", m.UpdatedShareOut, body=m.UpdateShare
    ),
    Operation(
        "DELETE",
        "/shares/{id}",
        "delete_share",
        "End a share: answers after its last stream is closed",
        m.EndedOut,
    ),
    Operation(
        "POST",
        "/shares/{id}/recipients",
        "add_recipients",
        "Add recipients",
        m.UpdatedShareOut,
        body=m.AddRecipients,
    ),
    Operation(
        "DELETE",
        "/shares/{id}/recipients/{email}",
        "remove_recipient",
        "Remove a recipient and end their sessions",
        m.EndedOut,
    ),
    Operation(
        "POST",
        "/shares/{id}/resend",
        "resend",
        "Mail the invitation again, with a new link",
        m.LinkOut,
        body=m.OneRecipient,
    ),
    Operation(
        "POST",
        "/shares/{id}/links",
        "create_link",
        "A new link for a recipient, without mail",
        m.LinkOut,
        body=m.OneRecipient,
        status=201,
    ),
    Operation(
        "POST",
        "/shares/{id}/tokens",
        "create_token",
        "A bearer token for a recipient's scripts",
        m.TokenOut,
        body=m.CreateToken,
        status=201,
    ),
    Operation(
        "GET", "/sessions", "list_sessions", "Sessions, newest first", m.SessionsOut, query=m.SessionsQuery
    ),
    Operation("DELETE", "/sessions/{id}", "end_session", "End a session and its streams", m.EndedOut),
    Operation("GET", "/gateways", "list_gateways", "Enrolled gateways and their state", m.GatewaysOut),
    Operation(
        "DELETE",
        "/gateways/{site}/{name}",
        "remove_gateway",
        "Forget a gateway and end its tunnels",
        m.EndedOut,
    ),
    Operation(
        "POST",
        "/gateways/join-tokens",
        "create_join_token",
        "A single-use token to enrol one gateway",
        m.JoinTokenOut,
        body=m.CreateJoinToken,
        status=201,
    ),
    Operation(
        "POST",
        "/gateways/enroll",
        "enroll",
        "Enrol a gateway; the join token is the credential",
        m.EnrolledOut,
        body=m.Enroll,
        needs_key=False,
    ),
    Operation(
        "GET",
        "/audit",
        "get_audit",
        "What happened, newest first",
        m.AuditOut,
        query=m.AuditQuery,
        others=(CSV, JSON_LINES),
    ),
    Operation(
        "GET",
        "/events",
        "stream_events",
        "What happens, as it happens (server-sent events)",
        query=m.EventsQuery,
        others=(EVENT_STREAM,),
    ),
    Operation("GET", "/openapi.json", "get_openapi", "This document", others=(JSON,)),
)

Handler = Callable[[web.Request, Any, Any], Awaitable[BaseModel | web.StreamResponse]]


class Api:
    """Handlers of the operations, by name. See the module."""

    def __init__(
        self,
        *,
        service: ShareService,
        live: Live,
        gateways: Gateways,
        events: EventHub,
        api_key: str,
        edge_name: str,
        share_origin: Callable[[str], str],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._live = live
        self._gateways = gateways
        self._events = events
        self._key = hashlib.sha256(api_key.encode()).digest()
        self._edge_name = edge_name
        self._share_origin = share_origin
        self._now = now
        self._listeners = 0
        self._openapi: bytes | None = None

    # ── Shares ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def create_share(self, request: web.Request, _: None, body: m.CreateShare) -> web.Response:
        key = request.headers.get("Idempotency-Key")
        created = await self._service.create(
            NewShare(
                site=body.site,
                service=body.service,
                to=body.to,
                name=body.name,
                path="/" if body.path is None else body.path,
                scope=_scope(body.scope),
                expires=self._moment(body.expires),
                max_sessions=body.max_sessions,
                message=body.message or "",
                owner=body.owner,
                invite=body.invite,
                sign_in=body.sign_in,
            ),
            idempotency_key=key,
            request=await request.read(),
        )
        share = created.share
        extra = {}
        if not share.scope:
            extra["notice"] = (
                f"No scope was given: the whole service {share.site}/{share.service} is shared, not only {share.path}."
            )
        if warning := unoffered(self._gateways, share):
            extra["warning"] = warning
        answer = m.CreatedShareOut(**self._share_out(share).__dict__, links=dict(created.links), **extra)
        response = _json(answer, 201)
        if created.repeated:
            response.headers["Idempotency-Replayed"] = "true"
        return response

    async def list_shares(self, request: web.Request, query: m.SharesQuery, _: None) -> m.SharesOut:
        page = await self._service.list(query.cursor, query.limit, query.include_ended)
        return m.SharesOut(shares=[self._share_out(share) for share in page.items], next=page.next)

    async def get_share(self, request: web.Request, _: None, __: None) -> m.ShareOut:
        return self._share_out(await self._service.get(request.match_info["id"]))

    async def update_share(self, request: web.Request, _: None, body: m.UpdateShare) -> m.UpdatedShareOut:
        given = body.model_fields_set
        for field in ("name", "message", "path", "scope", "sign_in"):
            if field in given and getattr(body, field) is None:
                raise Invalid(f"{field} cannot be null", hint="Leave it out to keep what is.")
        return self._updated_out(
            await self._service.update(
                request.match_info["id"],
                name=UNSET if body.name is None else body.name,
                message=UNSET if body.message is None else body.message,
                path=UNSET if body.path is None else body.path,
                scope=UNSET if body.scope is None else _scope(body.scope),
                sign_in=UNSET if body.sign_in is None else body.sign_in,
                expires=self._moment(body.expires) if "expires" in given else UNSET,
                max_sessions=body.max_sessions if "max_sessions" in given else UNSET,
                add=body.add,
                remove=body.remove,
                invite=body.invite,
            )
        )

    async def delete_share(self, request: web.Request, _: None, __: None) -> m.EndedOut:
        return _ended_out(await self._service.delete(request.match_info["id"]))

    async def add_recipients(self, request: web.Request, _: None, body: m.AddRecipients) -> m.UpdatedShareOut:
        return self._updated_out(
            await self._service.update(request.match_info["id"], add=body.to, invite=body.invite)
        )

    async def remove_recipient(self, request: web.Request, _: None, __: None) -> m.EndedOut:
        return _ended_out(
            await self._service.remove_recipient(request.match_info["id"], request.match_info["email"])
        )

    async def resend(self, request: web.Request, _: None, body: m.OneRecipient) -> m.LinkOut:
        share_id = request.match_info["id"]
        link = await self._service.resend(share_id, body.email)
        return m.LinkOut(share=share_id, email=body.email, link=link)

    async def create_link(self, request: web.Request, _: None, body: m.OneRecipient) -> m.LinkOut:
        share_id = request.match_info["id"]
        link = await self._service.new_link(share_id, body.email)
        return m.LinkOut(share=share_id, email=body.email, link=link)

    async def create_token(self, request: web.Request, _: None, body: m.CreateToken) -> m.TokenOut:
        session, token = await self._service.create_token(
            request.match_info["id"], body.email, self._moment(body.expires)
        )
        return m.TokenOut(
            share=session.share_id,
            email=session.email,
            session=session.id,
            token=token,
            expires=_text(session.expires),
        )

    # ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def list_sessions(self, request: web.Request, query: m.SessionsQuery, _: None) -> m.SessionsOut:
        page = await self._service.list_sessions(
            query.cursor, query.limit, share_id=query.share, live=query.live
        )
        return m.SessionsOut(sessions=[self._session_out(s) for s in page.items], next=page.next)

    async def end_session(self, request: web.Request, _: None, __: None) -> m.EndedOut:
        return _ended_out(await self._service.end_session(request.match_info["id"], by="owner"))

    # ── Gateways ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def list_gateways(self, request: web.Request, _: None, __: None) -> m.GatewaysOut:
        connected = {(status.site, status.name): status for status in self._gateways.status()}
        enrolled = await self._service.list_gateways()
        return m.GatewaysOut(
            gateways=[self._gateway_out(g, connected.get((g.site, g.name))) for g in enrolled], next=None
        )

    async def remove_gateway(self, request: web.Request, _: None, __: None) -> m.EndedOut:
        return _ended_out(
            await self._service.remove_gateway(request.match_info["site"], request.match_info["name"])
        )

    async def create_join_token(
        self, request: web.Request, _: None, body: m.CreateJoinToken
    ) -> m.JoinTokenOut:
        now = self._now()
        ttl = MAX_JOIN_TOKEN_SECONDS if body.expires is None else parse_moment(body.expires, now) - now
        token = await self._service.create_join_token(body.site, ttl)
        return m.JoinTokenOut(site=body.site, join_token=token, expires=to_text(now + ttl))

    async def enroll(self, request: web.Request, _: None, body: m.Enroll) -> m.EnrolledOut:
        gateway = await self._service.enroll(body.join_token, body.name, _public_key(body.public_key))
        return m.EnrolledOut(site=gateway.site, name=gateway.name, edge=self._edge_name)

    # ── Audit and events ─────────────────────────────────────────────────────────────────────────────────────────

    async def get_audit(
        self, request: web.Request, query: m.AuditQuery, _: None
    ) -> m.AuditOut | web.StreamResponse:
        which = AuditFilter(
            share_id=query.share,
            actor=query.actor,
            type=query.type,
            since=self._before(query.since),
            until=self._before(query.until),
        )
        if query.format == "json":
            page = await self._service.audit(which, query.cursor, query.limit or DEFAULT_LIMIT)
            return m.AuditOut(events=[_audit_out(entry) for entry in page.items], next=page.next)
        if query.cursor is not None or query.limit is not None:
            raise Invalid(f"format={query.format} exports everything: it takes no cursor and no limit")
        return await self._export(request, which, query.format)

    async def _export(self, request: web.Request, which: AuditFilter, format_: str) -> web.StreamResponse:
        """All pages, one at a time in memory."""
        pages = self._pages(which)
        first = await anext(pages)  # what can fail fails before the answer begins
        response = web.StreamResponse(headers=PRIVATE)
        response.content_type, response.charset = (CSV if format_ == "csv" else JSON_LINES), "utf-8"
        response.headers["Content-Disposition"] = f'attachment; filename="audit.{format_}"'
        request[STARTED] = True
        await response.prepare(request)
        if format_ == "csv":
            await response.write(_csv_line("id", "at", "type", "actor", "share", "session", "detail"))
        write = _csv_entry if format_ == "csv" else _json_entry
        entries: list[AuditEntry] | None = first
        while entries is not None:
            await response.write(b"".join(write(entry) for entry in entries))
            entries = await anext(pages, None)
        await response.write_eof()
        return response

    async def _pages(self, which: AuditFilter) -> AsyncIterator[list[AuditEntry]]:
        cursor: str | None = None
        while True:
            page = await self._service.audit(which, cursor, MAX_LIMIT)
            yield page.items
            cursor = page.next
            if cursor is None:
                return

    async def stream_events(self, request: web.Request, query: m.EventsQuery, _: None) -> web.StreamResponse:
        if self._listeners >= MAX_LISTENERS:
            raise TooManyListeners(
                f"{MAX_LISTENERS} clients listen to the events already",
                hint="Close one of them and try again.",
            )
        self._listeners += 1
        try:
            with self._events.subscribe() as subscription:
                response = web.StreamResponse(headers=PRIVATE)
                response.content_type = EVENT_STREAM
                response.headers["X-Accel-Buffering"] = "no"
                request[STARTED] = True
                await response.prepare(request)
                await response.write(b": listening\n\n")
                told = 0
                while True:
                    try:
                        async with asyncio.timeout(HEARTBEAT_SECONDS):
                            event = await anext(subscription)
                    except TimeoutError:
                        await response.write(b": still here\n\n")
                        continue
                    except StopAsyncIteration:
                        break
                    if subscription.lost > told:
                        lost = orjson.dumps({"count": subscription.lost - told})
                        told = subscription.lost
                        await response.write(b"event: lost\ndata: %b\n\n" % lost)
                    if query.share in (None, event.share_id) and query.type in (None, event.type):
                        data = orjson.dumps(_event_out(event).model_dump())
                        await response.write(b"event: %b\ndata: %b\n\n" % (event.type.encode(), data))
                await response.write_eof()
                return response
        finally:
            self._listeners -= 1

    async def get_openapi(self, request: web.Request, _: None, __: None) -> web.Response:
        if self._openapi is None:
            self._openapi = orjson.dumps(document(OPERATIONS, m.Problem, PREFIX))
        return web.Response(body=self._openapi, content_type=JSON, headers=PRIVATE)

    # ── Every request ────────────────────────────────────────────────────────────────────────────────────────────

    def handler(self, operation: Operation) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        answer: Handler = getattr(self, operation.handler)

        async def handle(request: web.Request) -> web.StreamResponse:
            trusted = False
            try:
                if operation.needs_key:
                    self._authorize(request)
                    trusted = True
                query = None if operation.query is None else _query(request, operation.query)
                body = None if operation.body is None else await _body(request, operation.body)
                done = await answer(request, query, body)
                return _json(done, operation.status) if isinstance(done, BaseModel) else done
            except (asyncio.CancelledError, ConnectionError):
                raise
            except Exception as exc:
                return _failed(request, exc, trusted)

        return handle

    async def not_found(self, request: web.Request) -> web.StreamResponse:
        """Whatever else is asked for below the prefix."""
        path = request.rel_url.raw_path.removeprefix(PREFIX)
        methods = sorted(
            o.method for o in OPERATIONS if re.fullmatch(re.sub(r"{\w+}", "[^/]+", o.path), path)
        )
        if methods:
            return problem(
                405,
                f"{request.method} is not possible here",
                "method_not_allowed",
                f"Possible: {', '.join(methods)}.",
                {"Allow": ", ".join(methods)},
            )
        return problem(404, "there is no such resource", "not_found", f"See {PREFIX}/openapi.json.")

    def _authorize(self, request: web.Request) -> None:
        given = request.headers.getall("Authorization", [])
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer":
            raise Unauthorized(
                "the API key is missing",
                hint="Send it as: Authorization: Bearer API_KEY",
                code="api_key_missing",
            )
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(digest, self._key):
            raise Unauthorized(
                "the API key is wrong",
                hint="Use the key that the edge is configured with; by default it is in api.key beside the database.",
                code="api_key_wrong",
            )

    # ── Domain types as answers ──────────────────────────────────────────────────────────────────────────────────

    def _share_out(self, share: Share) -> m.ShareOut:
        return m.ShareOut(
            id=share.id,
            name=share.name,
            site=share.site,
            service=share.service,
            path=share.path,
            scope=[str(rule) for rule in share.scope],
            owner=share.owner,
            message=share.message,
            created=to_text(share.created),
            expires=_text(share.expires),
            max_sessions=share.max_sessions,
            sign_in=list(share.sign_in),
            state=share.state(self._now()).value,
            origin=self._share_origin(share.id),
            recipients=[
                m.RecipientOut(
                    email=r.email,
                    delivery=None if r.delivery is None else r.delivery.value,
                    delivery_detail=r.delivery_detail,
                    first_opened=_text(r.first_opened),
                    last_opened=_text(r.last_opened),
                )
                for r in share.recipients
                if r.removed is None
            ],
            live=m.LiveOut(sessions=self._live.sessions(share.id), streams=self._live.streams(share.id)),
        )

    def _updated_out(self, updated: UpdatedShare) -> m.UpdatedShareOut:
        return m.UpdatedShareOut(
            **self._share_out(updated.share).__dict__,
            links=dict(updated.links),
            revoked=_revoked_out(updated.revoked),
        )

    def _session_out(self, session: Session) -> m.SessionOut:
        return m.SessionOut(
            id=session.id,
            share=session.share_id,
            email=session.email,
            kind=session.kind.value,
            provider=session.provider,
            created=to_text(session.created),
            last_seen=to_text(session.last_seen),
            expires=_text(session.expires),
            ended=_text(session.ended),
            client=session.client,
            streams=self._live.session_streams(session.id),
        )

    def _gateway_out(self, gateway: Gateway, status: GatewayStatus | None) -> m.GatewayOut:
        services = {} if status is None else dict(status.services)
        return m.GatewayOut(
            site=gateway.site,
            name=gateway.name,
            state="not_connected"
            if status is None
            else "connected"
            if all(services.values())
            else "service_down",
            connected=status is not None,
            enrolled=to_text(gateway.enrolled),
            last_seen=_text(gateway.last_seen) if status is None else to_text(self._now()),
            connected_since=None if status is None else to_text(status.since),
            tunnels=0 if status is None else status.tunnels,
            streams=0 if status is None else status.streams,
            rtt=None if status is None else status.rtt,
            services=services,
        )

    def _moment(self, text: str | None) -> float | None:
        return None if text is None else parse_moment(text, self._now())

    def _before(self, text: str | None) -> float | None:
        """A time, or a duration before now."""
        if text is None:
            return None
        try:
            return self._now() - duration(text)
        except ValueError:
            return parse_moment(text, self._now())


def unoffered(gateways: Gateways, share: Share) -> str:
    """What an owner should hear who shares a service that nobody offers: the gateway may be off, or the name wrong."""
    offered = sorted({f"{s.site}/{name}" for s in gateways.status() for name in s.services})
    if f"{share.site}/{share.service}" in offered:
        return ""
    known = f"offered now: {', '.join(offered)}" if offered else "no gateway is connected"
    return f"No gateway that is connected offers {share.site}/{share.service} ({known})."


class BadBody(Invalid):
    """The body cannot be read at all."""

    code = "body_invalid"
    status = 400


class BodyTooLarge(Invalid):
    code = "body_too_large"
    status = 413


class NotJson(Invalid):
    code = "media_type_unsupported"
    status = 415


class TooManyListeners(GuestpassError):
    code = "too_many_listeners"
    status = 503


def routes(api: Api) -> list[web.RouteDef]:
    """Every operation, and what answers for everything else below the prefix. HEAD is GET without the body, except
    for streams."""
    table = [
        web.get(
            PREFIX + operation.path,
            api.handler(operation),
            allow_head=not {EVENT_STREAM, CSV} & set(operation.others),
        )
        if operation.method == "GET"
        else web.route(operation.method, PREFIX + operation.path, api.handler(operation))
        for operation in OPERATIONS
    ]
    return [
        *table,
        web.route("*", PREFIX, api.not_found),
        web.route("*", PREFIX + "/{rest:.*}", api.not_found),
    ]


def problem(
    status: int, detail: str, code: str, hint: str = "", headers: Mapping[str, str] | None = None
) -> web.Response:
    """Problem details, RFC 9457."""
    described = m.Problem(
        type="about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        hint=hint,
    )
    return web.Response(
        body=orjson.dumps(described.model_dump()),
        status=status,
        content_type=PROBLEM,
        headers={**PRIVATE, **(headers or {})},
    )


def _failed(request: web.Request, exc: Exception, trusted: bool) -> web.StreamResponse:
    if request.get(STARTED):
        # Part of the answer is out: a broken connection is the only way left to say so.
        log.error("an answer of the API broke off", exc_info=exc)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the answer broke off") from exc
    if isinstance(exc, GuestpassError) and (trusted or exc.status < 500):
        headers = {"WWW-Authenticate": 'Bearer realm="guestpass"'} if exc.status == 401 else {}
        return problem(exc.status, exc.message, exc.error_code, exc.hint, headers)
    if isinstance(exc, web.HTTPException):
        return problem(exc.status, exc.reason, "http_error")
    error_id = secrets.token_hex(4)
    log.error("error %s: a request of the API failed", error_id, exc_info=exc)
    return problem(
        500, f"something went wrong (error {error_id})", "internal_error", "The edge's log says what it was."
    )


def _query(request: web.Request, model: type[M]) -> M:
    given = dict(request.query)
    if len(given) != len(request.query):
        raise Invalid("a parameter of the query is given twice")
    return _validated(model, given)


async def _body(request: web.Request, model: type[M]) -> M:
    if request.content_type != JSON:
        raise NotJson("the body is not JSON", hint=f"Send it with Content-Type: {JSON}")
    if request.content_length is not None and request.content_length > MAX_BODY:
        raise BodyTooLarge(f"the body is larger than {MAX_BODY} bytes")
    try:
        await arrived(request)
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as exc:
        raise BodyTooLarge(f"the body is larger than {MAX_BODY} bytes") from exc
    if len(data) > MAX_BODY:
        raise BodyTooLarge(f"the body is larger than {MAX_BODY} bytes")
    try:
        given = orjson.loads(data)
    except ValueError as exc:
        raise BadBody(f"the body is not JSON: {exc}") from exc
    if not isinstance(given, dict):
        raise BadBody("the body is not a JSON object")
    return _validated(model, given)


def _validated(model: type[M], given: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        raise Invalid(first_fault(exc, model), hint=f"See {PREFIX}/openapi.json.") from exc


def _scope(given: Sequence[str]) -> tuple[Scope, ...]:
    return tuple(parse_scope(text) for text in given)


def _public_key(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Invalid("public_key is not base64url") from exc


def _json(answer: BaseModel, status: int) -> web.Response:
    # What was not set has nothing to say: `notice`.
    data = orjson.dumps(answer.model_dump(exclude_unset=True))
    return web.Response(body=data, status=status, content_type=JSON, headers=PRIVATE)


def _text(at: float | None) -> str | None:
    return None if at is None else to_text(at)


def _revoked_out(revoked: Revoked) -> m.RevokedOut:
    return m.RevokedOut(sessions=revoked.sessions, streams=revoked.streams, took_ms=round(revoked.took_ms, 3))


def _ended_out(revoked: Revoked) -> m.EndedOut:
    return m.EndedOut(revoked=_revoked_out(revoked))


def _event_out(event: Event) -> m.EventOut:
    return m.EventOut(
        type=event.type,
        at=to_text(event.at),
        actor=event.actor,
        share=event.share_id,
        session=event.session_id,
        detail=dict(event.detail),
    )


def _audit_out(entry: AuditEntry) -> m.AuditEntryOut:
    return m.AuditEntryOut(id=entry.id, **_event_out(entry.event).__dict__)


def _json_entry(entry: AuditEntry) -> bytes:
    return orjson.dumps(_audit_out(entry).model_dump()) + b"\n"


def _csv_entry(entry: AuditEntry) -> bytes:
    out = _audit_out(entry)
    return _csv_line(
        str(out.id),
        out.at,
        out.type,
        out.actor,
        out.share or "",
        out.session or "",
        orjson.dumps(out.detail).decode(),
    )


def _csv_line(*cells: str) -> bytes:
    """RFC 4180. A cell that a spreadsheet would calculate gets an apostrophe before it."""
    text = io.StringIO()
    csv.writer(text).writerow([f"'{cell}" if FORMULA.match(cell) else cell for cell in cells])
    return text.getvalue().encode()
