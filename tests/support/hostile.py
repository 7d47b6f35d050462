"""An OpenID provider that does what it is told to, right or wrong: for the cases of tests/plugins/test_hostile.py."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from aiohttp import web
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

CLIENT = "guestpass"
SECRET = "the client's secret, which is long enough for a MAC"
EMAIL = "alice@example.org"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def jwk(key: rsa.RSAPrivateKey, kid: str, **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    return {
        "kty": "RSA",
        "kid": kid,
        "use": "sig",
        "alg": "RS256",
        "n": number(public.n),
        "e": number(public.e),
        **more,
    }


def pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


Signer = Callable[[bytes], bytes]


def rs(key: rsa.RSAPrivateKey, digest: Callable[[], hashes.HashAlgorithm] = hashes.SHA256) -> Signer:
    return lambda data: key.sign(data, padding.PKCS1v15(), digest())


def hs(secret: bytes) -> Signer:
    return lambda data: hmac.digest(secret, data, "sha256")


def es(key: ec.EllipticCurvePrivateKey) -> Signer:
    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def tiny_rsa() -> tuple[dict[str, Any], Signer]:
    """A key of 512 bits, which no library makes any more, and who signs with it."""

    def prime() -> int:
        while True:
            found = secrets.randbits(256) | (3 << 254) | 1
            if all(pow(base, found - 1, found) == 1 for base in (2, 3, 5, 7, 11, 13)):
                return found

    p, q = prime(), prime()
    n = p * q
    d = pow(65537, -1, (p - 1) * (q - 1))
    prefix = bytes.fromhex("3031300d060960864801650304020105000420")

    def sign(data: bytes) -> bytes:
        digest = prefix + hashlib.sha256(data).digest()
        block = b"\0\1" + b"\xff" * (64 - 3 - len(digest)) + b"\0" + digest
        return pow(int.from_bytes(block, "big"), d, n).to_bytes(64, "big")

    key = {"kty": "RSA", "kid": "tiny", "use": "sig", "alg": "RS256", "n": number(n), "e": number(65537)}
    return key, sign


@dataclass
class Hostile:
    """What it says. Every field is what an honest provider would say until a case changes it."""

    issuer: str = ""
    nonce: str = ""  # of the sign-in that is under way
    metadata: dict[str, Any] = field(default_factory=dict)
    keys: list[Any] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    raw_header: str | None = None  # JSON, where a dictionary cannot say it
    raw_claims: str | None = None
    sign: Signer = field(default=lambda data: b"")
    rewrite: Callable[[str], object] = field(default=lambda token: token)  # the finished token
    answer: Callable[[dict[str, Any]], object] = field(default=lambda answer: answer)  # of the token endpoint
    replies: dict[str, Callable[[], web.StreamResponse]] = field(default_factory=dict)  # by path, instead
    slow: frozenset[str] = frozenset()
    profile: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    forms: list[Mapping[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        key = rsa_key("good")
        self.metadata = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/jwks",
            "userinfo_endpoint": f"{self.issuer}/userinfo",
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
        }
        self.keys = [jwk(key, "good"), jwk(rsa_key("other"), "other")]
        self.header = {"alg": "RS256", "kid": "good", "typ": "JWT"}
        now = int(time.time())
        self.claims = {
            "iss": self.issuer,
            "sub": "1",
            "aud": CLIENT,
            "iat": now,
            "exp": now + 300,
            "email": EMAIL,
            "email_verified": True,
        }
        self.raw_header = self.raw_claims = None
        self.sign = rs(key)
        self.rewrite = lambda token: token
        self.answer = lambda answer: answer
        self.replies, self.slow = {}, frozenset()
        self.profile = {"user_id": "amzn1.account.1", "email": EMAIL}
        self.asked, self.forms = [], []

    def token(self) -> object:
        claims = {"nonce": self.nonce, **self.claims}
        header_text = self.raw_header if self.raw_header is not None else json.dumps(self.header)
        text = self.raw_claims if self.raw_claims is not None else json.dumps(claims)
        signed = f"{b64(header_text.encode())}.{b64(text.encode('utf-8', 'surrogatepass'))}"
        return self.rewrite(f"{signed}.{b64(self.sign(signed.encode()))}")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if request.path in self.slow:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.05)
        if request.path in self.replies:
            return self.replies[request.path]()
        if request.path.endswith("/.well-known/openid-configuration"):
            return web.json_response(self.metadata)
        if request.path == "/jwks":
            return web.json_response({"keys": self.keys})
        if request.path == "/token":
            self.forms.append({k: str(v) for k, v in (await request.post()).items()})
            answer = {
                "access_token": "at",
                "token_type": "Bearer",
                "expires_in": 300,
                "id_token": self.token(),
            }
            return web.json_response(self.answer(answer))
        if request.path == "/userinfo":
            return web.json_response({"sub": "1", "email": EMAIL, "email_verified": True})
        if request.path == "/profile":
            return web.json_response(self.profile)
        raise web.HTTPNotFound


@asynccontextmanager
async def hostile() -> AsyncIterator[Hostile]:
    found = Hostile()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.issuer = f"http://127.0.0.1:{runner.addresses[0][1]}"
    found.reset()
    try:
        yield found
    finally:
        await runner.cleanup()
