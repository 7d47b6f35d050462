"""A provider's metadata and keys: fetched, checked, and kept.

The metadata is OpenID Connect Discovery 1.0; its `issuer` has to be the configured one, byte for byte (§4.3), or
somebody else's document is served there. Both documents are fetched again when they are old. While the provider does
not answer, the last good ones serve on, but not for ever: a key that the provider withdrew must stop to work.

A token with an unknown key makes the key set be fetched again, since that is what rotation looks like; and at most
once in a while, since everybody can make up key names.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import PyJWTError

from guestpass_plugins.authenticate.oidc.documents import (
    Misfit,
    ProviderFault,
    Unreachable,
    fetch,
    quoted,
    secure_url,
)

# Providers say an hour to a day in Cache-Control; a withdrawn key should not outlive an hour by much.
FRESH_SECONDS = 3600.0
# While the provider is out of reach: its sign-in page is as well, mostly, so this hardly matters to visitors.
STALE_SECONDS = 86_400.0
# Between two attempts, whatever the reason: neither made-up keys nor an outage become a flood at the provider.
RETRY_SECONDS = 30.0
# More keys than any provider publishes (Microsoft: about a dozen).
MAX_KEYS = 100
# NIST SP 800-131A; and the verification of larger ones costs too much to be done for anybody.
RSA_BITS = range(2048, 8193)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

# algorithm → kty, curve (RFC 7518 §3.1, RFC 8037)
ALGORITHMS: Mapping[str, tuple[str, str]] = {
    "RS256": ("RSA", ""),
    "RS384": ("RSA", ""),
    "RS512": ("RSA", ""),
    "PS256": ("RSA", ""),
    "PS384": ("RSA", ""),
    "PS512": ("RSA", ""),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
FROM_JWK: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}
# Parts of private and symmetric keys (RFC 7518 §6.2.2, §6.3.2, §6.4).
PRIVATE_PARTS = frozenset(("d", "p", "q", "dp", "dq", "qi", "oth", "k"))


@dataclass(frozen=True, slots=True)
class Metadata:
    """What of the discovery document is used."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    names_itself: bool  # RFC 9207: `iss` comes with every answer to the browser
    token_auth: tuple[str, ...]

    @classmethod
    def from_document(cls, found: Mapping[str, Any], issuer: str) -> Metadata:
        """Raises ProviderFault."""
        if found.get("issuer") != issuer:
            raise ProviderFault(
                f"the discovery document of {issuer} is that of {quoted(found.get('issuer'))}"
            )
        plain = issuer.startswith("http://")
        auth = found.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if not isinstance(auth, list) or not all(isinstance(method, str) for method in auth):
            raise ProviderFault("token_endpoint_auth_methods_supported is not a list of names")
        methods = found.get("code_challenge_methods_supported")
        if methods is not None and (not isinstance(methods, list) or "S256" not in methods):
            raise ProviderFault("the provider offers PKCE, but not S256")
        return cls(
            issuer=issuer,
            **{
                name: secure_url(found.get(name), name, plain=plain)
                for name in ("authorization_endpoint", "token_endpoint", "jwks_uri")
            },
            names_itself=found.get("authorization_response_iss_parameter_supported") is True,
            token_auth=tuple(auth),
        )


@dataclass(frozen=True, slots=True)
class Key:
    kid: str | None
    issuer: str | None  # Microsoft names the tenant to which a key belongs
    public: PublicKey


def usable_keys(document: Mapping[str, Any], algorithm: str) -> list[Key]:
    """The keys with which this algorithm's signatures may be verified; all others are passed over.
    Raises ProviderFault when it is no key set."""
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise ProviderFault(f"the key set is not a list of at most {MAX_KEYS} keys")
    return [key for entry in listed if (key := _key(entry, algorithm)) is not None]


def _key(entry: object, algorithm: str) -> Key | None:
    kty, curve = ALGORITHMS[algorithm]
    if not isinstance(entry, dict) or entry.get("kty") != kty or PRIVATE_PARTS & entry.keys():
        return None
    operations = entry.get("key_ops", ["verify"])
    if (
        entry.get("use", "sig") != "sig"
        or entry.get("alg", algorithm) != algorithm
        or not isinstance(operations, list)
        or "verify" not in operations
        or (curve and entry.get("crv") != curve)
    ):
        return None
    kid, issuer = entry.get("kid"), entry.get("issuer")
    if not isinstance(kid, str | None) or not isinstance(issuer, str | None):
        return None
    try:
        public = FROM_JWK[kty](entry)
    except (PyJWTError, ValueError, TypeError, KeyError):
        return None
    if isinstance(public, rsa.RSAPublicKey) and public.key_size not in RSA_BITS:
        return None
    return Key(kid, issuer, public) if isinstance(public, PublicKey) else None


