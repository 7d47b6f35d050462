"""`security-events`: an identity provider says that somebody's session or account has ended, and here it ends as well.

A receiver of the OpenID Shared Signals Framework: the transmitter pushes Security Event Tokens (RFC 8417) to
`/.guestpass/hooks/security-events` (RFC 8935), each a JWT that it signed. The order of things:

1. the token is verified: signature by a key of the transmitter's JWKS, with an algorithm of public keys; `typ`
   secevent+jwt; `iss`, `aud`; a `jti` that has not come before; not older than a day;
2. its subject becomes an address: `email`, or `iss_sub` of the authenticator `provider` (whose address that is was
   remembered when they signed in), alone or in a complex subject (SSF) or `aliases`;
3. the event is carried out, durably and on every open connection;
4. only then is the answer 202, and the `jti` kept: a transmitter that got no answer sends again, and nothing is lost.

| event | what happens |
|---|---|
| CAEP session-revoked | all browser sessions of the address end, on all shares; signing in anew is needed |
| CAEP credential-change (revoke, delete), RISC credential-compromise, sessions-revoked | the same |
| RISC account-disabled, account-purged | the same, its bearer tokens end as well, and it is refused from then on |
| RISC account-enabled | it is no longer refused, unless it was disabled after that |
| SSF verification, stream-updated; any other | nothing; acknowledged |

A subject that this edge does not know is acknowledged as well: a transmitter speaks of all of its users. What is
refused gets 400 with an error code of RFC 8935 §2.4; trouble on this side 503, so that the transmitter tries again.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from hashlib import sha256
from typing import Any

import jwt
import orjson
from pydantic import Field, SecretStr

from guestpass.plugin import (
    Host,
    Incoming,
    InvalidEmail,
    PluginConfig,
    Reply,
    Revocation,
    Revoker,
    Secret,
    Session,
    Share,
    canonical_address,
)
from guestpass_plugins.webhook import Url

__all__ = ["SecurityEvents"]

CAEP = "https://schemas.openid.net/secevent/caep/event-type/"
RISC = "https://schemas.openid.net/secevent/risc/event-type/"

# What an event does: end sessions; end them with the tokens and refuse from then on; refuse no longer.
END, DISABLE, ENABLE = "end", "disable", "enable"
EFFECTS: Mapping[str, str] = {
    f"{CAEP}session-revoked": END,
    f"{CAEP}credential-change": END,
    f"{RISC}sessions-revoked": END,
    f"{RISC}credential-compromise": END,
    f"{RISC}account-credential-change-required": END,
    f"{RISC}account-disabled": DISABLE,
    f"{RISC}account-purged": DISABLE,
    f"{RISC}account-enabled": ENABLE,
}
# Of credential-change: a passkey that was added takes nothing from anybody.
HARMLESS_CHANGES = ("create", "update")

# Public keys only: with a shared secret, or none, whoever knows the JWKS could sign.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
TYPE = "secevent+jwt"
MEDIA_TYPE = "application/secevent+jwt"

# A transmitter retries for hours, not for weeks; a jti is remembered for longer than a token is good.
MOST_AGE = 86_400.0
CLOCK_SKEW = 300.0
JTI_SECONDS = 2 * MOST_AGE

# Keys are fetched again after so long, and for a key that is not among them at most once in so long.
JWKS_SECONDS = 3600.0
JWKS_PAUSE = 30.0
MAX_JWKS = 256 * 1024
MAX_KEYS = 64
FETCH_SECONDS = 5.0

REASON = "security_event"


class Refused(Exception):
    """`code` is one of RFC 8935 §2.4."""

    def __init__(self, code: str, description: str) -> None:
        super().__init__(description)
        self.code = code
        self.description = description


class Unavailable(Exception):
    """The transmitter should try again."""


class SecurityEvents(Revoker):
    class Config(PluginConfig):
        issuer: str = Field(min_length=1)
        audience: str = Field(min_length=1)
        jwks_url: Url
        provider: str | None = None
        token: Secret | None = None

    async def start(self, host: Host) -> None:
        await super().start(host)
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched = self._tried = float("-inf")
        self._fetching = asyncio.Lock()
        self._one_at_a_time = asyncio.Lock()
        host.logger.info(
            "security events of %s are taken at %s", self.config.issuer, host.route("", self.push)
        )

    # ── who is refused ───────────────────────────────────────────────────────────────────────────────────────────

    async def check(self, share: Share, session: Session) -> Revocation | None:
        if await self.host.storage.get(_disabled(session.email)) is not None:
            return Revocation("account_disabled", session_id=session.id)
        return None

    # ── the endpoint ─────────────────────────────────────────────────────────────────────────────────────────────

    async def push(self, call: Incoming) -> Reply:
        expected: SecretStr | None = self.config.token
        if expected is not None and not _same(call.header("authorization"), expected.get_secret_value()):
            return _error(
                Refused("authentication_failed", "the Authorization field is not what was agreed"), 401
            )
        media_type = (call.header("content-type") or "").partition(";")[0].strip().lower()
        if media_type != MEDIA_TYPE:
            return _error(Refused("invalid_request", f"the body must be {MEDIA_TYPE}"))
        try:
            claims = await self._verified(call.body)
            # One after the other: a token that comes twice at once is carried out once.
            async with self._one_at_a_time:
                await self._carry_out(claims)
        except Refused as exc:
            self.host.logger.warning("a security event was refused: %s: %s", exc.code, exc.description)
            return _error(exc)
        except Unavailable as exc:
            self.host.logger.error("a security event cannot be verified: %s", exc)
            return Reply(503, headers=(("Retry-After", str(int(JWKS_PAUSE))),))
        return Reply(202)

    async def _verified(self, body: bytes) -> Mapping[str, Any]:
        try:
            token = body.decode("ascii").strip()
            head = jwt.get_unverified_header(token)
        except (UnicodeDecodeError, jwt.InvalidTokenError) as exc:
            raise Refused("invalid_request", "the body is not a JWT") from exc
        if str(head.get("typ", "")).lower().removeprefix("application/") != TYPE:
            raise Refused("invalid_request", f"typ is not {TYPE}")
        algorithm, key_id = head.get("alg"), head.get("kid")
        if algorithm not in ALGORITHMS:
            raise Refused("invalid_key", "the algorithm is not one of public keys")
        key = await self._key(key_id)
        if key is None or algorithm not in _algorithms_of(key):
            raise Refused("invalid_key", "no key of the transmitter fits")
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                options={
                    "require": ["iss", "aud", "iat", "jti", "events"],
                    # Checked below, each with its own error code.
                    "verify_iss": False,
                    "verify_aud": False,
                    "verify_iat": False,
                    "verify_jti": False,
                    "verify_sub": False,
                },
            )
        except jwt.MissingRequiredClaimError as exc:
            raise Refused("invalid_request", f"the claim {exc.claim} is missing") from exc
        except jwt.InvalidTokenError as exc:
            raise Refused("invalid_key", "the signature does not hold") from exc
        if claims["iss"] != self.config.issuer:
            raise Refused("invalid_issuer", "iss is not the transmitter's")
        audience = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
        if self.config.audience not in audience:
            raise Refused("invalid_audience", "aud does not name this receiver")
        issued, now = claims["iat"], self.host.now()
        if isinstance(issued, bool) or not isinstance(issued, int | float):
            raise Refused("invalid_request", "iat is not a time")
        if not now - MOST_AGE <= issued <= now + CLOCK_SKEW:
            raise Refused("invalid_request", "iat is too long ago, or to come")
        if not isinstance(claims["jti"], str) or not 0 < len(claims["jti"]) <= 1000:
            raise Refused("invalid_request", "jti is not a text")
        events = claims["events"]
        if (
            not isinstance(events, dict)
            or not events
            or not all(isinstance(e, dict) for e in events.values())
        ):
            raise Refused("invalid_request", "events is not a table of events")
        return claims

    async def _carry_out(self, claims: Mapping[str, Any]) -> None:
        seen = "jti " + sha256(claims["jti"].encode()).hexdigest()
        if await self.host.storage.get(seen) is not None:
            return  # carried out already; the answer was lost
        for kind, event in claims["events"].items():
            effect = EFFECTS.get(kind)
            if effect is None or event.get("change_type") in HARMLESS_CHANGES:
                continue
            # SSF puts the subject into `sub_id`, the drafts before it into the event.
            addresses = {
                address
                for subject in (claims.get("sub_id"), event.get("subject"))
                for address in [a async for a in self._addresses(subject)]
            }
            for address in sorted(addresses):
                await self._apply(effect, address, float(claims["iat"]))
        await self.host.storage.set(seen, self.host.now(), ttl=JTI_SECONDS)

    async def _apply(self, effect: str, address: str, issued: float) -> None:
        """Of disabling and enabling the later word counts, whichever comes last: what got no answer is sent again."""
        storage = self.host.storage
        disabled, enabled = [await storage.get(key) for key in (_disabled(address), _enabled(address))]
        if effect == ENABLE:
            if disabled is None or issued >= disabled:
                await storage.set(_enabled(address), max(issued, enabled or 0.0), ttl=JTI_SECONDS)
                await storage.delete(_disabled(address))
            return
        if effect == DISABLE and (enabled is None or issued >= enabled):
            # First, or a session could begin after the others have ended.
            await storage.set(_disabled(address), max(issued, disabled or 0.0))
        ended = await self.host.sign_out(address, REASON, tokens=effect == DISABLE)
        self.host.logger.info("a security event ended %d sessions", ended)

    async def _addresses(self, subject: Any) -> AsyncIterator[str]:
        """Addresses that a subject identifier (RFC 9493) names; none for what is not known here."""
        for part in _parts(subject):
            form = str(part.get("format", part.get("subject_type", ""))).replace("-", "_")
            if form == "email" and isinstance(part.get("email"), str):
                try:
                    yield canonical_address(part["email"])
                except InvalidEmail as exc:
                    raise Refused("invalid_request", "the subject's email is not an address") from exc
            elif form == "iss_sub" and self.config.provider is not None:
                if part.get("iss") != self.config.issuer or not isinstance(part.get("sub"), str):
                    continue
                for known_as in _subjects(part["iss"], part["sub"]):
                    address = await self.host.address_of(self.config.provider, known_as)
                    if address is not None:
                        yield address

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _key(self, key_id: str | None) -> jwt.PyJWK | None:
        """The transmitter's key of that id. Raises Unavailable when its keys cannot be had."""
        async with self._fetching:
            now = time.monotonic()
            stale = now - self._fetched > JWKS_SECONDS or key_id not in self._keys
            if stale and now - self._tried > JWKS_PAUSE:
                self._tried = now
                try:
                    self._keys = await self._fetch()
                    self._fetched = now
                except Exception as exc:
                    if not self._keys:
                        raise Unavailable(f"{self.config.jwks_url}: {type(exc).__name__}: {exc}") from exc
                    self.host.logger.warning("%s: %s; the keys before go on", self.config.jwks_url, exc)
            if key_id not in self._keys and self._fetched != now:
                # It may be one that the transmitter has just begun to use.
                raise Unavailable(f"{self.config.jwks_url} was read a moment ago, and the key is not in it")
            return self._keys.get(key_id)

    async def _fetch(self) -> dict[str | None, jwt.PyJWK]:
        async with asyncio.timeout(FETCH_SECONDS):
            async with self.host.http.get(self.config.jwks_url, allow_redirects=False) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}")
                data = await response.content.read(MAX_JWKS + 1)
                while len(data) <= MAX_JWKS and (more := await response.content.read(MAX_JWKS)):
                    data += more
        if len(data) > MAX_JWKS:
            raise ValueError(f"larger than {MAX_JWKS} bytes")
        found: dict[str | None, jwt.PyJWK] = {}
        for entry in orjson.loads(data)["keys"][:MAX_KEYS]:
            if entry.get("kty") == "oct" or entry.get("use", "sig") != "sig":
                continue
            try:
                found[entry.get("kid")] = jwt.PyJWK(entry)
            except (jwt.PyJWKError, jwt.InvalidKeyError):
                continue  # a kind of key that is not known here is no reason to refuse the others
        if not found:
            raise ValueError("there is no key for signatures in it")
        return found


