"""Sign-in on the main origin: links, the way to a proven address, and "shared with me". See `admission` for the whole
way in.

A flow is one sign-in of one browser, kept on the server. It is bound to that browser, by the digest of a cookie, as
soon as there is something to keep in it; showing its first page keeps nothing. What a form's answer leads to is stored
first and then shown by a GET of its own, so that a reload repeats nothing: no second mail, no second try.

A provider may know an address without proving it (`Unproven`). Then the flow goes on at the authenticator that proves
addresses, and keeps the claim: only that very address ends it, and it ends as a sign-in with the provider.

A share may say which ways of signing in it takes. Others are not shown, are not begun, and do not end in it: that is
asked again when the address is proven, whichever way the visitor came.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from guestpass import tokens
from guestpass.edge import headers as h
from guestpass.edge.browser import (
    FLOW_COOKIE,
    ME_COOKIE,
    FormRefused,
    csrf_token,
    drop_cookie,
    is_speculative,
    own_cookie,
    peer_address,
    posted,
    redirect,
    same_origin,
    set_cookie,
)
from guestpass.edge.desk import FINISH_PATH, FLOW_SECONDS, FLOWS_WINDOW, START_PATH, Desk
from guestpass.edge.keys import CLIENT
from guestpass.errors import NotFound, PluginFailed, ShareEnded, ShareNotFound
from guestpass.model import Event, Identity, Share
from guestpass.plugin import Action, Authenticator, Denied, Field, Form, Passkey, SignIn, Step, Unproven

# A redirect between two origins takes a moment; architecture.md allows no more.
HANDOVER_SECONDS = 60.0
# How long a proven address is remembered on the main origin: a working day.
ME_SECONDS = 12 * 3600.0


@dataclass(frozen=True, slots=True)
class _Known:
    """An address that this browser proved lately."""

    id: str
    email: str
    provider: str
    subject: str
    proven: float


@dataclass(frozen=True, slots=True)
class _Claim:
    """An address that the authenticator `provider` named and did not prove."""

    email: str
    provider: str
    subject: str


@dataclass(slots=True)
class _Flow:
    """One sign-in as the store keeps it, seen by one browser."""

    id: str
    browser: str  # the secret in this browser's flow cookie, perhaps about to be set
    bound: (
        str | None
    )  # the digest of the secret of the browser that it belongs to; None until something is kept
    share_id: str | None  # None: to see "shared with me"
    nonce: str
    path: str
    link: str  # the digest of the link that it began at, or ""
    authenticator: str | None  # where the visitor is
    state: dict[str, Any]
    form: Form | None
    claim: _Claim | None  # what another authenticator said, and this one is to prove

    @property
    def is_bound(self) -> bool:
        """Whether it belongs to this browser."""
        return self.bound is not None and hmac.compare_digest(self.bound, tokens.digest(self.browser).hex())

    @classmethod
    def from_data(cls, flow_id: str, data: Mapping[str, Any], browser: str) -> _Flow:
        return cls(
            id=flow_id,
            browser=browser,
            bound=data.get("bound"),
            share_id=data.get("share"),
            nonce=data.get("nonce", ""),
            path=data.get("path", "/"),
            link=data.get("link", ""),
            authenticator=data.get("authenticator"),
            state=data.get("state", {}),
            form=_form_from(data["form"]) if data.get("form") else None,
            claim=_Claim(**data["claim"]) if data.get("claim") else None,
        )

    def as_data(self) -> dict[str, Any]:
        """What to store; from now on it belongs to this browser."""
        return {
            "type": "sign-in",
            "bound": tokens.digest(self.browser).hex(),
            "share": self.share_id,
            "nonce": self.nonce,
            "path": self.path,
            "link": self.link,
            "authenticator": self.authenticator,
            "state": self.state,
            "form": dataclasses.asdict(dataclasses.replace(self.form, state={})) if self.form else None,
            "claim": dataclasses.asdict(self.claim) if self.claim else None,
        }


def _form_from(data: Mapping[str, Any]) -> Form:
    fields = tuple(Field(**field) for field in data["fields"])
    actions = tuple(Action(**action) for action in data["actions"])
    passkey = Passkey(**data["passkey"]) if data.get("passkey") else None
    return Form(**{**data, "fields": fields, "actions": actions, "passkey": passkey})


class SignInPages(Desk):
    """Everything that visitors see on the main origin."""

    def routes(self) -> list[web.RouteDef]:
        return [
            self._get("/", self._home),
            self._get("/s/{secret}", self._link),
            self._post("/s/{secret}", self._link_continue),
            self._get("/signin/{flow}", self._sign_in),
            self._post("/signin/{flow}", self._sign_in_as_known),
            self._get("/signin/{flow}/{authenticator}", self._sign_in_form),
            self._post("/signin/{flow}/{authenticator}", self._sign_in_posted),
            self._get("/callback/{authenticator}", self._callback, allow_head=False),
            self._get("/me", self._me),
            self._post("/me/sign-in", self._me_sign_in),
            self._post("/me/sign-out", self._me_sign_out),
            self._get("/me/remove/{share}", self._me_remove_ask),
            self._post("/me/remove/{share}", self._me_remove),
            self._get("/signed-out", self._signed_out),
        ]

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _home(self, request: web.Request) -> web.StreamResponse:
        return self._pages.render("home.html")

    async def _link(self, request: web.Request) -> web.StreamResponse:
        try:
            share, _ = await self._service.resolve_link(request.match_info["secret"])
        except ShareEnded:
            return self._pages.error(410, request=request)
        except NotFound:
            return self._pages.error(404, request=request)
        return self._pages.render(
            "link.html", leads_elsewhere=True, share=share, action=request.raw_path, now=self._now()
        )

    async def _link_continue(self, request: web.Request) -> web.StreamResponse:
        """There is nothing to protect with a token here: it leads to where the share's id leads anybody. The share's
        origin is told by a code that the visitor had a link, not which."""
        if not same_origin(request, self._main_origin):
            raise FormRefused("The form came from another site.")
        secret = request.match_info["secret"]
        try:
            share, _ = await self._service.resolve_link(secret)
        except ShareEnded:
            return self._pages.error(410, request=request)
        except NotFound:
            return self._pages.error(404, request=request)
        if not self._may_begin(request):
            return self._pages.error(429, request=request, retry_after=int(FLOWS_WINDOW))
        via = await self._service.create_flow(
            {"type": "link", "share": share.id, "link": tokens.digest(secret).hex()}, HANDOVER_SECONDS
        )
        return redirect(f"{self._origins.share_origin(share.id)}{START_PATH}?via={via}")

    # ── sign-in ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _sign_in(self, request: web.Request) -> web.StreamResponse:
        flow = await self._flow(request)
        if isinstance(flow, web.Response):
            return flow
        known = await self._known(request)
        if known is not None and not await self._takes(flow, known.provider):
            known = None
        ways = await self._ways(flow)
        if not ways:
            return self._no_way(flow)
        if known is None and len(ways) == 1:
            return await self._show(request, flow, ways[0].name)
        response = self._pages.render(
            "choose.html",
            leads_elsewhere=True,
            flow_id=flow.id,
            csrf=csrf_token(flow.browser, flow.id),
            known=known,
            ways=[{"name": w.name, "label": w.label or w.name} for w in ways],
            now=self._now(),
        )
        return self._with_browser(request, flow, response)

    async def _sign_in_as_known(self, request: web.Request) -> web.StreamResponse:
        """One click for who proved their address in this browser within the last hours."""
        flow = await self._flow(request)
        if isinstance(flow, web.Response):
            return flow
        await posted(request, self._main_origin, flow.browser, flow.id)
        known = await self._known(request)
        if known is None:
            return redirect(f"/signin/{flow.id}")
        identity = Identity(known.email, known.provider, known.subject, known.proven)
        return await self._identified(request, flow, identity, remember=False)

    async def _sign_in_form(self, request: web.Request) -> web.StreamResponse:
        flow = await self._flow(request)
        if isinstance(flow, web.Response):
            return flow
        return await self._show(request, flow, request.match_info["authenticator"])

    def _no_way(self, flow: _Flow) -> web.Response:
        """The share takes only ways of signing in that are configured no more."""
        return self._start_again(
            "Nobody can sign in to this at present",
            "The ways of signing in that its owner chose are not offered any more. Tell them.",
            self._start_url(flow),
            status=403,
        )

    async def _show(self, request: web.Request, flow: _Flow, name: str) -> web.Response:
        """The form at which the visitor is, or the first one."""
        if flow.is_bound and flow.authenticator == name and flow.form is not None:
            return await self._form(request, flow, name, flow.form)
        if not await self._takes(flow, name):
            return self._pages.error(404, request=request)
        flow.claim = None
        try:
            step = await self._plugins.begin(name, await self._as_sign_in(request, flow, name, {}))
        except KeyError:
            return self._pages.error(404, request=request)
        except (Denied, PluginFailed) as exc:
            return await self._denied(request, flow, name, exc)
        if isinstance(step, Form) and not step.state:
            return await self._form(request, flow, name, step)  # nothing to remember yet
        if is_speculative(request):
            # Going on would give the flow to this browser, which only looks ahead.
            return self._pages.error(503, request=request)
        return await self._next(request, flow, name, step)

    async def _sign_in_posted(self, request: web.Request) -> web.StreamResponse:
        flow = await self._flow(request)
        if isinstance(flow, web.Response):
            return flow
        params = await posted(request, self._main_origin, flow.browser, flow.id)
        return await self._complete(request, flow, request.match_info["authenticator"], params)

    async def _callback(self, request: web.Request) -> web.StreamResponse:
        """A provider sends the visitor back; `state` begins with the flow that it was given."""
        flow_id = request.query.get("state", "").partition(".")[0]
        flow = await self._flow(request, flow_id)
        if isinstance(flow, web.Response):
            return flow
        name = request.match_info["authenticator"]
        if not flow.is_bound or flow.authenticator != name or flow.form is not None:
            return self._start_again(
                "This sign-in cannot be finished here",
                "It was begun in another browser or in another way.",
                self._start_url(flow),
                status=400,
            )
        if len(set(request.query)) != len(request.query):
            # RFC 6749 §3.1: none may come twice; which of two would be meant is anybody's guess.
            return self._start_again(
                "This sign-in cannot be finished here",
                "The provider's answer is ambiguous.",
                self._start_url(flow),
                status=400,
            )
        return await self._complete(request, flow, name, dict(request.query))

    async def _complete(
        self, request: web.Request, flow: _Flow, name: str, params: Mapping[str, str]
    ) -> web.Response:
        state = flow.state if flow.authenticator == name else {}
        if flow.authenticator != name:
            flow.claim = None
        if flow.claim is None and not await self._takes(flow, name):
            return self._pages.error(404, request=request)
        try:
            step = await self._plugins.complete(
                name, await self._as_sign_in(request, flow, name, state), params
            )
        except KeyError:
            return self._pages.error(404, request=request)
        except (Denied, PluginFailed) as exc:
            return await self._denied(request, flow, name, exc)
        return await self._next(request, flow, name, step)

    async def _next(self, request: web.Request, flow: _Flow, name: str, step: Step) -> web.Response:
        """Keep what comes next on the server and send the browser there, so that a reload repeats nothing."""
        if isinstance(step, Unproven):
            return await self._prove(request, flow, name, step)
        if isinstance(step, Identity):
            if flow.claim is not None:
                if step.email != flow.claim.email:
                    denied = Denied("Another address was proven than the one that was to be.")
                    return await self._denied(request, flow, name, denied)
                step = dataclasses.replace(step, provider=flow.claim.provider, subject=flow.claim.subject)
            return await self._identified(request, flow, step, remember=True)
        flow.authenticator = name
        flow.state = dict(step.state)
        flow.form = step if isinstance(step, Form) else None
        await self._service.update_flow(flow.id, flow.as_data())
        target = f"/signin/{flow.id}/{name}" if isinstance(step, Form) else step.url
        return self._with_browser(request, flow, redirect(target))

    async def _prove(self, request: web.Request, flow: _Flow, name: str, claimed: Unproven) -> web.Response:
        """On to the authenticator that proves addresses, for this one and no other."""
        prover = self._plugins.prover
        if prover is None or flow.claim is not None:
            text = f"{claimed.email} is not proven by that, and there is no other way here to prove it."
            return await self._denied(request, flow, name, Denied(text))
        flow.claim = _Claim(claimed.email, name, claimed.subject)
        try:
            sign_in = await self._as_sign_in(request, flow, prover, {})
            step = await self._plugins.prove(prover, sign_in, claimed.email)
        except (Denied, PluginFailed) as exc:
            return await self._denied(request, flow, prover, exc)
        return await self._next(request, flow, prover, step)

    async def _ways(self, flow: _Flow) -> list[Authenticator]:
        """Among which the visitor can choose. Raises ShareEnded, ShareNotFound."""
        share = None if flow.share_id is None else await self._active(flow.share_id)
        return [way for way in self._plugins.interactive if share is None or share.takes(way.name)]

    async def _takes(self, flow: _Flow, name: str) -> bool:
        """Whether the share may be opened by this way of signing in. Raises ShareEnded, ShareNotFound."""
        return flow.share_id is None or (await self._active(flow.share_id)).takes(name)

    async def _identified(
        self, request: web.Request, flow: _Flow, identity: Identity, *, remember: bool
    ) -> web.Response:
        """An address is proven: on to the share, if it may."""
        await self._service.end_flow(flow.id)
        if remember:
            detail = {"provider": identity.provider, "client": request[CLIENT].address}
            if identity.subject:
                detail["subject"] = (
                    identity.subject
                )  # which account it was there, should the address change hands
            self._events.emit(
                Event("signin.succeeded", self._now(), identity.email, flow.share_id, detail=detail)
            )
        if flow.share_id is None:
            response = redirect("/me")
        else:
            response = await self._hand_over(request, flow, flow.share_id, identity)
        if remember:
            await self._remember(request, response, identity)
        return response

    async def _hand_over(
        self, request: web.Request, flow: _Flow, share_id: str, identity: Identity
    ) -> web.Response:
        try:
            share = await self._active(share_id)
        except (ShareEnded, ShareNotFound):
            return self._pages.error(410, request=request)
        if not share.takes(identity.provider):
            return self._not_taken(identity, share)
        if share.recipient(identity.email) is None:
            return self._not_invited(identity, share)
        code = await self._service.create_handover(
            {
                "share": share.id,
                "nonce": flow.nonce,
                "path": flow.path,
                "email": identity.email,
                "provider": identity.provider,
                "subject": identity.subject,
                "proven": identity.proven,
            },
            HANDOVER_SECONDS,
        )
        return redirect(f"{self._origins.share_origin(share.id)}{FINISH_PATH}?code={code}")

    async def _denied(
        self, request: web.Request, flow: _Flow, name: str, exc: Denied | PluginFailed
    ) -> web.Response:
        if isinstance(exc, PluginFailed):
            self._count(name, "failed")
            return self._pages.error(
                503, error_id=exc.error_id, request=request, message="Signing in does not work at present."
            )
        self._count(name, "denied")
        detail = {"reason": "denied", "provider": name, "client": request[CLIENT].address}
        self._events.emit(Event("signin.denied", self._now(), share_id=flow.share_id, detail=detail))
        await self._service.end_flow(flow.id)
        return self._start_again("You are not signed in", str(exc), self._start_url(flow), status=403)

    # ── "shared with me" ─────────────────────────────────────────────────────────────────────────────────────────

    async def _me(self, request: web.Request) -> web.StreamResponse:
        known = await self._known(request)
        if known is None:
            return self._pages.render("me_start.html", leads_elsewhere=True)
        return self._render_me(known, await self._service.shared_with(known.email))

    def _render_me(self, known: _Known, shares: list[Share], removed: str = "") -> web.Response:
        return self._pages.render(
            "me.html",
            email=known.email,
            csrf=csrf_token(known.id, "me"),
            items=[{"share": s, "open": self._origins.share_origin(s.id) + START_PATH} for s in shares],
            removed=removed,
            now=self._now(),
        )

    async def _me_sign_in(self, request: web.Request) -> web.StreamResponse:
        if not same_origin(request, self._main_origin):
            raise FormRefused("The form came from another site.")
        if not self._may_begin(request):
            return self._pages.error(429, request=request, retry_after=int(FLOWS_WINDOW))
        flow_id = await self._service.create_flow({"type": "sign-in"}, FLOW_SECONDS)
        return redirect(f"/signin/{flow_id}")

    async def _me_sign_out(self, request: web.Request) -> web.StreamResponse:
        known = await self._known(request)
        response = redirect("/signed-out")
        if known is not None:
            await posted(request, self._main_origin, known.id, "me")
            await self._service.end_flow(known.id)
            drop_cookie(response, ME_COOKIE)
        return response

    async def _me_remove_ask(self, request: web.Request) -> web.StreamResponse:
        found = await self._mine(request)
        if isinstance(found, web.Response):
            return found
        known, share = found
        return self._pages.render(
            "message.html",
            title="Remove yourself?",
            lines=[
                f"You will no longer be able to open “{share.name}” from {share.owner}. "
                "What you have open of it is closed at once.",
                "Only its owner can invite you again.",
            ],
            links=[{"href": "/me", "label": "Keep it"}],
            posts=[
                {
                    "action": f"/me/remove/{share.id}",
                    "csrf": csrf_token(known.id, "me"),
                    "label": "Remove me",
                    "style": "danger",
                },
            ],
        )

    async def _me_remove(self, request: web.Request) -> web.StreamResponse:
        found = await self._mine(request)
        if isinstance(found, web.Response):
            return found
        known, share = found
        await posted(request, self._main_origin, known.id, "me")
        await self._service.remove_recipient(share.id, known.email, by=known.email)
        return self._render_me(known, await self._service.shared_with(known.email), removed=share.name)

    async def _mine(self, request: web.Request) -> tuple[_Known, Share] | web.Response:
        known = await self._known(request)
        if known is None:
            return redirect("/me")
        shares = await self._service.shared_with(known.email)
        share = next((s for s in shares if s.id == request.match_info["share"]), None)
        return redirect("/me") if share is None else (known, share)

    async def _signed_out(self, request: web.Request) -> web.StreamResponse:
        known = await self._known(request)
        if known is None:
            return self._pages.render(
                "message.html",
                title="You are signed out",
                lines=["This browser holds nothing of what was shared with you. You can close this window."],
                links=[],
                posts=[],
            )
        return self._pages.render(
            "message.html",
            title="You are signed out of this share",
            lines=[
                f"This browser still remembers for some hours that {known.email} is yours.",
                "If others use it too, let it forget you.",
            ],
            links=[],
            posts=[
                {
                    "action": "/me/sign-out",
                    "csrf": csrf_token(known.id, "me"),
                    "label": "Forget me in this browser",
                    "style": "primary",
                }
            ],
        )

    async def _known(self, request: web.Request) -> _Known | None:
        secret = own_cookie(request, ME_COOKIE)
        data = await self._service.get_flow(secret) if secret is not None else None
        if secret is None or data is None or data.get("type") != "me":
            return None
        if not self._plugins.offers(data["provider"]):
            return None
        if not await self._service.proofs.holds(data["email"], data["proven"]):
            return None
        return _Known(secret, data["email"], data["provider"], data["subject"], data["proven"])

    async def _remember(self, request: web.Request, response: web.Response, identity: Identity) -> None:
        old = await self._known(request)
        if old is not None:
            await self._service.end_flow(old.id)
        data = {
            "type": "me",
            "email": identity.email,
            "provider": identity.provider,
            "subject": identity.subject,
            "proven": identity.proven,
        }
        set_cookie(response, ME_COOKIE, await self._service.create_flow(data, ME_SECONDS), ME_SECONDS)

    # ── flows ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _flow(self, request: web.Request, flow_id: str | None = None) -> _Flow | web.Response:
        """The flow of this URL as this browser may use it, or the page that says why not."""
        if flow_id is None:
            flow_id = request.match_info["flow"]
        data = await self._service.get_flow(flow_id) if flow_id else None
        if data is None or data.get("type") != "sign-in":
            return self._pages.error(
                410,
                request=request,
                title="This sign-in is over",
                message="It was finished already, or took too long.",
                advice="Open the link that you were sent again.",
            )
        browser = own_cookie(request, FLOW_COOKIE)
        flow = _Flow.from_data(flow_id, data, browser or tokens.new_secret())
        if flow.bound is not None and not flow.is_bound:
            return self._start_again(
                "This sign-in belongs to another browser",
                "It was begun in another browser, or this one does not keep cookies.",
                self._start_url(flow),
                status=403,
            )
        return flow

    def _with_browser(self, request: web.Request, flow: _Flow, response: web.Response) -> web.Response:
        """Give the browser the secret that its flows are bound to, if it has none. One for all of its tabs."""
        if own_cookie(request, FLOW_COOKIE) != flow.browser:
            set_cookie(response, FLOW_COOKIE, flow.browser, FLOW_SECONDS * 2)
        return response

    async def _form(self, request: web.Request, flow: _Flow, name: str, form: Form) -> web.Response:
        several = len(await self._ways(flow)) > 1
        response = self._pages.render(
            "form.html",
            leads_elsewhere=True,
            scripts=form.passkey is not None,
            form=form,
            passkey_options=orjson.dumps(form.passkey.options).decode() if form.passkey else "",
            action=f"/signin/{flow.id}/{name}",
            csrf=csrf_token(flow.browser, flow.id),
            back=f"/signin/{flow.id}" if several else "",
        )
        return self._with_browser(request, flow, response)

    async def _as_sign_in(
        self, request: web.Request, flow: _Flow, name: str, state: Mapping[str, Any]
    ) -> SignIn:
        """Raises ShareEnded, ShareNotFound."""

        async def is_invited(email: str) -> bool:
            if flow.share_id is None:
                return bool(await self._service.shared_with(email))
            try:
                return (await self._active(flow.share_id)).recipient(email) is not None
            except (ShareEnded, ShareNotFound):
                return False

        return SignIn(
            flow_id=flow.id,
            share=None if flow.share_id is None else await self._active(flow.share_id),
            client=request[CLIENT],
            state=state,
            callback_url=f"{self._origins.main}/callback/{name}",
            is_invited=is_invited,
            link=flow.link,
            headers=h.for_plugins(request.raw_headers, tokens.BEARER_PREFIX.encode("ascii")),
            peer=peer_address(request),
        )

    def _start_url(self, flow: _Flow) -> str:
        return self._origins.share_origin(flow.share_id) + START_PATH if flow.share_id is not None else "/me"
