"""Passkeys as a remembered device: who proved an address with a code may let this device prove it the next times.

A passkey is made right after a code was typed, and belongs to that address. It is discoverable: signing in with it
names no address beforehand, so the page is the same for everybody and tells nobody who has one. What is kept is its
public key, under a digest of its id. Each proves the address for so many days after the code; then a code is asked for
again, since addresses change hands.

The challenge is a keyed hash of the flow: nothing has to be kept for a page that is merely looked at. It is used once,
because a flow is over when somebody is signed in, and since its answer is counted.

Only the edge's main origin is accepted. Pages of shares are below the same domain often, and a browser lets them ask
for the passkey; their origin stands in what is signed, and is refused.

"Forget" counts up a generation of the address: whatever was made before it is not accepted any more, however many
devices there are.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from guestpass.plugin import Event, Host, Passkey, SignIn

# A person looks for a finger or a key.
TIMEOUT_MS = 120_000
# A browser's answer has about a kilobyte; with RSA keys and large ids two.
MAX_CREDENTIAL = 16 << 10
# COSE: ES256, EdDSA, RS256 (Windows Hello), what WebAuthn §5.8.5 recommends.
ALGORITHMS = (-7, -8, -257)
# A challenge is answered once; a second answer may follow a slip of the finger, a tenth not.
MAX_ANSWERS = 5
ANSWERS_SECONDS = 7200.0
DAY = 86_400.0


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


class Passkeys:
    """The passkeys of one edge."""

    def __init__(self, host: Host, days: int) -> None:
        self._host = host
        self._seconds = days * DAY
        self._challenge_key = host.derive_key("passkey challenge")
        self._handle_key = host.derive_key("passkey handle")

    @staticmethod
    def domain(sign_in: SignIn) -> str | None:
        """The relying party's id: the host of the main origin; None where it is an address, which cannot be one."""
        host = urlsplit(sign_in.callback_url).hostname or ""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host or None
        return None

    # ── what the browser is asked ───────────────────────────────────────────────────────────────────────────────

    def to_use(self, sign_in: SignIn) -> Passkey | None:
        domain = self.domain(sign_in)
        if domain is None:
            return None
        options = {
            "challenge": _b64(self._challenge("get", sign_in)),
            "rpId": domain,
            "timeout": TIMEOUT_MS,
            "userVerification": "required",
        }
        return Passkey("get", "Use a passkey of this device", options)

    def to_make(self, sign_in: SignIn, email: str) -> Passkey | None:
        domain = self.domain(sign_in)
        if domain is None:
            return None
        options = {
            "challenge": _b64(self._challenge("create", sign_in)),
            "rp": {"id": domain, "name": "Guestpass"},
            "user": {"id": _b64(self._handle(email)), "name": email, "displayName": email},
            "pubKeyCredParams": [{"type": "public-key", "alg": alg} for alg in ALGORITHMS],
            "authenticatorSelection": {
                "residentKey": "required",
                "requireResidentKey": True,
                "userVerification": "required",
            },
            "attestation": "none",
            "timeout": TIMEOUT_MS,
        }
        return Passkey("create", "Remember this device", options)

    # ── what it answers ─────────────────────────────────────────────────────────────────────────────────────────

    async def make(self, sign_in: SignIn, email: str, credential: str, proven: float) -> bool:
        """Keep the passkey that was made for an address proven at `proven`; whether it was a good one."""
        domain = self.domain(sign_in)
        if domain is None or not await self._may_answer("create", sign_in, credential):
            return False
        library = await _library()
        try:
            made = library.verify_registration_response(
                credential=credential,
                expected_challenge=self._challenge("create", sign_in),
                expected_rp_id=domain,
                expected_origin=_origin(sign_in),
                require_user_verification=True,
            )
        except Exception as exc:  # the parsers beneath raise of all kinds
            self._host.logger.warning("a passkey was not kept: %s: %.200r", type(exc).__name__, str(exc))
            return False
        key = _key(_b64(made.credential_id))
        ttl = proven + self._seconds - self._host.now()
        if ttl <= 0 or await self._host.storage.get(key) is not None:
            return False
        record = {
            "email": email,
            "public_key": _b64(made.credential_public_key),
            "sign_count": made.sign_count,
            "generation": await self._generation(email),
        }
        await self._host.storage.set(key, {**record, "expires": proven + self._seconds}, ttl=ttl)
        await self._host.storage.set(self._about(email, "devices"), True, ttl=ttl)
        self._host.emit(Event("signin.device_remembered", self._host.now(), email))
        return True

    async def use(self, sign_in: SignIn, credential: str) -> str | None:
        """The address that this passkey proves; None for whatever reason it proves none."""
        domain = self.domain(sign_in)
        if domain is None or not await self._may_answer("get", sign_in, credential):
            return None
        library = await _library()
        try:
            parsed = library.helpers.parse_authentication_credential_json(credential)
            key = _key(_b64(parsed.raw_id))
            kept: Mapping[str, Any] | None = await self._host.storage.get(key)
            if kept is None or kept["expires"] <= self._host.now():
                return None
            email: str = kept["email"]
            if parsed.response.user_handle not in (None, self._handle(email)):
                return None
            used = library.verify_authentication_response(
                credential=parsed,
                expected_challenge=self._challenge("get", sign_in),
                expected_rp_id=domain,
                expected_origin=_origin(sign_in),
                credential_public_key=base64.urlsafe_b64decode(kept["public_key"] + "=="),
                credential_current_sign_count=kept["sign_count"],
                require_user_verification=True,
            )
        except Exception as exc:
            self._host.logger.warning("a passkey was refused: %s: %.200r", type(exc).__name__, str(exc))
            return None
        if kept["generation"] != await self._generation(email):
            return None
        ttl = kept["expires"] - self._host.now()
        await self._host.storage.set(key, {**kept, "sign_count": used.new_sign_count}, ttl=ttl)
        return email

    async def exist(self, email: str) -> bool:
        """Whether some device may be remembered for this address."""
        return await self._host.storage.get(self._about(email, "devices")) is not None

    async def forget(self, email: str) -> None:
        """All devices, at once."""
        await self._host.storage.add(self._about(email, "generation"))
        await self._host.storage.delete(self._about(email, "devices"))
        self._host.emit(Event("signin.devices_forgotten", self._host.now(), email))

    async def _generation(self, email: str) -> int:
        return int(await self._host.storage.get(self._about(email, "generation")) or 0)

    async def _may_answer(self, kind: str, sign_in: SignIn, credential: str) -> bool:
        if len(credential) > MAX_CREDENTIAL:
            return False
        counted = await self._host.storage.add(f"passkey-{kind}:{sign_in.flow_id}", ttl=ANSWERS_SECONDS)
        return counted <= MAX_ANSWERS

    def _challenge(self, kind: str, sign_in: SignIn) -> bytes:
        return hmac.digest(self._challenge_key, f"{kind}\0{sign_in.flow_id}".encode(), "sha256")

    def _handle(self, email: str) -> bytes:
        """What the device keeps for the person: always the same, so that a new passkey replaces the old one there, and
        nothing that tells their address."""
        return hmac.digest(self._handle_key, email.encode(), "sha256")

    def _about(self, email: str, what: str) -> str:
        return f"{what}:{self._handle(email).hex()}"


def _key(credential_id: str) -> str:
    return f"passkey:{hashlib.sha256(credential_id.encode('ascii')).hexdigest()}"


def _origin(sign_in: SignIn) -> str:
    parts = urlsplit(sign_in.callback_url)
    default = {"https": 443, "http": 80}.get(parts.scheme)
    host = parts.hostname or ""
    return (
        f"{parts.scheme}://{host}"
        if parts.port in (None, default)
        else f"{parts.scheme}://{host}:{parts.port}"
    )


async def _library() -> Any:
    """Loaded when the first one is used: it takes a tenth of a second, and most edges never see one."""
    return await asyncio.to_thread(_load)


def _load() -> Any:
    import webauthn
    import webauthn.helpers

    return webauthn
