"""What `trusted-header` and `client-certificate` have in common: a proxy in front of the edge says who somebody is.

It is believed only when the connection itself comes from it: from the peer's address, in a named network. A forwarded
address proves nothing here, it may have been written by whoever speaks through another proxy. What the proxy says is
removed from every request before the application sees it (`private_headers`).

The visitor sees who they are and presses a button: signing in is a deliberate act, not something that a link does.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from guestpass.plugin import Authenticator, Denied, Form, Identity, PluginConfig, SignIn, Step
from guestpass_plugins.networks import Network, within

__all__ = ["BehindProxy", "BehindProxyConfig", "HeaderName", "only"]


NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
# Fields that browsers and proxies send for other reasons.
COMMON = frozenset(
    (
        "accept",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "cookie",
        "from",
        "host",
        "origin",
    )
    + ("referer", "te", "transfer-encoding", "upgrade", "user-agent", "x-forwarded-for", "x-forwarded-host")
)


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of letters, digits and hyphens")
    if name.lower() in COMMON:
        raise ValueError(f"{name} is sent for other reasons as well")
    return name


HeaderName = Annotated[str, AfterValidator(_name)]


class BehindProxyConfig(PluginConfig):
    networks: tuple[Network, ...] = Field(min_length=1)
    label: str


class BehindProxy(Authenticator):
    Config: ClassVar[type[PluginConfig]] = BehindProxyConfig

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.label = self.config.label

    @abstractmethod
    def who(self, sign_in: SignIn) -> Identity:
        """Whom the proxy's fields name. Raises Denied."""

    def begin(self, sign_in: SignIn) -> Step:
        identity = self._checked(sign_in)
        return Form(title="Continue", intro=f"You are {identity.email}.", submit="Continue")

    def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        return self._checked(sign_in)

    def _checked(self, sign_in: SignIn) -> Identity:
        if not within(sign_in.peer, self.config.networks):
            self.host.logger.warning("a sign-in came from %s, not from the proxy", sign_in.peer or "nowhere")
            raise Denied("This way of signing in is open from inside the organisation only.")
        return self.who(sign_in)


def only(sign_in: SignIn, name: str) -> str | None:
    """The only field of that name; None when it is absent, or when there is another one, in whatever spelling. With an
    underscore it is not the proxy's: a proxy that removes what visitors write under its field's name need not remove
    that."""
    wanted = name.lower()
    found = [
        (key.lower(), value) for key, value in sign_in.headers if key.lower().replace("_", "-") == wanted
    ]
    return found[0][1].strip() if len(found) == 1 and found[0][0] == wanted else None
