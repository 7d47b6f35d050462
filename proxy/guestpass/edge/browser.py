"""What our own pages need to know of the browser in front of them: cookies, forms, origins.

Cookies are read from the raw field: aiohttp's parser makes `__Host-` names of others, and one that comes twice was
tossed by a neighbour. All of ours are `__Host-`: no other origin can set them, and scripts cannot read them.

A form is accepted when it comes from a page of the same origin *and* carries a token made from a cookie's secret: the
first stops other sites, siblings of the same domain included, the second holds where a browser says nothing of the
first's kind. The token needs no key of ours, so a form survives a restart.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from aiohttp import web

from guestpass.edge import headers as h
from guestpass.errors import Forbidden, GuestpassError, NotFound
from guestpass.plugin import Client

if TYPE_CHECKING:
    from guestpass.edge.pages import Pages

FLOW_COOKIE = b"__Host-gp-flow"  # main origin: binds sign-ins to this browser
ME_COOKIE = b"__Host-gp-me"  # main origin: which address was proven here
CONSOLE_COOKIE = b"__Host-gp-console"  # main origin: the owner
NONCE_COOKIE = b"__Host-gp-nonce"  # a share's origin: binds the hand-over

# What `tokens.new_secret` makes, with room to grow.
SECRET = re.compile(r"[A-Za-z0-9_-]{20,128}")
# Longer targets are not worth keeping for the way back; the visitor lands on the share's own page.
MAX_RETURN_PATH = 2048
PATH = re.compile(r"/(?![/\\])[\x21-\x22\x24-\x7e]*")
# A form of ours has a handful of short fields (a share's message and addresses are the longest), and in the console a
# box for each way of signing in, of which a share takes 50 at most (rules.MAX_WAYS).
MAX_FORM_FIELDS = 100
# A form or a JSON body of ours is a packet or two; a stranger must not hold a connection open with half of one.
BODY_SECONDS = 20.0
# RFC 6265 §6.1 asks browsers for 50 cookies a domain.
MAX_EXPIRED_COOKIES = 50
COOKIE_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
# Clients that a limiter remembers; the oldest go first.
MAX_LIMITED = 20_000

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FormRefused(Forbidden):
    """A form of ours came from elsewhere, or without its token."""

    code = "form_refused"


class BodyTooSlow(GuestpassError):
    """A request of ours was begun and not finished."""

    code = "body_too_slow"
    status = 408


# ── cookies ──────────────────────────────────────────────────────────────────────────────────────────────────────


def own_cookie(request: web.BaseRequest, name: bytes) -> str | None:
    """The secret in this cookie of ours; None when it is absent, repeated or not one that we make."""
    value = h.cookie(request.raw_headers, name)
    return value if value is not None and SECRET.fullmatch(value) else None


def set_cookie(
    response: web.StreamResponse, name: bytes, value: str, seconds: float, *, same_site: str = "Lax"
) -> None:
    """`seconds`: how long the browser keeps it. Lax, so that it comes with navigations from mail and providers."""
    response.headers.add(
        "Set-Cookie",
        f"{name.decode()}={value}; Path=/; Max-Age={max(0, int(seconds))}; Secure; HttpOnly; SameSite={same_site}",
    )


def drop_cookie(response: web.StreamResponse, name: bytes) -> None:
    set_cookie(response, name, "", 0)


def expire_all_cookies(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Drop every cookie that came with the request, the application's too, as far as they are of the whole origin.
    Clear-Site-Data could do it only together with the cookies of the domain's other origins."""
    names: dict[bytes, None] = {}
    for field in h.values(request.raw_headers, b"cookie"):
        for pair in field.split(b";"):
            name = pair.partition(b"=")[0].strip(b" \t")
            if COOKIE_NAME.fullmatch(name):
                names[name] = None
    for name in list(names)[:MAX_EXPIRED_COOKIES]:
        secure = "; Secure" if name.startswith(b"__") else ""
        response.headers.add("Set-Cookie", f"{name.decode('ascii')}=; Path=/; Max-Age=0{secure}")