class _Document:
    """One document that is fetched when it is needed, and again when it is old."""

    def __init__(self, load: Callable[[], Any], now: Callable[[], float]) -> None:
        self._load = load
        self._now = now
        self._lock = asyncio.Lock()
        self._value: Any = None
        self._loaded = self._tried = float("-inf")

    async def get(self, *, newer_than: float | None = None) -> Any:
        """`newer_than`: one that was fetched after this moment, if it may be asked for. Raises ProviderFault."""
        async with self._lock:
            now = self._now()
            wanted = max(now - FRESH_SECONDS, float("-inf") if newer_than is None else newer_than)
            if self._value is not None and self._loaded > wanted:
                return self._value
            if now - self._tried >= RETRY_SECONDS:
                self._tried = now
                try:
                    value = await self._load()
                except ProviderFault:
                    if self._value is None or now - self._loaded > STALE_SECONDS:
                        raise
                else:
                    self._value, self._loaded = value, now
            if self._value is None or now - self._loaded > STALE_SECONDS:
                raise Unreachable("the provider could not be reached a moment ago; it is not asked again yet")
            return self._value

    @property
    def loaded(self) -> float:
        return self._loaded


class Provider:
    """One issuer."""

    def __init__(
        self,
        *,
        http: Callable[[], aiohttp.ClientSession],
        issuer: str,
        advertised: str,
        algorithm: str,
        tls: ssl.SSLContext | None,
        now: Callable[[], float],
    ) -> None:
        """`advertised`: what the discovery document calls itself; differs from `issuer` for Microsoft only."""
        self._http = http
        self._issuer = issuer
        self._advertised = advertised
        self._algorithm = algorithm
        self._tls = tls
        self._metadata = _Document(self._discover, now)
        self._keys = _Document(self._fetch_keys, now)

    async def metadata(self) -> Metadata:
        """Raises ProviderFault."""
        found: Metadata = await self._metadata.get()
        return found

    async def key(self, kid: str | None, issuer: str) -> PublicKey:
        """The one key with this name that may sign for `issuer`; without a name, the only one there is.
        Raises ProviderFault."""
        keys: Sequence[Key] = await self._keys.get()
        found = self._matching(keys, kid, issuer)
        if not found:
            keys = await self._keys.get(newer_than=self._keys.loaded)
            found = self._matching(keys, kid, issuer)
        if len(found) != 1:
            what = f"the name {quoted(kid)}" if kid is not None else "no name"
            raise ProviderFault(
                f"there are {len(found)} keys for {self._algorithm} for a token whose key has {what}"
            )
        return found[0].public

    @staticmethod
    def _matching(keys: Sequence[Key], kid: str | None, issuer: str) -> list[Key]:
        return [
            key
            for key in keys
            if (kid is None or key.kid == kid)
            and (key.issuer is None or key.issuer.replace("{tenantid}", issuer.rsplit("/", 2)[-2]) == issuer)
        ]

    async def _discover(self) -> Metadata:
        url = self._issuer.rstrip("/") + "/.well-known/openid-configuration"
        status, found = await fetch(self._http(), "GET", url, f"the discovery document {url}", tls=self._tls)
        if status != 200:
            raise Unreachable(f"the discovery document {url} answers {status}")
        try:
            return Metadata.from_document(found, self._advertised)
        except ProviderFault as exc:
            raise Misfit(str(exc)) from exc

    async def _fetch_keys(self) -> list[Key]:
        url = (await self.metadata()).jwks_uri
        status, found = await fetch(self._http(), "GET", url, f"the key set {url}", tls=self._tls)
        if status != 200:
            raise Unreachable(f"the key set {url} answers {status}")
        keys = usable_keys(found, self._algorithm)
        if not keys:
            raise ProviderFault(f"the key set {url} has no key for {self._algorithm}")
        return keys
