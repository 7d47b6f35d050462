"""Pages for people: server-rendered, whole without JavaScript, with nothing from elsewhere.

One script of ours, for passkeys, is loaded by the forms that offer one; only their policy lets it.

Every page carries a policy that lets it load its own style sheet and nothing more. A form's answer may lead to another
origin (a share's, a provider's, where the shared application redirects to at once), and Chromium applies
`form-action` to the whole chain of redirects: pages whose forms end there say so with `leads_elsewhere`.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Protocol

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined
from multidict import MultiMapping

from guestpass.edge.origins import Origins

log = logging.getLogger("guestpass.edge.pages")

ASSETS = "/.guestpass/assets"
# The name changes with the content, so a copy is good for ever (RFC 8246).
ASSET_CACHE = "public, max-age=31536000, immutable"

# What clients are told to wait after a 503 when nobody says, and how long a page that retries by itself waits.
RETRY_AFTER = 5

# status → title, what happened, what to do next
ERRORS: Mapping[int, tuple[str, str, str]] = {
    400: (
        "This request was not understood",
        "Your browser or program sent something malformed or ambiguous.",
        "Go back and try again.",
    ),
    401: ("Sign in first", "This is shared with named people only.", "Open the link that you were sent."),
    403: (
        "This is not open to you",
        "What you asked for is not part of what was shared, or is not allowed.",
        "Go back, or ask the person who shared it.",
    ),
    404: ("There is nothing here", "The link is incomplete or wrong.", "Check that you copied all of it."),
    405: (
        "This cannot be done here",
        "The page does not take this kind of request.",
        "Go back and try again.",
    ),
    408: ("This took too long", "The request was begun and not finished.", "Go back and try again."),
    410: (
        "This share has ended",
        "It was deleted by its owner, or its time is over.",
        "If you still need it, ask the person who shared it with you.",
    ),
    413: ("This is too large", "More was sent than is taken here.", "Send less."),
    414: ("The address is too long", "More was asked for than is taken here.", "Ask for less."),
    417: ("This is not expected", "The request expects something that is not done here.", "Try it without."),
    421: ("No such address here", "This name does not belong to anything that is shared.", "Check the link."),
    429: (
        "Too many requests",
        "So many came from your network in a short time.",
        "Wait some minutes, then try again.",
    ),
    431: (
        "The request is too large",
        "Your browser sent more headers or cookies than are taken here.",
        "Delete the cookies of this site and try again.",
    ),
    500: (
        "Something went wrong here",
        "It is not your fault.",
        "Try again. If it happens again, tell the person who shared this with you.",
    ),
    501: ("This cannot be done here", "The method of the request is not known here.", "Use another one."),
    502: (
        "The application does not answer",
        "The way to it works, but the application itself gave no proper answer.",
        "Try again in a while. If it stays so, tell the person who shared this with you.",
    ),
    503: (
        "One moment, please",
        "What was shared cannot be reached right now.",
        "Try again in a moment.",
    ),
    504: (
        "The application took too long",
        "It was asked and did not answer in time.",
        "Try again. If it stays so, tell the person who shared this with you.",
    ),
    505: ("This is not spoken here", "This server speaks HTTP/1.1.", "Use that."),
}
RETRIES = "This page tries again by itself."
OTHER_ERROR = ("This did not work", "The request was refused.", "Go back and try again.")


class Pages:
    """Renders the templates of this package."""

    def __init__(self, origins: Origins, refused: Callable[[int], None] = lambda status: None) -> None:
        """`refused` counts what is refused, by status."""
        self._origins = origins
        self._refused = refused
        self._assets: dict[str, tuple[bytes, str]] = {}
        self._environment = Environment(
            loader=PackageLoader("guestpass.edge.pages", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals.update(
            style_url=self._asset("style.css"),
            logo_url=self._asset("logo.svg"),
            passkey_url=self._asset("passkey.js"),
            main_url=origins.main,
        )
        self._environment.filters.update(
            moment=moment, machine_time=machine_time, remaining=remaining, ago=ago, count=count
        )

    def asset_routes(self) -> list[web.RouteDef]:
        """For every origin."""
        return [web.get(ASSETS + "/{name}", self._serve_asset)]

    def render(
        self,
        template: str,
        status: int = 200,
        *,
        headers: Mapping[str, str] | None = None,
        leads_elsewhere: bool = False,
        scripts: bool = False,
        **context: Any,
    ) -> web.Response:
        """A page. `leads_elsewhere`: a form on it may end on another origin; `scripts`: it loads the one of ours."""
        body = self._environment.get_template(template).render(context)
        response = web.Response(status=status, text=body, content_type="text/html", charset="utf-8")
        response.headers.update(self._policy(leads_elsewhere=leads_elsewhere, scripts=scripts))
        if headers:
            response.headers.update(headers)
        return response

    def error(
        self,
        status: int,
        *,
        error_id: str | None = None,
        retry_after: int | None = None,
        request: Request | None = None,
        headers: Mapping[str, str] | None = None,
        title: str | None = None,
        message: str | None = None,
        advice: str | None = None,
        why: str | None = None,
    ) -> web.Response:
        """An error, as a page where the client asks for HTML and as short text elsewhere. `message` says what happened
        instead of the usual words, `advice` what to do next. A 503 page tries again by itself.

        Without an `error_id` it is a refusal: it gets one, is counted, and logged with `why`, which has nothing of the
        visitor's in it. With one, that was done already."""
        usual = ERRORS.get(status, OTHER_ERROR)
        if error_id is None:
            error_id = secrets.token_hex(4)
            log.info("error %s: %d: %s", error_id, status, why or usual[0])
            self._refused(status)
        title = title or usual[0]
        message = _sentence(message) if message else usual[1]
        again: int | None = None
        extra = dict(headers or {})
        if status == 503 and retry_after is None:
            retry_after = RETRY_AFTER
        if retry_after is not None:
            extra["Retry-After"] = str(retry_after)
        if status == 401:
            extra.setdefault("WWW-Authenticate", "Bearer")  # RFC 9110 §15.5.2: a 401 names a scheme
        if wants_html(request):
            if status == 503 and request is not None and request.method == "GET":
                again, advice = retry_after, advice or RETRIES
            return self.render(
                "error.html",
                status,
                headers=extra,
                title=title,
                message=message,
                advice=usual[2] if advice is None else advice,
                error_id=error_id,
                refresh=again,
            )
        lines = [f"{status} {title}", message, f"Error id: {error_id}"]
        response = web.Response(status=status, text="\n".join(lines) + "\n")
        response.headers.update(self._policy(leads_elsewhere=False))
        response.headers.update(extra)
        return response

    def _policy(self, *, leads_elsewhere: bool, scripts: bool = False) -> dict[str, str]:
        script = "script-src 'self'; " if scripts else ""
        action = "'self'"
        if leads_elsewhere:
            action += " https:" if self._origins.scheme == "https" else " https: http:"
        return {
            "Content-Security-Policy": f"default-src 'none'; {script}style-src 'self'; img-src 'self'; "
            f"base-uri 'none'; form-action {action}; frame-ancestors 'none'",
            # Not no-referrer: with that, browsers send `Origin: null` with our own forms.
            "Referrer-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Robots-Tag": "noindex, nofollow",
            "Cache-Control": "no-store",
        }

    def _asset(self, name: str) -> str:
        data = files("guestpass.edge.pages").joinpath(name).read_bytes()
        stem, _, suffix = name.rpartition(".")
        public = f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"
        self._assets[public] = (data, mimetypes.types_map["." + suffix])
        return f"{ASSETS}/{public}"

    async def _serve_asset(self, request: web.Request) -> web.StreamResponse:
        found = self._assets.get(request.match_info["name"])
        if found is None:
            return self.error(404, request=request)
        data, content_type = found
        return web.Response(
            body=data,
            content_type=content_type,
            headers={
                "Cache-Control": ASSET_CACHE,
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
            },
        )


