"""What the edge's front notes on each request for the handlers behind it."""

from __future__ import annotations

from aiohttp import web

from guestpass.plugin import Client

CLIENT = web.RequestKey("client", Client)
"""Who the visitor is, behind trusted proxies."""

SCHEME = web.RequestKey("scheme", str)
"""What the visitor speaks: "http" or "https"."""

SHARE_ID = web.RequestKey("share_id", str)
"""Set on shares' origins only: whose."""

GRANT = web.RequestKey("grant", object)
"""Set by the relay where somebody was admitted: whose grant it is, for the access log."""

LIVE = web.RequestKey("live", object)
"""Set by the relay where a stream was opened."""
