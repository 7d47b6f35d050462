"""`bearer-token`: scripts and native applications present `Authorization: Bearer gp_…`, a token that the
owner made for one address and that dies with the share. Other people's bearer tokens are none of ours."""

from __future__ import annotations

import re

from guestpass.plugin import Authenticator, Denied, Identity, RequestContext

__all__ = ["BearerToken"]

# RFC 6750 §2.1, with our prefix; the scheme's name has no case (RFC 9110 §11.1).
OURS = re.compile(r"bearer +(gp_[A-Za-z0-9._~+/=-]{16,128})", re.IGNORECASE)
LOOKS_LIKE_OURS = re.compile(r"bearer +gp_", re.IGNORECASE)


class BearerToken(Authenticator):
    """Who holds the token in the request. Abstains when there is none of ours."""

    interactive = False

    async def identify(self, request: RequestContext) -> Identity | None:
        fields = [value for name, value in request.headers if name.lower() == "authorization"]
        if not any(LOOKS_LIKE_OURS.match(value) for value in fields):
            return None
        match = OURS.fullmatch(fields[0].strip()) if len(fields) == 1 else None
        identity = await self.host.resolve_token(match[1]) if match else None
        if identity is None:
            raise Denied("This token is unknown, has expired, or was revoked.")
        return identity