def peer_address(request: web.BaseRequest) -> str:
    """Where the connection itself comes from; "" where that has no address."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return str(peer[0]) if peer else ""


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def csrf_token(secret: str, purpose: str) -> str:
    """The token of the forms for `purpose` in the browser that has `secret` in a cookie."""
    digest = hmac.digest(secret.encode("ascii"), b"form\0" + purpose.encode("utf-8"), "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def same_origin(request: web.BaseRequest, origin: str) -> bool:
    """Whether the request was made by a page of `origin`, as far as the browser says so. Saying nothing is no."""
    origins = h.values(request.raw_headers, b"origin")
    if origins:
        return len(origins) == 1 and origins[0].decode("latin-1") == origin
    return [v.lower() for v in h.values(request.raw_headers, b"sec-fetch-site")] == [b"same-origin"]


async def arrived(request: web.Request) -> None:
    """Wait for the whole body of a request to one of our own pages. Raises BodyTooSlow, HTTPRequestEntityTooLarge."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await request.read()
    except TimeoutError as exc:
        raise BodyTooSlow("the body of the request did not come in time") from exc


async def form_fields(request: web.Request) -> dict[str, str]:
    """The fields of a form; of one that comes twice the first. It is UTF-8, as our pages are, whatever it says of
    itself: Python has decoders that are slow, and some that make text which can be stored nowhere. Raises FormRefused,
    BodyTooSlow."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise FormRefused("That is not a form of ours.")
    await arrived(request)
    try:
        text = (await request.read()).decode("utf-8")
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
    except ValueError as exc:
        raise FormRefused("That is not a form of ours.") from exc
    return dict(reversed(pairs))


async def posted(request: web.Request, origin: str, secret: str, purpose: str) -> dict[str, str]:
    """The fields of a form of ours, without its token. Raises FormRefused, BodyTooSlow."""
    if not same_origin(request, origin):
        raise FormRefused("The form came from another site.")
    fields = await form_fields(request)
    token = fields.pop("csrf", "")
    if not hmac.compare_digest(token.encode("utf-8", "replace"), csrf_token(secret, purpose).encode("ascii")):
        raise FormRefused("The form is too old, or this browser keeps no cookies.")
    return fields


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────


def is_navigation(request: web.BaseRequest) -> bool:
    """Whether a person would see the answer as a page: then they can be sent to sign in."""
    if request.method not in ("GET", "HEAD") or h.values(request.raw_headers, b"upgrade"):
        return False
    mode = request.headers.get("Sec-Fetch-Mode")
    if mode is not None:
        # Not in frames: the sign-in page refuses to be framed.
        return mode == "navigate" and request.headers.get("Sec-Fetch-Dest", "document") == "document"
    return "text/html" in request.headers.get("Accept", "").lower()


def is_speculative(request: web.BaseRequest) -> bool:
    """Whether nobody sees the answer yet, perhaps never: HEAD, prefetching and prerendering."""
    purpose = request.headers.get("Sec-Purpose", request.headers.get("Purpose", "")).lower()
    return request.method == "HEAD" or "prefetch" in purpose or "prerender" in purpose


def safe_path(target: str) -> str | None:
    """A request target as a path to come back to; None when a browser could read another origin into it."""
    if len(target) > MAX_RETURN_PATH or not PATH.fullmatch(target) or target.startswith("/.guestpass/"):
        return None
    return target


def redirect(location: str) -> web.Response:
    """303: the browser asks for `location` with GET. Not cached, and its Referer says nothing."""
    return web.Response(
        status=303,
        headers={"Location": location, "Cache-Control": "no-store", "Referrer-Policy": "same-origin"},
    )


def guarded(pages: Pages, handler: Handler) -> Handler:
    """`handler` with the errors that any page may meet as pages."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except FormRefused as exc:
            return pages.error(
                403,
                request=request,
                title="Please try again",
                message=exc.message,
                advice="Go back, load the page again, and repeat what you did.",
            )
        except NotFound as exc:
            return pages.error(404, request=request, message=exc.message, advice=exc.hint)
        except GuestpassError as exc:
            if exc.status < 500:
                return pages.error(exc.status, request=request, message=exc.message, advice=exc.hint)
            raise

    return answer


class Limiter:
    """At most so many of something for one client network in a window of time. In memory: losing it at a restart
    costs nothing."""

    def __init__(self, most: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._seconds = seconds
        self._now = now
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def admits(self, client: Client) -> bool:
        """Count one more; whether it is within the limit."""
        key, now = client.network, self._now()
        since, number = self._counts.get(key, (now, 0))
        if now - since >= self._seconds:
            since, number = now, 0
        self._counts[key] = (since, number + 1)
        self._counts.move_to_end(key)
        while len(self._counts) > MAX_LIMITED:
            self._counts.popitem(last=False)
        return number < self._most


def text_fields(fields: Mapping[str, str], *names: str) -> dict[str, str]:
    """The named fields, stripped; absent ones are empty."""
    return {name: fields.get(name, "").strip() for name in names}
