"""Signed identity towards the application: `X-Guestpass-Assertion`, an EdDSA JWT (RFC 8037).

An application that trusts nothing on its network verifies the assertion with the key set at `/.well-known/jwks.json`;
one that is reached by the gateway alone may read `X-Guestpass-Email`. The keys are `guestpass.edge.signing_keys`.
"""

from __future__ import annotations

import jwt

from guestpass.edge.grants import Grant
from guestpass.edge.signing_keys import LIFETIME, KeyRing

# An assertion is made for a session and reused: signing costs nothing per request, and whoever gets one has half of
# its life left.
REUSE = LIFETIME / 2


class Signer:
    """Signs assertions with the keys of `ring`."""

    def __init__(self, ring: KeyRing, issuer: str) -> None:
        self.ring = ring
        self._issuer = issuer

    def sign(self, grant: Grant, now: float) -> str:
        claims = {
            "iss": self._issuer,
            "aud": f"{grant.site}/{grant.service}",
            "sub": grant.email,
            "email": grant.email,
            "share": grant.share.id,
            "session": grant.session.id,
            "iat": int(now),
            "exp": int(now + LIFETIME),
        }
        key = self.ring.current(now)
        return jwt.encode(claims, key.key, algorithm="EdDSA", headers={"kid": key.id})

    def fields(self, grant: Grant, now: float) -> bytes:
        """The identity fields as complete lines, kept in the grant while they are fresh."""
        if now >= grant.headers_until:
            grant.headers = (
                f"X-Guestpass-Share: {grant.share.id}\r\n"
                f"X-Guestpass-Email: {grant.email}\r\n"
                f"X-Guestpass-Assertion: {self.sign(grant, now)}\r\n"
            ).encode("ascii")
            grant.headers_until = now + REUSE
        return grant.headers
