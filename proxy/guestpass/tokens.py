"""Random identifiers and secrets. Secrets are stored as SHA-256 only: they have 192 bits or more of entropy, so a slow
hash would add nothing; numeric codes are not made here."""

from __future__ import annotations

import base64
import hashlib
import secrets

# Every bearer token of ours begins like this; others pass to the application untouched.
BEARER_PREFIX = "gp_"
JOIN_PREFIX = "gpj_"
API_KEY_PREFIX = "gpk_"


def new_id() -> str:
    """80 random bits as 16 lower-case letters and digits: fits a DNS label, begins with a letter."""
    return "s" + base64.b32encode(secrets.token_bytes(10)).decode("ascii").lower()[:15]


def new_secret(prefix: str = "") -> str:
    """256 random bits, URL-safe, after `prefix`."""
    return prefix + secrets.token_urlsafe(32)


def digest(secret: str) -> bytes:
    """What is stored of a secret: 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
