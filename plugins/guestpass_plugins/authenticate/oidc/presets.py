"""What is known of providers, as data: where they are, how they sign, and which of their claims proves an address.

A preset is a starting point: what the configuration names besides takes its place, except what security rests on
(`proof`, `nonce`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Microsoft's tenants are named by these; of its names only three mean more than one of them.
GUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The tenant of personal Microsoft accounts.
MICROSOFT_PERSONAL = "9188040d-6c67-4c5b-b112-36a304b66dad"


@dataclass(frozen=True, slots=True)
class OAuthProfile:
    """A provider without ID tokens: where its profile is read with the access token, and the names in it."""

    authorization_endpoint: str
    token_endpoint: str
    profile_endpoint: str
    subject: str = "user_id"
    email: str = "email"


@dataclass(frozen=True, slots=True)
class Preset:
    label: str
    issuer: str = ""  # empty: the configuration names it
    scopes: tuple[str, ...] = ("openid", "email")
    algorithm: str = "RS256"
    proof: str = "email_verified"
    """The claim that, beside `email` in the same ID token, says `true` when the provider verified the address. Empty:
    there is none, and the address has to be proven by a code as well."""
    token_auth: str | None = None  # None: what the discovery document names
    nonce: bool = True  # whether its ID tokens carry the nonce that was asked for
    pkce: bool = True
    tenants: bool = False  # Microsoft's rules: the issuer depends on the tenant
    profile: OAuthProfile | None = None
    parameters: tuple[tuple[str, str], ...] = ()  # of the authorization request


PRESETS: Mapping[str, Preset] = {
    "google": Preset(
        label="Continue with Google",
        issuer="https://accounts.google.com",
        parameters=(("prompt", "select_account"),),
    ),
    # `email` is whatever an administrator of any tenant wrote there ("nOAuth"); only `xms_edov`, an optional claim,
    # says that the tenant has verified the domain.
    "microsoft": Preset(
        label="Continue with Microsoft",
        issuer="https://login.microsoftonline.com/{tenant}/v2.0",
        scopes=("openid", "email", "profile"),
        proof="xms_edov",
        tenants=True,
        parameters=(("prompt", "select_account"),),
    ),
    # Returns no nonce, and takes PKCE only from applications for which it was switched on.
    "linkedin": Preset(
        label="Continue with LinkedIn",
        issuer="https://www.linkedin.com/oauth",
        scopes=("openid", "profile", "email"),
        token_auth="client_secret_post",
        nonce=False,
        pkce=False,
    ),
    # OAuth only: a profile that says nothing of verification.
    "amazon": Preset(
        label="Continue with Amazon",
        scopes=("profile",),
        proof="",
        profile=OAuthProfile(
            authorization_endpoint="https://www.amazon.com/ap/oa",
            token_endpoint="https://api.amazon.com/auth/o2/token",
            profile_endpoint="https://api.amazon.com/user/profile",
        ),
    ),
    "keycloak": Preset(label="Continue with Keycloak"),
    "authentik": Preset(label="Continue with authentik"),
    "generic": Preset(label="Continue with your organisation's account"),
}
