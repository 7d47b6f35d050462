"""A passkey in software: makes and uses credentials as a browser with a platform authenticator does, or, where told so,
as one that lies."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

USER_PRESENT, USER_VERIFIED, ATTESTED = 0x01, 0x04, 0x40


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "==")


@dataclass
class Authenticator:
    origin: str
    flags: int = USER_PRESENT | USER_VERIFIED
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    handle: bytes = b""
    count: int = 0

    def make(self, options: dict[str, Any], **lies: Any) -> str:
        self.handle = decoded(options["user"]["id"])
        numbers = self.key.public_key().public_numbers()
        public = {
            1: 2,
            3: -7,
            -1: 1,
            -2: numbers.x.to_bytes(32, "big"),
            -3: numbers.y.to_bytes(32, "big"),
        }
        data = (
            self._data(lies.get("rp", options["rp"]["id"]), lies.get("flags", self.flags) | ATTESTED)
            + bytes(16)
            + len(self.id).to_bytes(2, "big")
            + self.id
            + cbor2.dumps(public)
        )
        attestation = cbor2.dumps({"fmt": "none", "attStmt": {}, "authData": data})
        return self._answer(
            {
                "clientDataJSON": b64(self._client("webauthn.create", options, lies)),
                "attestationObject": b64(attestation),
            }
        )

    def use(self, options: dict[str, Any], **lies: Any) -> str:
        self.count += 1
        data = self._data(lies.get("rp", options["rpId"]), lies.get("flags", self.flags))
        client = self._client("webauthn.get", options, lies)
        key: ec.EllipticCurvePrivateKey = lies.get("key", self.key)
        signature = key.sign(data + hashlib.sha256(client).digest(), ec.ECDSA(hashes.SHA256()))
        return self._answer(
            {
                "clientDataJSON": b64(client),
                "authenticatorData": b64(data),
                "signature": b64(signature),
                "userHandle": b64(lies.get("handle", self.handle)),
            }
        )

    def _data(self, domain: str, flags: int) -> bytes:
        return hashlib.sha256(domain.encode()).digest() + bytes([flags]) + self.count.to_bytes(4, "big")

    def _client(self, kind: str, options: dict[str, Any], lies: dict[str, Any]) -> bytes:
        found = {
            "type": lies.get("kind", kind),
            "challenge": lies.get("challenge", options["challenge"]),
            "origin": lies.get("origin", self.origin),
            "crossOrigin": False,
        }
        return json.dumps(found).encode()

    def _answer(self, response: dict[str, str]) -> str:
        return json.dumps(
            {"id": b64(self.id), "rawId": b64(self.id), "type": "public-key", "response": response}
        )
