"""Admission: from a link, or a page that somebody asked for, to a session; and from a session to a grant.

The way in, over two origins whose cookies never meet:

```
 visitor          share's origin                      main origin
 ───────          ──────────────                      ───────────
 emailed link ──────────────────────────────────────▶ GET /s/SECRET      who shares what; changes nothing
 "Continue"   ──────────────────────────────────────▶ POST /s/SECRET     303 to the share's /.guestpass/start
              ◀───────────────────────────────────────
 or any page without a session, or /.guestpass/start
              ──▶ nonce cookie; a flow with the nonce's
                  hash and the page that was asked for
                  303 to /signin/FLOW ──────────────▶ /signin/FLOW       choose how; forms; a cookie binds the
                                                                         flow to this browser
                                                      identity proven:   a hand-over code for (share, nonce's
                                                                         hash, identity), 60 s, once
              ◀───────── 303 to /.guestpass/finish?code=… ─────────────
              code + nonce cookie → session cookie
              303 to the page that was asked for
```

Why a flow that begins at a GET is safe: `start` and `/signin/FLOW` may be followed by mail scanners, prefetchers and
link previews. They get a row that expires within the hour and a page that asks for an address. No mail is sent, no
code is made and no link is used up before a form is posted with a token that only the browser with the flow's cookie
has. What a scanner posts is refused or ends at the code, which it does not have.

Why the hand-over cannot be turned around: the code works only with the nonce cookie of the browser that asked the
share's origin. Someone who signs in as themselves and sends the last URL to somebody else (login CSRF) fails there;
someone who sends a started flow to a victim gets nothing, because the code lands in the victim's browser.

The page that was asked for travels in the flow, on the server, and only as a path of the share's own origin.

A main-origin session (`__Host-gp-me`, 12 hours) remembers which address this browser proved. It lists what is shared
with that address, and it stands for a fresh proof: opening a further share then takes one click instead of a code.
It never admits by itself.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from guestpass import tokens
from guestpass.edge import headers as h
from guestpass.edge.browser import (
    NONCE_COOKIE,
    csrf_token,
    drop_cookie,
    expire_all_cookies,
    is_navigation,
    own_cookie,
    posted,
    redirect,
    safe_path,
    set_cookie,
)
from guestpass.edge.desk import FINISH_PATH, FLOW_SECONDS, FLOWS_WINDOW, SIGN_OUT_PATH, START_PATH, Desk
from guestpass.edge.grants import Grant, GrantTable
from guestpass.edge.keys import CLIENT, SHARE_ID
from guestpass.edge.signin import SignInPages
from guestpass.edge.tunnels import NEWS_SECONDS
from guestpass.errors import (
    Forbidden,
    GuestpassError,
    NoGateway,
    NotFound,
    PluginFailed,
    ShareEnded,
    Unauthorized,
)
from guestpass.model import Candidate, Event, Identity, Revocation, Session, SessionKind, Share
from guestpass.plugin import Choice, Client, Denied, RequestContext

if TYPE_CHECKING:
    from guestpass.edge.events import EventHub
    from guestpass.edge.metrics import Metrics
    from guestpass.edge.origins import Origins
    from guestpass.edge.pages import Pages
    from guestpass.edge.plugins import PluginSet
    from guestpass.edge.tunnels import Tunnels
    from guestpass.shares.service import ShareService

# Then a visitor proves the address again, if the share still stands. A dashboard may stay open for days.
SESSION_SECONDS = 7 * 86_400.0
# A restore that met a revocation asks again; this often only when revocations come in a storm.
RESTORE_ATTEMPTS = 20

# Not "cookies": that would delete those of all of the domain's origins (Clear-Site-Data §4.1), the ones of other
# shares and of the main origin included. "storage" ends service workers.
CLEAR_SITE_DATA = {"Clear-Site-Data": '"cache", "storage"'}

TOO_MANY_VIEWERS = (
    "As many people as its owner allows are looking at this already. "
    "If one of them is you in another browser, sign out there; or ask the owner to allow more."
)

Agree = Callable[[str, Sequence[str], str | None], Awaitable[str | None]]
"""(session id, gateways that could serve it, the one that was chosen, or None to ask whether there is one already):
the session's gateway, the same for all who ask."""


