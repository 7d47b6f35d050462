"""`trusted-header`: the proxy in front of the edge has signed the visitor in already, and names them in a header field.

For oauth2-proxy (`X-Auth-Request-Email`), an identity-aware proxy of a cloud, or a company's own. See `behind_proxy`
for what is believed, and when.
"""

from __future__ import annotations

from guestpass.plugin import Denied, Identity, InvalidEmail, PluginConfig, SignIn, canonical_address
from guestpass_plugins.authenticate.behind_proxy import BehindProxy, BehindProxyConfig, HeaderName, only

__all__ = ["TrustedHeader"]


class TrustedHeader(BehindProxy):
    class Config(BehindProxyConfig):
        header: HeaderName = "X-Auth-Request-Email"
        prefix: str = ""
        label: str = "Company account"

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.private_headers = (self.config.header,)

    def who(self, sign_in: SignIn) -> Identity:
        value = only(sign_in, self.config.header)
        if value is None or not value.startswith(self.config.prefix):
            raise Denied("You are not signed in there.")
        try:
            email = canonical_address(value.removeprefix(self.config.prefix))
        except InvalidEmail as exc:
            raise Denied("You are signed in there without an email address.") from exc
        return Identity(email, self.name, proven=self.host.now())
