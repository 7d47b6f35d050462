"""Key-value storage for plugins, each in a namespace of its own (`guestpass.plugin.Storage`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from guestpass.errors import Invalid
from guestpass.shares.store import Store, entries

# Part of the plugin API.
MAX_KEY = 200
MAX_VALUE = 64 << 10

# Counters are 64-bit in SQLite.
MAX_AMOUNT = 1 << 53


def encode(value: Any, what: str) -> bytes:
    """JSON text of at most MAX_VALUE bytes. Raises Invalid."""
    try:
        encoded = orjson.dumps(value)
    except TypeError as exc:
        raise Invalid(
            f"{what} is not JSON: {exc}", hint="Use dicts with text keys, lists, text, numbers, None."
        ) from exc
    if len(encoded) > MAX_VALUE:
        raise Invalid(f"{what} is larger than {MAX_VALUE} bytes of JSON")
    return encoded


class PluginStorage:
    """Durable on return. Raises Invalid for a key or value past the limits, StoreError."""

    def __init__(self, store: Store, plugin: str, now: Callable[[], float]) -> None:
        self._store = store
        self._namespace = f"plugin:{plugin}"
        self._now = now

    async def get(self, key: str) -> Any | None:
        self._check(key)
        return await self._store.read(lambda db: entries.get(db, self._namespace, key, self._now()))

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        self._check(key)
        encoded = encode(value, f"the value of {key!r}")
        expires = self._expiry(ttl)
        await self._store.write(lambda db: entries.put(db, self._namespace, key, encoded, expires))

    async def delete(self, key: str) -> bool:
        """Whether there was one."""
        self._check(key)
        return await self._store.write(lambda db: entries.delete(db, self._namespace, key, self._now()))

    async def add(self, key: str, amount: int = 1, *, ttl: float | None = None) -> int:
        """The sum. Raises Invalid when the value under `key` is not a whole number."""
        self._check(key)
        if abs(amount) > MAX_AMOUNT:
            raise Invalid(f"the amount for {key!r} is too large")
        expires = self._expiry(ttl)
        total = await self._store.write(
            lambda db: entries.add(db, self._namespace, key, amount, self._now(), expires)
        )
        if total is None:
            raise Invalid(f"the value of {key!r} is not a counter", hint="Use another key for it.")
        return total

    async def take(self, key: str) -> Any | None:
        self._check(key)
        value = await self._store.write(lambda db: entries.take(db, self._namespace, key, self._now()))
        return None if value is None else orjson.loads(value)

    def _check(self, key: str) -> None:
        if not 0 < len(key) <= MAX_KEY:
            raise Invalid(
                f"a storage key has 1 to {MAX_KEY} characters", hint="Use a digest of a longer one."
            )

    def _expiry(self, ttl: float | None) -> float | None:
        return None if ttl is None else self._now() + ttl