class Admission(Desk):
    """Serves sign-in on the main origin, the hand-over on shares' origins, and makes grants."""

    def __init__(
        self,
        *,
        origins: Origins,
        service: ShareService,
        plugins: PluginSet,
        grants: GrantTable,
        tunnels: Tunnels,
        pages: Pages,
        events: EventHub,
        metrics: Metrics | None = None,
        now: Callable[[], float] = time.time,
        agree: Agree | None = None,
    ) -> None:
        """`agree`: how several workers come to the same gateway for a session."""
        super().__init__(
            origins=origins,
            service=service,
            plugins=plugins,
            pages=pages,
            events=events,
            metrics=metrics,
            now=now,
        )
        self._agree = agree
        self._grants = grants
        self._tunnels = tunnels
        self._sign_in = SignInPages(
            origins=origins,
            service=service,
            plugins=plugins,
            pages=pages,
            events=events,
            metrics=metrics,
            now=now,
        )
        self._restoring: dict[tuple[SessionKind, bytes, str], asyncio.Task[Grant]] = {}

    def main_routes(self) -> list[web.RouteDef]:
        """For the main origin."""
        return self._sign_in.routes()

    def share_routes(self) -> list[web.RouteDef]:
        """For every share's origin, below the reserved prefix. `request[SHARE_ID]` is set."""
        return [
            self._get(START_PATH, self._start),
            self._get(FINISH_PATH, self._finish, allow_head=False),
            self._get(SIGN_OUT_PATH, self._sign_out_ask),
            self._post(SIGN_OUT_PATH, self._sign_out),
        ]

    # ── the data plane's questions ───────────────────────────────────────────────────────────────────────────────

    async def challenge(self, request: web.Request, share_id: str) -> web.Response:
        """The answer to a request without a session: page navigations go to sign-in, anything else gets 401."""
        try:
            share = await self._active(share_id)
        except ShareEnded:
            return self.ended(request)
        except NotFound:
            return self._pages.error(421, request=request)
        if not is_navigation(request):
            return self._pages.error(401, request=request)
        return await self._begin_flow(request, share, safe_path(request.raw_path) or share.path)

    def ended(self, request: web.Request) -> web.Response:
        """410 on a share's origin: what the browser kept of it goes as well."""
        response = self._pages.error(410, request=request, headers=CLEAR_SITE_DATA)
        drop_cookie(response, h.SESSION_COOKIE)
        return response

    async def restore(self, share_id: str, kind: SessionKind, secret: str, request: web.Request) -> Grant:
        """A grant for a cookie or token that has none yet: asks the store, the Revokers, the choosers, and puts it in
        the table. Requests that come together are answered together.

        Raises Unauthorized, ShareEnded, ShareNotFound, Forbidden, NoGateway, PluginFailed.
        """
        # Shielded: the visitor who asked first may go away while others wait.
        return await asyncio.shield(self.restoring(share_id, kind, secret, request))

    def restoring(
        self, share_id: str, kind: SessionKind, secret: str, request: web.Request | None = None
    ) -> asyncio.Task[Grant]:
        """What `restore` waits for. A token needs its request: authenticators look at it."""
        key = (kind, tokens.digest(secret), share_id)
        task = self._restoring.get(key)
        if task is None:
            task = asyncio.create_task(self._restore(*key, request), name=f"restore a grant of {share_id}")
            self._restoring[key] = task
            task.add_done_callback(lambda done: self._restored(key, done))
        return task

    async def choose_gateway(
        self, share: Share, session: Session, exclude: frozenset[str] = frozenset()
    ) -> str:
        """The name of the gateway that serves the session. Raises NoGateway.

        When the service is down behind all of them, one that offers it: it says so (502), and knows first when the
        service is back."""
        candidates = self._candidates(share, exclude)
        until = time.monotonic() + NEWS_SECONDS
        while not candidates and not exclude and await self._tunnels.news(until - time.monotonic()):
            candidates = self._candidates(share, exclude)
        if not candidates:
            raise NoGateway(
                f"no gateway of {share.site} that offers {share.service} is connected",
                hint="Start a gateway, or see why it does not connect: guestpass gateway list.",
            )
        names = [candidate.name for candidate in candidates]
        # Of one candidate there is nothing to agree on but that it is this one: the question below does that.
        if self._agree is not None and len(names) > 1:
            agreed = await self._agree(session.id, names, None)
            if agreed is not None:
                return agreed
        chosen = (await self._plugins.choose(Choice(share, session, candidates))).name
        return chosen if self._agree is None else await self._agree(session.id, names, chosen) or chosen

    def _candidates(self, share: Share, exclude: frozenset[str]) -> list[Candidate]:
        for unwell in (False, True):
            found = self._tunnels.candidates(share.site, share.service, unwell=unwell)
            if candidates := [c for c in found if c.name not in exclude]:
                return candidates
        return []

    def _restored(self, key: tuple[SessionKind, bytes, str], task: asyncio.Task[Grant]) -> None:
        if self._restoring.get(key) is task:
            del self._restoring[key]
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody does any more, nobody needs it

    async def _restore(
        self, kind: SessionKind, digest: bytes, share_id: str, request: web.Request | None
    ) -> Grant:
        for _ in range(RESTORE_ATTEMPTS):
            generation = self._grants.generation
            session, share = await self._session_of(kind, digest, share_id)
            if kind is SessionKind.TOKEN and session.email != await self._bearer(request, share):
                raise Unauthorized("There is no such session.")
            if kind is SessionKind.COOKIE and not self._plugins.offers(session.provider):
                raise Unauthorized("This way of signing in is not offered any more.")
            await self._check(share, session)
            static = await self._plugins.compile(share, session)
            gateway = await self.choose_gateway(share, session)
            expires = Grant.end_of(share, session)
            grant = Grant(
                kind, digest, share=share, session=session, gateway=gateway, expires=expires, static=static
            )
            # Between the last question and this line nothing is awaited: what was revoked meanwhile moved the
            # generation, and the answers are asked for again.
            if self._grants.add(grant, generation):
                self._service.touch(session.id, self._now())
                return grant
        raise NoGateway("sessions are being revoked faster than new ones can start", hint="Try again.")

    async def _session_of(self, kind: SessionKind, digest: bytes, share_id: str) -> tuple[Session, Share]:
        """The live session with this secret, and its share: one question to the store where all is well.

        Raises Unauthorized, and what `_active` raises where the share that was asked for is not there to be had.
        """
        try:
            found = await self._service.find_session(kind, digest)
        except ShareEnded:
            await self._active(
                share_id
            )  # the secret may be another share's, which says nothing about this one
            raise
        if found is None or found[1].id != share_id:
            await self._active(share_id)
            raise Unauthorized("There is no such session.")
        return found[0], found[1]

    async def _bearer(self, request: web.Request | None, share: Share) -> str:
        assert request is not None, "a token comes with its request"
        context = RequestContext(
            method=request.method,
            path=request.raw_path,
            headers=h.for_plugins(request.raw_headers),
            client=request[CLIENT],
            share=share,
            session=None,
            at=self._now(),
        )
        try:
            identity = await self._plugins.identify(context)
        except Denied as exc:
            raise Unauthorized(str(exc)) from exc
        if identity is None:
            raise Unauthorized("Tokens are not taken here.")
        return identity.email

    async def _live_session(self, kind: SessionKind, digest: bytes, share_id: str) -> Session | None:
        """Raises ShareEnded, when its recipient was removed as well."""
        found = await self._service.find_session(kind, digest)
        return found[0] if found is not None and found[1].id == share_id else None

    async def _check(self, share: Share, session: Session) -> None:
        """Ask the Revokers. Raises what the visitor gets."""
        revocation = await self._plugins.check(share, session)
        if revocation is None:
            return
        self._count(session.provider, revocation.reason)
        raise _refusal(revocation)

    # ── the hand-over ────────────────────────────────────────────────────────────────────────────────────────────

    async def _begin_flow(
        self, request: web.Request, share: Share, path: str, *, link: str = ""
    ) -> web.Response:
        """The first half of the hand-over: nonce cookie, flow, and off to the main origin."""
        if not self._may_begin(request):
            return self._pages.error(429, request=request, retry_after=int(FLOWS_WINDOW))
        # One nonce for all tabs: each flow keeps the hash, and a second tab must not spoil the first.
        nonce = own_cookie(request, NONCE_COOKIE) or tokens.new_secret()
        data = {"share": share.id, "nonce": tokens.digest(nonce).hex(), "path": path, "link": link}
        flow_id = await self._service.create_flow({"type": "sign-in", **data}, FLOW_SECONDS)
        response = redirect(f"{self._origins.main}/signin/{flow_id}")
        set_cookie(response, NONCE_COOKIE, nonce, FLOW_SECONDS)
        return response

    async def _start(self, request: web.Request) -> web.StreamResponse:
        share_id = _share_id(request)
        try:
            share = await self._active(share_id)
        except ShareEnded:
            return self.ended(request)
        if await self._own_session(request, share_id) is not None:
            return redirect(share.path)
        return await self._begin_flow(request, share, share.path, link=await self._link_of(request, share_id))

    async def _link_of(self, request: web.Request, share_id: str) -> str:
        """The digest of the link at which the visitor pressed "Continue" a moment ago, or ""."""
        via = request.query.get("via", "")
        data = await self._service.get_flow(via) if via else None
        if data is None or data.get("type") != "link" or data["share"] != share_id:
            return ""
        await self._service.end_flow(via)
        return str(data["link"])

    async def _finish(self, request: web.Request) -> web.StreamResponse:
        share_id = _share_id(request)
        try:
            share = await self._active(share_id)
        except ShareEnded:
            return self.ended(request)
        code = request.query.get("code", "")
        data = await self._service.take_handover(code) if code else None
        nonce = own_cookie(request, NONCE_COOKIE)
        if (
            data is None
            or nonce is None
            or data["share"] != share_id
            or not hmac.compare_digest(data["nonce"], tokens.digest(nonce).hex())
        ):
            session = await self._own_session(request, share_id)
            if session is not None:
                # "Back" into the hand-over; or a second tab, whose nonce the first one used.
                mine = data is not None and data["share"] == share_id and data["email"] == session.email
                return redirect(data["path"] if data is not None and mine else share.path)
            return self._start_again(
                "This sign-in cannot be finished here",
                "It was begun in another browser, used already, or took too long.",
                START_PATH,
                status=400,
            )
        identity = Identity(data["email"], data["provider"], data["subject"], data["proven"])
        return await self._open(request, share, identity, data["path"])

    async def _open(self, request: web.Request, share: Share, identity: Identity, path: str) -> web.Response:
        """The second half: a session for this browser."""
        if not share.takes(identity.provider) or not self._plugins.offers(identity.provider):
            return self._not_taken(identity, share)
        recipient = share.recipient(identity.email)
        if recipient is None:
            return self._not_invited(identity, share)
        now = self._now()
        # Not cut to the share's own end: that may be moved, and holds anyway.
        expires = now + SESSION_SECONDS
        await self._end_previous(request, share.id)
        client: Client = request[CLIENT]
        candidate = Session(
            id=tokens.new_id(),
            share_id=share.id,
            recipient_id=recipient.id,
            email=identity.email,
            kind=SessionKind.COOKIE,
            provider=identity.provider,
            created=now,
            last_seen=now,
            expires=expires,
            client=client.address,
        )
        session: Session | None = None
        try:
            # Asked before there is a session, so that nobody "opened" what they were refused; and again afterwards,
            # when sessions that start at the same moment can see each other.
            await self._check(share, candidate)
            session, secret = await self._service.open_session(
                share.id, identity.email, SessionKind.COOKIE, identity.provider, client, expires
            )
            await self._check(share, session)
            if not await self._service.proofs.holds(identity.email, identity.proven):
                raise Unauthorized("Please prove your address again.", code="signed_out")
            await self._service.proofs.remember(identity)
        except (Forbidden, PluginFailed, ShareEnded, Unauthorized) as exc:
            if session is not None:
                await self._service.end_session(session.id, exc.error_code)
            self._events.emit(
                Event(
                    "signin.denied",
                    self._now(),
                    identity.email,
                    share.id,
                    detail={"reason": exc.error_code, "provider": identity.provider},
                )
            )
            return self._refused(request, exc)
        self._count(identity.provider, "admitted")
        response = redirect(path)
        set_cookie(response, h.SESSION_COOKIE, secret, expires - now)
        drop_cookie(response, NONCE_COOKIE)
        return response

    def _refused(self, request: web.Request, exc: GuestpassError) -> web.Response:
        """Signed in, but no session: a Revoker said no."""
        if isinstance(exc, ShareEnded):
            return self.ended(request)
        if isinstance(exc, PluginFailed):
            text = f"Whether you may open this cannot be told at present. Error id: {exc.error_id}."
            return self._start_again("One moment, please", text, START_PATH, status=503)
        if isinstance(exc, Forbidden):
            title = "All places are taken" if exc.error_code == "max_sessions" else "You cannot open this"
            return self._start_again(title, exc.message, START_PATH, status=403, label="Try again")
        return self._start_again("You are not signed in", exc.message, START_PATH, status=403)

    async def _end_previous(self, request: web.Request, share_id: str) -> None:
        """A new sign-in replaces this browser's session: its id is new, and the old one does not count any more."""
        old = await self._own_session(request, share_id)
        if old is not None:
            await self._service.end_session(old.id, "replaced")

    async def _own_session(self, request: web.Request, share_id: str) -> Session | None:
        """The live session of this browser."""
        secret = own_cookie(request, h.SESSION_COOKIE)
        if secret is None:
            return None
        try:
            return await self._live_session(SessionKind.COOKIE, tokens.digest(secret), share_id)
        except ShareEnded:
            return None

    # ── sign-out ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _sign_out_ask(self, request: web.Request) -> web.StreamResponse:
        secret = own_cookie(request, h.SESSION_COOKIE)
        if secret is None or await self._own_session(request, _share_id(request)) is None:
            return redirect(f"{self._origins.main}/signed-out")
        return self._pages.render(
            "message.html",
            leads_elsewhere=True,
            title="Sign out of this share?",
            lines=["To come back you prove your address again."],
            links=[],
            posts=[
                {
                    "action": SIGN_OUT_PATH,
                    "csrf": csrf_token(secret, "sign-out"),
                    "label": "Sign out",
                    "style": "primary",
                }
            ],
        )

    async def _sign_out(self, request: web.Request) -> web.StreamResponse:
        share_id = _share_id(request)
        secret = own_cookie(request, h.SESSION_COOKIE)
        if secret is None:
            return redirect(f"{self._origins.main}/signed-out")
        await posted(request, self._origins.share_origin(share_id), secret, "sign-out")
        session = await self._own_session(request, share_id)
        if session is not None:
            await self._service.end_session(session.id, "signed_out")
        response = redirect(f"{self._origins.main}/signed-out")
        response.headers.update(CLEAR_SITE_DATA)
        expire_all_cookies(request, response)
        return response


def _share_id(request: web.Request) -> str:
    share_id: str = request[SHARE_ID]
    return share_id


def _refusal(revocation: Revocation) -> GuestpassError:
    """What a visitor gets whose session a Revoker does not admit."""
    reason = revocation.reason
    if revocation.error_id is not None:
        return PluginFailed("Whether the session may go on is unknown.", error_id=revocation.error_id)
    if reason in ("deleted", "expired"):
        return ShareEnded("This share has ended.")
    if reason in ("session_ended", "session_expired", "recipient_removed", "idle", "sign_in_not_taken"):
        return Unauthorized("The session is over.", code=reason)
    if reason == "max_sessions":
        return Forbidden(TOO_MANY_VIEWERS, code="max_sessions")
    return Forbidden("Your access to this has ended.", code=reason)
