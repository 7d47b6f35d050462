"""Signed identity towards the application: `X-Guestpass-Assertion`, an EdDSA JWT (RFC 8037), and its JWKS.

An application that trusts nothing on its network verifies the assertion; one that is reached by the gateway alone may
read `X-Guestpass-Email`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

import jwt
import orjson
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guestpass.edge.grants import Grant
from guestpass.errors import ConfigError

# An assertion is made for a session and reused: long enough that signing costs nothing per request, short enough
# that one that leaks from an application's log is soon worthless.
LIFETIME = 600.0
REUSE = 300.0


class Signer:
    """Signs assertions with the key in `path` (PKCS8 PEM, made when absent, mode 0600). Raises ConfigError."""

    def __init__(self, path: Path, issuer: str) -> None:
        self._issuer = issuer
        self._key = _load_or_make(path)
        public = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        x = base64.urlsafe_b64encode(public).rstrip(b"=").decode("ascii")
        # RFC 7638 thumbprint of an OKP key (RFC 8037 §2): members in lexicographic order, no white space.
        canonical = orjson.dumps({"crv": "Ed25519", "kty": "OKP", "x": x})
        self.key_id = (
            base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode("ascii")
        )
        self.jwks: dict[str, Any] = {
            "keys": [
                {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": self.key_id, "use": "sig", "alg": "EdDSA"}
            ]
        }

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
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": self.key_id})

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


def _load_or_make(path: Path) -> Ed25519PrivateKey:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(path, pem)
        return key
    except OSError as exc:
        raise ConfigError(
            f"cannot read the signing key {path}: {exc.strerror}", hint="Check its rights."
        ) from exc
    try:
        loaded = serialization.load_pem_private_key(data, None)
    except ValueError as exc:
        raise ConfigError(
            f"{path} is not a PEM private key", hint="Remove it to have a new one made."
        ) from exc
    if not isinstance(loaded, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key", hint="Remove it to have a new one made.")
    return loaded


def write_private(path: Path, data: bytes) -> None:
    """Write a new secret file with mode 0600, whole or not at all. Raises ConfigError."""
    # Not by the process's id: in a container that is the same at each start, and what a crash left would be in the way.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}", hint="Check the folder's rights.") from exc
