"""What the two halves of admission have in common: sign-in on the main origin, the hand-over on shares' origins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from guestpass.edge.browser import Handler, Limiter, guarded
from guestpass.edge.keys import CLIENT
from guestpass.errors import ShareEnded
from guestpass.model import Event, Identity, Share, ShareState

if TYPE_CHECKING:
    from guestpass.edge.events import EventHub
    from guestpass.edge.metrics import Metrics
    from guestpass.edge.origins import Origins
    from guestpass.edge.pages import Pages
    from guestpass.edge.plugins import PluginSet
    from guestpass.shares.service import ShareService

# From the first page of a sign-in to its last: time to find a slow mail.
FLOW_SECONDS = 3600.0
# Sign-ins that one network may begin in ten minutes: an auditorium behind one address, not a flood of rows.
FLOWS_PER_CLIENT = 300
FLOWS_WINDOW = 600.0

OUTCOMES = frozenset(
    ("admitted", "denied", "failed", "not_invited", "deleted", "expired", "recipient_removed")
    + ("session_ended", "session_expired", "max_sessions", "sign_in_not_taken", "plugin_failed")
)

START_PATH = "/.guestpass/start"
FINISH_PATH = "/.guestpass/finish"
SIGN_OUT_PATH = "/.guestpass/sign-out"


class Desk:
    """The parts that both halves use, and the answers that both give."""

    def __init__(
        self,
        *,
        origins: Origins,
        service: ShareService,
        plugins: PluginSet,
        pages: Pages,
        events: EventHub,
        metrics: Metrics | None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._origins = origins
        self._service = service
        self._plugins = plugins
        self._pages = pages
        self._events = events
        self._metrics = metrics
        self._now = now
        # As browsers write it in Origin: without a default port.
        self._main_origin = f"{origins.scheme}://{origins.main_host}"
        self._begun = Limiter(FLOWS_PER_CLIENT, FLOWS_WINDOW)

    def _get(self, path: str, handler: Handler, *, allow_head: bool = True) -> web.RouteDef:
        return web.get(path, guarded(self._pages, handler), allow_head=allow_head)

    def _post(self, path: str, handler: Handler) -> web.RouteDef:
        return web.post(path, guarded(self._pages, handler))

    async def _active(self, share_id: str) -> Share:
        """Raises ShareNotFound, ShareEnded."""
        share = await self._service.get(share_id)
        if share.state(self._now()) is not ShareState.ACTIVE:
            raise ShareEnded("This share has ended.")
        return share

    def _count(self, plugin: str, outcome: str) -> None:
        if self._metrics is not None:
            # A plugin's own reasons may be any text; a label may not.
            self._metrics.admissions.labels(plugin, outcome if outcome in OUTCOMES else "refused").inc()

    def _may_begin(self, request: web.Request) -> bool:
        return self._begun.admits(request[CLIENT])

    def _not_invited(self, identity: Identity, share: Share) -> web.Response:
        """Only somebody who proved the address gets here; the words are the same for all of them."""
        self._count(identity.provider, "not_invited")
        detail = {"reason": "not_invited", "provider": identity.provider}
        self._events.emit(Event("signin.denied", self._now(), identity.email, share.id, detail=detail))
        return self._pages.render(
            "message.html",
            403,
            title="You are not invited",
            lines=[
                f"{identity.email} is not among the addresses that this is shared with.",
                "Sign in with the address at which you were invited, "
                "or ask the person who shared it to invite this one.",
            ],
            links=[
                {
                    "href": self._origins.share_origin(share.id) + START_PATH,
                    "label": "Use another address",
                }
            ],
            posts=[],
        )

    def _not_taken(self, identity: Identity, share: Share) -> web.Response:
        """Signed in, but in a way that the share does not take."""
        self._count(identity.provider, "denied")
        detail = {"reason": "sign_in_not_taken", "provider": identity.provider}
        self._events.emit(Event("signin.denied", self._now(), identity.email, share.id, detail=detail))
        return self._start_again(
            "Please sign in in another way",
            "Its owner has chosen how one signs in to this, and that was another way.",
            self._origins.share_origin(share.id) + START_PATH,
            status=403,
        )

    def _start_again(
        self, title: str, text: str, url: str, *, status: int, label: str = "Start again"
    ) -> web.Response:
        return self._pages.render(
            "message.html",
            status,
            title=title,
            lines=[text] if text else [],
            links=[{"href": url, "label": label}],
            posts=[],
        )
