"""Which origin a request is for, by its Host: the edge's main origin, a share's, or none of ours."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

# What `tokens.new_id` makes, and what an operator may have chosen: one DNS label.
SHARE_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Origins:
    """`public_url` and `share_domain` of edge.toml."""

    def __init__(self, public_url: str, share_domain: str) -> None:
        self.main = public_url
        parts = urlsplit(public_url)
        self.scheme = parts.scheme
        self.main_host = self._normal(parts.netloc)
        self._share_domain = self._normal(share_domain)

    def _normal(self, host: str) -> str:
        return host.lower().removesuffix(DEFAULT_PORTS[self.scheme])

    def share_origin(self, share_id: str) -> str:
        """`https://<share-id>.<share-domain>`"""
        return f"{self.scheme}://{share_id}.{self._share_domain}"

    def is_main(self, host: str) -> bool:
        return self._normal(host) == self.main_host

    def share_of(self, host: str) -> str | None:
        """The share id that this Host names, if it is below the share domain and one label."""
        label, dot, domain = self._normal(host).partition(".")
        if dot and domain == self._share_domain and SHARE_LABEL.fullmatch(label):
            return label
        return None

    def named(self, name: str) -> str | None:
        """The origin of ours at a host name, whatever the port."""
        if name == urlsplit(self.main).hostname:
            return self.main
        label, dot, domain = name.partition(".")
        if dot and domain == urlsplit("//" + self._share_domain).hostname and SHARE_LABEL.fullmatch(label):
            return self.share_origin(label)
        return None