def _parts(subject: Any) -> Iterator[Mapping[str, Any]]:
    """The simple subjects of a simple, a complex, or an `aliases` one."""
    if not isinstance(subject, dict):
        return
    yield subject
    inner = subject.get("identifiers")
    candidates = inner if isinstance(inner, list) else [subject.get("user")]
    yield from (part for part in candidates[:10] if isinstance(part, dict))


def _subjects(issuer: str, subject: str) -> tuple[str, ...]:
    """As what an authenticator may know somebody: `oidc` says the issuer of its ID tokens besides, and that of a
    transmitter may have a slash at its end (Google)."""
    return (subject, f"{issuer} {subject}", f"{issuer.removesuffix('/')} {subject}")


def _algorithms_of(key: jwt.PyJWK) -> tuple[str, ...]:
    """Of the key's own choice where it says so, else those of its type."""
    if isinstance(declared := key._jwk_data.get("alg"), str):
        return (declared,)
    prefixes = {"RSA": ("RS", "PS"), "EC": ("ES",), "OKP": ("Ed",)}.get(key.key_type or "", ())
    return tuple(name for name in ALGORITHMS if name.startswith(prefixes))


def _disabled(email: str) -> str:
    return "disabled " + sha256(email.encode()).hexdigest()


def _enabled(email: str) -> str:
    return "enabled " + sha256(email.encode()).hexdigest()


def _same(given: str | None, expected: str) -> bool:
    """In constant time. `token` may be given with or without its scheme."""
    value = (given or "").encode()
    return hmac.compare_digest(value, expected.encode()) | hmac.compare_digest(
        value, f"Bearer {expected}".encode()
    )


def _error(exc: Refused, status: int = 400) -> Reply:
    return Reply(status, orjson.dumps({"err": exc.code, "description": exc.description}))
