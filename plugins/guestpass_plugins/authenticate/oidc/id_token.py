"""ID tokens: signature first, then every claim that OpenID Connect Core 1.0 §3.1.3.7 names.

The algorithm is the configured one and no other: nothing in the token has a say in how it is verified. Headers that
bring keys along, ask for extensions or compression, or make it another kind of token are refused, not passed over.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jwt.algorithms import get_default_algorithms

from guestpass_plugins.authenticate.oidc.documents import ProviderFault, parse, quoted
from guestpass_plugins.authenticate.oidc.presets import GUID
from guestpass_plugins.authenticate.oidc.provider import Provider

# Entra's with many groups are the largest known, about 10 KiB.
MAX_ID_TOKEN = 32 << 10
# Clocks of servers that are kept by NTP, with much room.
SKEW_SECONDS = 60.0
# It was issued just now, for the code that was just exchanged; Entra dates them back by five minutes.
MAX_AGE_SECONDS = 600.0
# OpenID Connect Core §2.
MAX_SUBJECT = 255

COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# `kid` and these are all that the headers of providers hold; `x5t` only names a certificate.
HARMLESS_HEADERS = frozenset(("alg", "kid", "typ", "x5t", "x5t#S256"))

_ALGORITHMS = get_default_algorithms()


@dataclass(frozen=True, slots=True)
class Expected:
    """What a token has to say. `issuer` may hold `{tenantid}`, which is the token's `tid`; `tenants`, where not empty,
    says which ones may be, `foreign_tenants` which ones may not. `nonce_required`: LinkedIn sends none back."""

    issuer: str
    client_id: str
    algorithm: str
    nonce: str
    nonce_required: bool = True
    tenants: frozenset[str] = frozenset()
    foreign_tenants: frozenset[str] = frozenset()


async def verified(token: object, provider: Provider, expected: Expected, now: float) -> Mapping[str, Any]:
    """The claims of a token that holds in every way. Raises ProviderFault."""
    if not isinstance(token, str) or len(token) > MAX_ID_TOKEN or not COMPACT.fullmatch(token):
        raise ProviderFault("the ID token is not a signed JWT in compact form")
    signed, _, signature = token.rpartition(".")
    header_part, _, claims_part = signed.partition(".")
    header = parse(_decoded(header_part), "the ID token's header")
    kid = _checked_header(header, expected.algorithm)
    claims = parse(_decoded(claims_part), "the ID token")
    issuer = _issuer(claims, expected)
    key = await provider.key(kid, issuer)
    if not _ALGORITHMS[expected.algorithm].verify(signed.encode("ascii"), key, _decoded(signature)):
        raise ProviderFault("the ID token's signature is wrong")
    # Nothing of the claims was believed so far: the issuer was compared with what is configured.
    for name, check in CHECKS.items():
        if (fault := check(claims, expected, now)) is not None:
            raise ProviderFault(f"the ID token's {name} {fault}")
    return claims


def _decoded(part: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error as exc:
        raise ProviderFault("a part of the ID token is not base64url") from exc
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii") != part:
        raise ProviderFault("a part of the ID token is not canonical base64url")
    return data


def _checked_header(header: Mapping[str, Any], algorithm: str) -> str | None:
    """The name of the key."""
    if header.get("alg") != algorithm:
        raise ProviderFault(
            f"the ID token is signed with {quoted(header.get('alg'))}, not {algorithm}; if that is how this provider "
            "signs, set `algorithm`"
        )
    if strange := sorted(header.keys() - HARMLESS_HEADERS):
        raise ProviderFault(f"the ID token's header holds {quoted(strange)}")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.upper() != "JWT":
        raise ProviderFault(f"the token is of another kind: {quoted(kind)}")
    kid = header.get("kid")
    if not isinstance(kid, str | None) or kid == "":
        raise ProviderFault("the name of the ID token's key is not a text")
    return kid


def _issuer(claims: Mapping[str, Any], expected: Expected) -> str:
    issuer = expected.issuer
    if "{tenantid}" in issuer:
        tenant = claims.get("tid")
        if not isinstance(tenant, str) or not GUID.fullmatch(tenant):
            raise ProviderFault("the ID token names no tenant (tid)")
        if tenant in expected.foreign_tenants or (expected.tenants and tenant not in expected.tenants):
            raise ProviderFault(f"the tenant {tenant} is not among those that may sign in")
        issuer = issuer.replace("{tenantid}", tenant)
    if claims.get("iss") != issuer:
        raise ProviderFault(f"the ID token is from {quoted(claims.get('iss'))}, not from {issuer}")
    return issuer


def _moment(value: object) -> float | None:
    """A NumericDate (RFC 7519 §2), within what a clock can say."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
        return None
    return float(value)


def _audience(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    audience = claims.get("aud")
    # Another audience besides us could replay the token to us, or we to it.
    ours = audience in (expected.client_id, [expected.client_id])
    return None if ours else f"is {quoted(audience)}, not {quoted(expected.client_id)} alone"


def _authorized_party(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    party = claims.get("azp", expected.client_id)
    return None if party == expected.client_id else f"is {quoted(party)}"


def _expiry(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    at = _moment(claims.get("exp"))
    return None if at is not None and now < at + SKEW_SECONDS else "is over, or no time"


def _issued(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    at = _moment(claims.get("iat"))
    if at is None or at > now + SKEW_SECONDS:
        return "lies in the future, or is no time; is the clock right?"
    return "is too long ago" if at < now - MAX_AGE_SECONDS - SKEW_SECONDS else None


def _not_before(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    at = _moment(claims.get("nbf", 0))
    return None if at is not None and at <= now + SKEW_SECONDS else "lies in the future, or is no time"


def _nonce(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    nonce = claims.get("nonce")
    if nonce is None and "nonce" not in claims and not expected.nonce_required:
        return None
    if not isinstance(nonce, str) or not hmac.compare_digest(
        nonce.encode("utf-8", "replace"), expected.nonce.encode("ascii")
    ):
        return "is missing, or that of another sign-in"
    return None


def _subject(claims: Mapping[str, Any], expected: Expected, now: float) -> str | None:
    subject = claims.get("sub")
    fine = isinstance(subject, str) and 0 < len(subject) <= MAX_SUBJECT and subject.isprintable()
    return None if fine else "is no text of 1 to 255 characters"


CHECKS: Mapping[str, Callable[[Mapping[str, Any], Expected, float], str | None]] = {
    "audience (aud)": _audience,
    "authorized party (azp)": _authorized_party,
    "expiry (exp)": _expiry,
    "time of issue (iat)": _issued,
    "beginning (nbf)": _not_before,
    "nonce": _nonce,
    "subject (sub)": _subject,
}
