"""The owner's console on the main origin: what is shared with whom, who looks at it, what went wrong; new shares,
changes to them, and their end: whatever `guestpass share` can do.

The API key opens it. Who has signed in is kept in memory, by the digest of a cookie: a restart signs owners out and
leaves nothing behind. Every form carries a token of that cookie. Links of new recipients are shown on the answer to the
form that made them and nowhere else, and so are bearer tokens: the store has only their digests.

Of a share that is changed, only the fields change that were touched: its end does not move by the part of a second that
the form does not show. A form that was loaded before somebody else's change is shown again instead of taking that back.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from guestpass import tokens
from guestpass.addresses import split_addresses
from guestpass.edge.api import unoffered
from guestpass.edge.browser import (
    CONSOLE_COOKIE,
    FormRefused,
    Handler,
    Limiter,
    csrf_token,
    drop_cookie,
    form_fields,
    guarded,
    own_cookie,
    posted,
    redirect,
    same_origin,
    set_cookie,
    text_fields,
)
from guestpass.edge.keys import CLIENT
from guestpass.edge.pages import machine_time
from guestpass.errors import GuestpassError, Invalid, InvalidEmail
from guestpass.model import Delivery, Gateway, Scope, Session, Share, ShareState
from guestpass.moments import parse_moment
from guestpass.scope import parse_scope
from guestpass.shares.service import NewShare

if TYPE_CHECKING:
    from guestpass.edge.api import Gateways, GatewayStatus, Live
    from guestpass.edge.origins import Origins
    from guestpass.edge.pages import Pages
    from guestpass.plugin import Authenticator
    from guestpass.shares.service import ShareService

# A working day; then the key is asked for again.
SIGNED_IN_SECONDS = 12 * 3600.0
# Owners at the same time; the oldest is signed out.
MAX_SIGNED_IN = 100
# The key has 256 bits: this only keeps a script from filling the log.
TRIES_PER_CLIENT = 30
TRIES_WINDOW = 600.0
# A notice waits for the page after the redirect; somebody who never loads it should not collect them.
MAX_NOTICES = 5

# The boxes of the ways of signing in, each by its name.
WAY = "way-"
# What can be set for a new share and changed later, and its fields in the forms; the ways of signing in besides.
LIMITS = ("name", "path", "scope", "expires", "max_sessions", "message")

HOME = "/console"
SIGN_IN = "/console/sign-in"


@dataclass(slots=True)
class Owner:
    """A browser that showed the key."""

    secret: str
    until: float
    notices: list[tuple[str, str]] = field(default_factory=list)  # (style, text), for the next page

    def tell(self, style: str, text: str) -> None:
        del self.notices[: max(0, len(self.notices) + 1 - MAX_NOTICES)]
        self.notices.append((style, text))

    def take_notices(self) -> list[tuple[str, str]]:
        notices, self.notices = self.notices, []
        return notices


# Who is signed in, for one request, where several workers share them; None: this process keeps them itself.
OWNERS: ContextVar[dict[bytes, Owner] | None] = ContextVar("owners", default=None)


class Console:
    """See the module."""

    def __init__(
        self,
        *,
        service: ShareService,
        live: Live,
        gateways: Gateways,
        pages: Pages,
        api_key: str,
        origins: Origins,
        ways: Callable[[], Sequence[Authenticator]],
    ) -> None:
        """`ways`: of signing in, among which visitors can choose."""
        self._service = service
        self._live = live
        self._gateways = gateways
        self._pages = pages
        self._api_key = tokens.digest(api_key)
        self._origins = origins
        self._ways = ways
        self._main_origin = f"{origins.scheme}://{origins.main_host}"
        self._owners: dict[bytes, Owner] = {}
        self._tries = Limiter(TRIES_PER_CLIENT, TRIES_WINDOW)

    @property
    def owners(self) -> dict[bytes, Owner]:
        """Who is signed in, by the digest of the cookie."""
        found = OWNERS.get()
        return self._owners if found is None else found

    @owners.setter
    def owners(self, owners: dict[bytes, Owner]) -> None:
        if OWNERS.get() is None:
            self._owners = owners
        else:
            OWNERS.set(owners)

    @staticmethod
    def _now() -> float:
        return time.time()

    def console_routes(self) -> list[web.RouteDef]:
        """For the main origin."""

        def get(path: str, handler: Handler) -> web.RouteDef:
            return web.get(path, guarded(self._pages, handler))

        def post(path: str, handler: Handler) -> web.RouteDef:
            return web.post(path, guarded(self._pages, handler))

        return [
            get(HOME, self._shares),
            get(SIGN_IN, self._sign_in_form),
            post(SIGN_IN, self._sign_in),
            post("/console/sign-out", self._sign_out),
            get("/console/shares/new", self._new_form),
            post("/console/shares", self._create),
            get("/console/shares/{share}", self._share),
            get("/console/shares/{share}/change", self._change_form),
            post("/console/shares/{share}/change", self._change),
            post("/console/shares/{share}/token", self._token),
            post("/console/shares/{share}/recipients", self._add),
            post("/console/shares/{share}/resend", self._resend),
            post("/console/shares/{share}/link", self._new_link),
            post("/console/shares/{share}/remove", self._remove),
            post("/console/shares/{share}/end-session", self._end_session),
            get("/console/shares/{share}/delete", self._delete_form),
            post("/console/shares/{share}/delete", self._delete),
            get("/console/gateways", self._list_gateways),
        ]

    # ── sign-in ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _sign_in_form(self, request: web.Request) -> web.StreamResponse:
        if self._owner(request) is not None:
            return redirect(HOME)
        return self._render_sign_in()

    def _render_sign_in(self, status: int = 200, fault: str = "") -> web.Response:
        return self._pages.render("console_sign_in.html", status, fault=fault)

    async def _sign_in(self, request: web.Request) -> web.StreamResponse:
        # Before there is a cookie there is nothing to make a token from; a foreign form could only sign the owner's
        # browser in with a key that the foreigner has.
        if not same_origin(request, self._main_origin):
            raise FormRefused("The form came from another site.")
        if not self._tries.admits(request[CLIENT]):
            return self._pages.error(429, request=request, retry_after=int(TRIES_WINDOW))
        key = (await form_fields(request)).get("key", "")
        if not hmac.compare_digest(tokens.digest(key.strip()), self._api_key):
            return self._render_sign_in(403, "That is not the API key. It begins with gpk_.")
        now = self._now()
        self.owners = {k: o for k, o in self.owners.items() if o.until > now}
        while len(self.owners) >= MAX_SIGNED_IN:
            del self.owners[next(iter(self.owners))]
        secret = tokens.new_secret()
        self.owners[tokens.digest(secret)] = Owner(secret, now + SIGNED_IN_SECONDS)
        response = redirect(HOME)
        set_cookie(response, CONSOLE_COOKIE, secret, SIGNED_IN_SECONDS, same_site="Strict")
        return response

    async def _sign_out(self, request: web.Request) -> web.StreamResponse:
        owner = self._owner(request)
        response = redirect(SIGN_IN)
        if owner is not None:
            await self._posted(request, owner)
            del self.owners[tokens.digest(owner.secret)]
            drop_cookie(response, CONSOLE_COOKIE)
        return response

    def _owner(self, request: web.Request) -> Owner | None:
        secret = own_cookie(request, CONSOLE_COOKIE)
        owner = self.owners.get(tokens.digest(secret)) if secret is not None else None
        return owner if owner is not None and owner.until > self._now() else None

    def _signed_in(self, request: web.Request) -> Owner:
        """Raises HTTPSeeOther to the sign-in page."""
        owner = self._owner(request)
        if owner is None:
            raise web.HTTPSeeOther(
                SIGN_IN, headers={"Cache-Control": "no-store", "Referrer-Policy": "same-origin"}
            )
        return owner

    async def _posted(self, request: web.Request, owner: Owner) -> dict[str, str]:
        return await posted(request, self._main_origin, owner.secret, "console")

    def _render(
        self, owner: Owner, template: str, section: str, status: int = 200, **context: Any
    ) -> web.Response:
        return self._pages.render(
            template,
            status,
            section=section,
            csrf=csrf_token(owner.secret, "console"),
            notices=owner.take_notices(),
            now=self._now(),
            **context,
        )

    # ── shares ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _shares(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        ended = request.query.get("show") == "all"
        page = await self._service.list(request.query.get("cursor") or None, include_ended=ended)
        query = "show=all&" if ended else ""
        return self._render(
            owner,
            "console_shares.html",
            "shares",
            shares=[self._row(share) for share in page.items],
            ended=ended,
            more=f"{HOME}?{query}cursor={page.next}" if page.next else "",
            first=not request.query.get("cursor"),
        )

    def _row(self, share: Share) -> dict[str, Any]:
        active = share.state(self._now()) is ShareState.ACTIVE
        here = [r for r in share.recipients if r.removed is None]
        return {
            "share": share,
            "state": share.state(self._now()).value,
            "recipients": here,
            "opened": max((r.last_opened for r in here if r.last_opened is not None), default=None),
            "problems": [r for r in here if r.delivery in (Delivery.BOUNCED, Delivery.FAILED)],
            "viewers": self._live.sessions(share.id) if active else 0,
            "streams": self._live.streams(share.id) if active else 0,
        }

    async def _share(self, request: web.Request) -> web.StreamResponse:
        return await self._render_share(self._signed_in(request), request.match_info["share"])

    async def _render_share(
        self,
        owner: Owner,
        share_id: str,
        *,
        status: int = 200,
        links: Mapping[str, str] | None = None,
        token: Mapping[str, str] | None = None,
        faults: Mapping[str, str] | None = None,
        values: Mapping[str, str] | None = None,
    ) -> web.Response:
        share = await self._service.get(share_id)
        sessions = await self._service.sessions(share_id, live=True)
        return self._render(
            owner,
            "console_share.html",
            "shares",
            status,
            row=self._row(share),
            share=share,
            origin=self._origins.share_origin(share.id),
            sessions=[self._session(s) for s in sessions],
            links=links or {},
            token=token or {},
            faults=faults or {},
            values=values or {},
        )

    def _session(self, session: Session) -> dict[str, Any]:
        return {"session": session, "streams": self._live.session_streams(session.id)}

    async def _new_form(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        known = self._known_services()
        values = {"path": "/", "expires": "7d", "service": known[0] if len(known) == 1 else ""}
        return self._render_new(owner, values, {})

    def _render_new(
        self, owner: Owner, values: Mapping[str, str], faults: Mapping[str, str], general: str = ""
    ) -> web.Response:
        return self._render(
            owner,
            "console_new.html",
            "new",
            422 if faults or general else 200,
            values=values,
            faults=faults,
            general=general,
            services=self._known_services(),
            ways=self._boxes(_ticked(values)),
        )

    def _boxes(self, ticked: Sequence[str]) -> list[dict[str, Any]]:
        """The ways of signing in, to be ticked; where there is one and no limit, there is nothing to choose."""
        offered = {way.name: way.label or way.name for way in self._ways()}
        boxes = [
            {"name": name, "label": label, "ticked": name in ticked, "offered": True}
            for name, label in offered.items()
        ]
        gone = [
            {"name": name, "label": name, "ticked": True, "offered": False}
            for name in ticked
            if name not in offered
        ]
        return [*boxes, *gone] if len(boxes) > 1 or ticked else []

    def _known_services(self) -> list[str]:
        """What the connected gateways reach, as `site/service`."""
        return sorted({f"{s.site}/{name}" for s in self._gateways.status() for name in s.services})

    async def _create(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        fields = await self._posted(request, owner)
        values = _typed(fields, "service", "to", "owner", "only", "no_mail", *LIMITS)
        faults: dict[str, str] = {}
        new = self._new_share(values, faults)
        if new is None:
            return self._render_new(owner, values, faults)
        try:
            created = await self._service.create(new)
        except Invalid as exc:
            return self._render_new(owner, values, {}, _words(exc))
        how = "The mails are on their way." if new.invite else "No mail is sent."
        owner.tell("good", f"“{created.share.name}” is shared. {how}")
        if warning := unoffered(self._gateways, created.share):
            owner.tell("warn", warning)
        return await self._render_share(owner, created.share.id, links=created.links)

    def _new_share(self, values: Mapping[str, str], faults: dict[str, str]) -> NewShare | None:
        """What the form says, or None with a fault for each wrong field."""
        site, slash, service = values["service"].partition("/")
        if not (site and slash and service) or "/" in service:
            faults["service"] = "Write it as SITE/SERVICE, like plant-a/dashboards."
        to: list[str] = []
        try:
            to = split_addresses(values["to"])
            if not to:
                faults["to"] = "Name at least one email address."
        except InvalidEmail as exc:
            faults["to"] = _words(exc)
        limits = self._limits(values, faults)
        if values["only"] and "path" not in faults:
            try:
                limits["scope"] = (*limits.get("scope", ()), *_only(limits["path"]))
            except Invalid as exc:
                faults["path"] = _words(exc)
        if faults:
            return None
        return NewShare(
            site=site,
            service=service,
            to=to,
            owner=values["owner"] or None,
            invite=not values["no_mail"],
            **{**limits, "name": values["name"] or None},
        )

    def _limits(self, values: Mapping[str, str], faults: dict[str, str]) -> dict[str, Any]:
        """What a new share and one that is changed have in common, as arguments; a fault for each wrong field."""
        limits: dict[str, Any] = {
            "name": values["name"],
            "path": values["path"] or "/",
            "message": values["message"],
            "expires": None,
            "max_sessions": None,
            "sign_in": _ticked(values),
        }
        if not limits["path"].startswith("/"):
            faults["path"] = "A path begins with /."
        if values["expires"]:
            try:
                limits["expires"] = parse_moment(values["expires"], self._now())
            except Invalid as exc:
                faults["expires"] = _words(exc)
        if values["max_sessions"]:
            if values["max_sessions"].isascii() and values["max_sessions"].isdigit():
                limits["max_sessions"] = int(values["max_sessions"])
            else:
                faults["max_sessions"] = "Write a whole number, or leave it empty for no limit."
        try:
            limits["scope"] = _rules(values["scope"])
        except Invalid as exc:
            faults["scope"] = _words(exc)
        return limits

    async def _change_form(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share = await self._service.get(request.match_info["share"])
        if share.deleted is not None:
            return redirect(f"{HOME}/shares/{share.id}")
        return self._render_change(owner, share, _shown(share))

    def _render_change(
        self,
        owner: Owner,
        share: Share,
        values: Mapping[str, str],
        faults: Mapping[str, str] | None = None,
        general: str = "",
        status: int = 200,
    ) -> web.Response:
        return self._render(
            owner,
            "console_change.html",
            "shares",
            status,
            share=share,
            seen=_mark(_shown(share)),
            values=values,
            faults=faults or {},
            general=general,
            ways=self._boxes(_ticked(values)),
        )

    async def _change(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        fields = await self._posted(request, owner)
        share = await self._service.get(request.match_info["share"])
        shown, values = _shown(share), _typed(fields, *LIMITS)
        if fields.get("seen") != _mark(shown):
            text = "It was changed elsewhere since this form was loaded. Here it is as it is now."
            return self._render_change(owner, share, shown, general=text, status=409)
        faults: dict[str, str] = {}
        limits = self._limits(values, faults)
        changed = [name for name in LIMITS if _lines(values[name]) != _lines(shown[name])]
        if set(_ticked(values)) != set(_ticked(shown)):
            changed.append("sign_in")
        if faults := {name: fault for name, fault in faults.items() if name in changed}:
            return self._render_change(owner, share, values, faults, status=422)
        if not changed:
            owner.tell("good", "Nothing was changed.")
            return redirect(f"{HOME}/shares/{share.id}")
        try:
            updated = await self._service.update(share.id, **{name: limits[name] for name in changed})
        except Invalid as exc:
            return self._render_change(owner, share, values, general=_words(exc), status=422)
        ended = updated.revoked
        again = f" {_ended(ended.sessions, ended.streams)}" if ended.sessions or ended.streams else ""
        owner.tell("good", f"“{updated.share.name}” is changed.{again}")
        return redirect(f"{HOME}/shares/{share.id}")

    async def _token(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share_id = request.match_info["share"]
        fields = text_fields(await self._posted(request, owner), "email", "token_expires")
        try:
            until = parse_moment(fields["token_expires"], self._now()) if fields["token_expires"] else None
            _, token = await self._service.create_token(share_id, fields["email"], until)
        except Invalid as exc:
            return await self._render_share(
                owner, share_id, status=422, faults={"token_expires": _words(exc)}, values=fields
            )
        return await self._render_share(owner, share_id, token={"email": fields["email"], "token": token})

    async def _add(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share_id = request.match_info["share"]
        typed = (await self._posted(request, owner)).get("to", "").strip()
        try:
            addresses = split_addresses(typed)
            if not addresses:
                raise InvalidEmail("name at least one email address")
            updated = await self._service.update(share_id, add=addresses)
        except Invalid as exc:
            return await self._render_share(
                owner, share_id, status=422, faults={"to": _words(exc)}, values={"to": typed}
            )
        new = len(updated.links)
        owner.tell(
            "good", "Invited. The mail is on its way." if new else "Everybody of these was invited already."
        )
        return await self._render_share(owner, share_id, links=updated.links)

    async def _resend(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share_id, email = request.match_info["share"], (await self._posted(request, owner)).get("email", "")
        link = await self._service.resend(share_id, email)
        owner.tell("good", f"A new invitation is on its way to {email}.")
        return await self._render_share(owner, share_id, links={email: link})

    async def _new_link(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share_id, email = request.match_info["share"], (await self._posted(request, owner)).get("email", "")
        link = await self._service.new_link(share_id, email)
        return await self._render_share(owner, share_id, links={email: link})

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share_id, email = request.match_info["share"], (await self._posted(request, owner)).get("email", "")
        revoked = await self._service.remove_recipient(share_id, email)
        owner.tell("good", f"{email} is removed. {_ended(revoked.sessions, revoked.streams)}")
        return redirect(f"/console/shares/{share_id}")

    async def _end_session(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share_id = request.match_info["share"]
        session_id = (await self._posted(request, owner)).get("session", "")
        session = await self._service.get_session(session_id)
        if session.share_id == share_id:
            revoked = await self._service.end_session(session_id, "ended_by_owner")
            owner.tell("good", f"{session.email} is signed out. {_ended(revoked.sessions, revoked.streams)}")
        return redirect(f"/console/shares/{share_id}")

    async def _delete_form(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        share = await self._service.get(request.match_info["share"])
        if share.deleted is not None:
            return redirect(f"/console/shares/{share.id}")
        return self._render(owner, "console_delete.html", "shares", row=self._row(share), share=share)

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        await self._posted(request, owner)
        share = await self._service.get(request.match_info["share"])
        revoked = await self._service.delete(share.id)
        owner.tell(
            "good",
            f"“{share.name}” is deleted: its links are dead. {_ended(revoked.sessions, revoked.streams)} "
            f"It took {revoked.took_ms:.0f} ms.",
        )
        return redirect(HOME)

    # ── gateways ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _list_gateways(self, request: web.Request) -> web.StreamResponse:
        owner = self._signed_in(request)
        connected = {(s.site, s.name): s for s in self._gateways.status()}
        enrolled = await self._service.list_gateways()
        rows = [_gateway_row(g, connected.get((g.site, g.name))) for g in enrolled]
        return self._render(owner, "console_gateways.html", "gateways", gateways=rows)


def _gateway_row(gateway: Gateway, status: GatewayStatus | None) -> dict[str, Any]:
    down = sorted(name for name, reached in status.services.items() if not reached) if status else []
    if status is None:
        state, style = "not connected", "bad"
    elif down:
        state, style = "connected, service down", "warn"
    else:
        state, style = "connected", "good"
    return {
        "gateway": gateway,
        "state": state,
        "style": style,
        "down": down,
        "services": sorted(status.services) if status else [],
        "tunnels": status.tunnels if status else 0,
        "streams": status.streams if status else 0,
        "rtt": f"{status.rtt * 1000:.0f} ms" if status and status.rtt is not None else "",
        "last_seen": gateway.last_seen,
    }


def _typed(fields: Mapping[str, str], *names: str) -> dict[str, str]:
    """The named fields, and the boxes of the ways of signing in that are ticked."""
    return {**text_fields(fields, *names), **{name: "1" for name in fields if name.startswith(WAY)}}


def _ticked(values: Mapping[str, str]) -> list[str]:
    """Names of the ways of signing in."""
    return [name.removeprefix(WAY) for name in values if name.startswith(WAY)]


def _shown(share: Share) -> dict[str, str]:
    """A share as its form shows it."""
    return {
        "name": share.name,
        "path": share.path,
        "scope": "\n".join(map(str, share.scope)),
        "expires": machine_time(share.expires) if share.expires is not None else "",
        "max_sessions": str(share.max_sessions or ""),
        "message": share.message,
        **{WAY + name: "1" for name in share.sign_in},
    }


def _mark(shown: Mapping[str, str]) -> str:
    """Tells two states of a share apart."""
    return tokens.digest(repr(sorted(shown.items()))).hex()


def _lines(text: str) -> list[str]:
    """Browsers send other line ends than they were sent."""
    return text.strip().splitlines()


def _rules(text: str) -> tuple[Scope, ...]:
    """One in each line. Raises Invalid."""
    return tuple(parse_scope(line.strip()) for line in text.splitlines() if line.strip())


def _only(path: str) -> tuple[Scope, ...]:
    """As `--only` does: the path and what lies below it. Raises Invalid."""
    plain = path.partition("?")[0].rstrip("/")
    if not plain:
        raise Invalid(
            "below / lies the whole service", hint="Give a longer path, or share the whole service."
        )
    return (parse_scope(f"* {plain}/**"),)


def _ended(sessions: int, streams: int) -> str:
    if not sessions and not streams:
        return "Nobody had it open."
    who = f"{sessions} {'session' if sessions == 1 else 'sessions'}"
    what = f"{streams} open {'connection' if streams == 1 else 'connections'}"
    return f"{who} and {what} ended."


def _words(exc: GuestpassError) -> str:
    text = exc.message[:1].upper() + exc.message[1:].rstrip(".") + "."
    return f"{text} {exc.hint}".strip()
