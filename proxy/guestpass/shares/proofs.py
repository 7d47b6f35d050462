"""What is remembered of proofs of an address, beside sessions: whose they were, and since when older ones are void.

A proof is a moment at which somebody showed that an address is theirs. The main origin's session of a browser rests on
one for hours, a hand-over code for a minute. `void` makes every proof of an address from before now worthless: whoever
opens a session asks `holds` *after* the session is in the store, and whoever ends an address's sessions voids first and
lists them afterwards; so of the two, one always sees the other.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from guestpass.model import Identity
from guestpass.plugin import Storage

# Longer than anything rests on a proof (`ME_SECONDS`, `FLOW_SECONDS` of the edge).
VOID_SECONDS = 2 * 86_400.0
# Longer than a browser's session lives.
SUBJECT_SECONDS = 90 * 86_400.0


class Proofs:
    def __init__(self, storage: Storage, now: Callable[[], float]) -> None:
        self._storage = storage
        self._now = now

    async def remember(self, identity: Identity) -> None:
        """Whose address a provider's subject is, from this sign-in on for SUBJECT_SECONDS."""
        if identity.subject:
            key = _subject(identity.provider, identity.subject)
            await self._storage.set(key, identity.email, ttl=SUBJECT_SECONDS)

    async def address_of(self, provider: str, subject: str) -> str | None:
        found = await self._storage.get(_subject(provider, subject))
        return found if isinstance(found, str) else None

    async def void(self, email: str) -> None:
        await self._storage.set(_email(email), self._now(), ttl=VOID_SECONDS)

    async def holds(self, email: str, proven: float) -> bool:
        """Whether a proof of that time still counts."""
        since = await self._storage.get(_email(email))
        return since is None or proven > since


# Digests: an address may be longer than a key.


def _subject(provider: str, subject: str) -> str:
    return "subject " + sha256(f"{len(provider)}:{provider}{subject}".encode()).hexdigest()


def _email(email: str) -> str:
    return "void " + sha256(email.encode()).hexdigest()
