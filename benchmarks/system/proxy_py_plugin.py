"""Routes of proxy.py's reverse proxy: everything goes to one application (GUESTPASS_UPSTREAM)."""

from __future__ import annotations

import os
from typing import Any

from proxy.http import Url
from proxy.http.parser import HttpParser
from proxy.http.server import ReverseProxyBasePlugin

UPSTREAM = os.environ["GUESTPASS_UPSTREAM"].encode()


class ReverseProxy(ReverseProxyBasePlugin):
    def routes(self) -> list[Any]:
        return [r"/.*$"]

    def handle_route(self, request: HttpParser, pattern: Any) -> Url:
        return Url.from_bytes(UPSTREAM + (request.path or b"/"))
