"""The keys that sign assertions, and how one follows another.

All of them are in one file of the state folder, which every process of the edge reads:

    {"keys": [{"signs_from": 1754000000.0, "pem": "-----BEGIN PRIVATE KEY-----…"}, …]}      in the order of signs_from

Which key signs at a moment follows from the file alone: the last whose `signs_from` has come. So processes agree
without talking to each other, and a restart changes nothing.

    ──────────────┬── PUBLISH_AHEAD ──┬──────────────────────────┬─────────
    old:   signs  │      signs        │  published, KEEP         │  gone
    new:          │    published      │  signs                   │  signs

A new key is published before it signs, for longer than anybody keeps the key set (JWKS_SECONDS) and than a process
needs to see the file's change (one sweep); an old one stays until the last assertion that it signed has expired.
Whoever changes the file holds a lock on another beside it, reads again, and replaces it whole.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guestpass.errors import ConfigError

log = logging.getLogger("guestpass.edge.keys")

FILE = "assertion-keys.json"

# What the first versions had: one key. It becomes the first of the file.
SINGLE_KEY = "assertion.key"

# How long an assertion is good; long enough that it is made for a session and not for a request, short enough that one
# that leaks from an application's log is soon worthless.
LIFETIME = 600.0

# How long others may keep the key set (Cache-Control).
JWKS_SECONDS = 300

# Twelve times that: also libraries that refresh by their own clock, and a clock that is some minutes off.
PUBLISH_AHEAD = 3600.0

# An assertion's lifetime, and as much again for clocks that differ.
KEEP = 2 * LIFETIME

DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One key. `id` is the RFC 7638 thumbprint."""

    signs_from: float
    key: Ed25519PrivateKey = field(repr=False)
    id: str
    x: str

    @classmethod
    def of(cls, key: Ed25519PrivateKey, signs_from: float) -> SigningKey:
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        x = _base64url(raw)
        # Of an OKP key (RFC 8037 §2): members in lexicographic order, no white space.
        canonical = orjson.dumps({"crv": "Ed25519", "kty": "OKP", "x": x})
        return cls(signs_from, key, _base64url(hashlib.sha256(canonical).digest()), x)

    @classmethod
    def new(cls, signs_from: float) -> SigningKey:
        return cls.of(Ed25519PrivateKey.generate(), signs_from)

    @property
    def jwk(self) -> dict[str, str]:
        return {"kty": "OKP", "crv": "Ed25519", "x": self.x, "kid": self.id, "use": "sig", "alg": "EdDSA"}


class KeyRing:
    """The keys of a state folder. `open` before anything else."""

    def __init__(self, folder: Path, *, days: float) -> None:
        """A key signs for `days` before another follows; 0: until `rotate`."""
        self.path = folder / FILE
        self._seconds = days * DAY
        self._keys: tuple[SigningKey, ...] = ()
        self._seen: tuple[int, int, int] | None = None

    def open(self, now: float) -> None:
        """Read the keys, or make the first one. Raises ConfigError."""
        with self._locked():
            if not self.path.exists():
                self._write((self._first(now),))
            self._read()
        single = self.path.with_name(SINGLE_KEY)
        with contextlib.suppress(OSError):  # a folder that is read-only by now: it does no harm
            single.unlink(missing_ok=True)
        self.tick(now)

    def current(self, now: float) -> SigningKey:
        """The one that signs."""
        return next((key for key in reversed(self._keys) if key.signs_from <= now), self._keys[0])

    @property
    def keys(self) -> tuple[SigningKey, ...]:
        return self._keys

    @property
    def jwks(self) -> dict[str, Any]:
        """The public key set (RFC 7517)."""
        return {"keys": [key.jwk for key in self._keys]}

    def tick(self, now: float) -> None:
        """Once a minute: see what another process has changed, and do what is due. Raises ConfigError."""
        if self._stamp() != self._seen:
            self._read()
        if self._due(now) != self._keys:
            with self._locked():
                self._read()
                due = self._due(now)
                if due != self._keys:
                    self._write(due)
                    self._read()
                    log.info("assertions are signed with %s; published: %d", self.current(now).id, len(due))

    def rotate(self, now: float, *, compromised: bool = False) -> SigningKey:
        """Publish a new key now, which signs after PUBLISH_AHEAD; one that waits already is returned. `compromised`:
        it signs at once, and all others are gone. Raises ConfigError."""
        with self._locked():
            self._read()
            if compromised:
                self._write((SigningKey.new(now),))
            elif self._keys[-1].signs_from <= now:
                self._write((*self._keys, SigningKey.new(now + PUBLISH_AHEAD)))
            self._read()
        return self._keys[-1]

    def _due(self, now: float) -> tuple[SigningKey, ...]:
        """The keys as they should be now."""
        signing = self.current(now).signs_from
        keys = self._keys
        if now >= signing + KEEP:
            keys = tuple(key for key in keys if key.signs_from >= signing)
        newest = keys[-1].signs_from
        if self._seconds and newest <= now and now >= newest + self._seconds - PUBLISH_AHEAD:
            keys = (*keys, SigningKey.new(now + PUBLISH_AHEAD))
        return keys

    # ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _first(self, now: float) -> SigningKey:
        single = self.path.with_name(SINGLE_KEY)
        try:
            return SigningKey.of(_load(single.read_bytes(), single), now)
        except FileNotFoundError:
            return SigningKey.new(now)
        except OSError as exc:
            raise ConfigError(
                f"cannot read the signing key {single}: {exc.strerror}", hint="Check its rights."
            ) from exc

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> None:
        stamp = self._stamp()
        try:
            found = orjson.loads(self.path.read_bytes())["keys"]
            keys = [
                SigningKey.of(_load(entry["pem"].encode("ascii"), self.path), float(entry["signs_from"]))
                for entry in found
            ]
        except OSError as exc:
            raise ConfigError(
                f"cannot read the signing keys {self.path}: {exc.strerror}", hint="Check its rights."
            ) from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(
                f"{self.path} does not hold signing keys", hint="Remove it to have a new key made."
            ) from exc
        if not keys:
            raise ConfigError(f"{self.path} holds no key", hint="Remove it to have one made.")
        self._keys = tuple(sorted(keys, key=lambda key: key.signs_from))
        self._seen = stamp

    def _write(self, keys: tuple[SigningKey, ...]) -> None:
        entries = [{"signs_from": key.signs_from, "pem": _pem(key.key)} for key in keys]
        write_private(self.path, orjson.dumps({"keys": entries}, option=orjson.OPT_INDENT_2) + b"\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path.with_name(FILE + ".lock")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(
                f"cannot write {path}: {exc.strerror}", hint="Check the folder's rights."
            ) from exc
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _pem(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode("ascii")


def _load(pem: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        loaded = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as exc:  # TypeError: it has a pass phrase
        raise ConfigError(
            f"{path} is not a PEM private key", hint="Remove it to have a new one made."
        ) from exc
    if not isinstance(loaded, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key", hint="Remove it to have a new one made.")
    return loaded


def write_private(path: Path, data: bytes) -> None:
    """Write a secret file with mode 0600, whole or not at all. Raises ConfigError."""
    # Not by the process's id: in a container that is the same at each start, and what a crash left would be in the way.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {exc.strerror}", hint="Check the folder's rights.") from exc