class Request(Protocol):
    """What an answer's form depends on."""

    @property
    def method(self) -> str: ...

    @property
    def headers(self) -> MultiMapping[str]: ...


def wants_html(request: Request | None) -> bool:
    """Whether the client names HTML among what it accepts."""
    if request is None:
        return False
    for value in request.headers.getall("Accept", ()):
        for part in value.lower().split(","):
            media, *parameters = (piece.strip() for piece in part.split(";"))
            if media in ("text/html", "application/xhtml+xml"):
                return not any(
                    p.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for p in parameters
                )
    return False


# ── filters ──────────────────────────────────────────────────────────────────────────────────────────────────────


def moment(at: float) -> str:
    """`2 August 2026, 10:00 UTC`: no locale, no visitor's clock, one meaning everywhere."""
    when = datetime.fromtimestamp(at, UTC)
    return f"{when.day} {MONTHS[when.month - 1]} {when.year}, {when:%H:%M} UTC"


def machine_time(at: float) -> str:
    """For `<time datetime>`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def remaining(expires: float, now: float) -> str:
    """`3 days left`"""
    seconds = expires - now
    # One percent up: a share of seven days that was made a moment ago has seven days left, not six.
    return f"{_duration(seconds * 1.01)} left" if seconds > 0 else "over"


def ago(at: float, now: float) -> str:
    """`5 minutes ago`"""
    seconds = now - at
    return "just now" if seconds < 60 else f"{_duration(seconds)} ago"


def count(number: int, one: str, many: str) -> str:
    """`1 viewer`, `2 viewers`"""
    return f"{number} {one if number == 1 else many}"


MONTHS = (
    ("January", "February", "March", "April", "May", "June", "July")
    + ("August", "September", "October", "November", "December")
)  # fmt: skip


def _duration(seconds: float) -> str:
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return count(int(seconds // size), name, name + "s")
    return "less than a minute"


def _sentence(text: str) -> str:
    text = text.strip()
    if not text:
        return text
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?…" else ".")
