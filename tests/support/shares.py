"""A share service on a real store in a folder of the test's own, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from guestpass.edge.events import EventHub
from guestpass.model import Event, Revocation, Revoked, SessionKind
from guestpass.plugin import Client, Message
from guestpass.shares.bus import Bus
from guestpass.shares.service import NOTHING_REVOKED, NewShare, ShareService
from guestpass.shares.store import Store, mail
from guestpass.tokens import digest

PUBLIC_URL = "https://share.example.com"
BROWSER = Client("203.0.113.7", "Mozilla/5.0")


class Clock:
    """2026-08-01T12:00:00Z, until it is moved."""

    def __init__(self) -> None:
        self.at = 1785585600.0

    def __call__(self) -> float:
        return self.at

    def forward(self, seconds: float) -> float:
        self.at += seconds
        return self.at


@dataclass
class World:
    store: Store
    bus: Bus
    service: ShareService
    events: EventHub
    clock: Clock
    happened: list[Event] = field(default_factory=list)
    revocations: list[Revocation] = field(default_factory=list)
    grants: Revoked = NOTHING_REVOKED  # what every revocation ends, as the grant table would say

    def revoke(self, revocation: Revocation) -> Revoked:
        self.revocations.append(revocation)
        return self.grants

    def emit(self, event: Event) -> None:
        self.happened.append(event)
        self.events.emit(event)

    def types(self) -> list[str]:
        return [event.type for event in self.happened]

    async def queued(self) -> list[Message]:
        """Mail that waits, in the order in which it would go out."""
        found = await self.store.read(lambda db: mail.due(db, float("inf"), 1000, frozenset()))
        return [item.message for item in found]

    async def sign_in(self, share_id: str, email: str) -> tuple[str, bytes]:
        """A session by cookie: its id and the digest of its secret."""
        session, secret = await self.service.open_session(
            share_id, email, SessionKind.COOKIE, "email-code", BROWSER
        )
        return session.id, digest(secret)


def new(*to: str, **fields: object) -> NewShare:
    given: dict[str, object] = {
        "site": "plant-a",
        "service": "dashboards",
        "to": to or ("alice@example.org",),
    }
    return NewShare(**{**given, **fields})  # type: ignore[arg-type]


def secret_of(link: str) -> str:
    assert link.startswith(f"{PUBLIC_URL}/s/")
    return link.removeprefix(f"{PUBLIC_URL}/s/")


@asynccontextmanager
async def world(folder: Path, clock: Clock | None = None) -> AsyncIterator[World]:
    clock = clock or Clock()
    store = await Store.open(folder / "edge.db")
    bus, events = Bus(), EventHub()
    service = ShareService(
        store,
        bus,
        now=clock,
        emit=lambda event: made.emit(event),
        public_url=PUBLIC_URL,
        share_origin=lambda share_id: f"https://{share_id}.share.example.com",
        default_owner="Olga Owner",
    )
    made = World(store, bus, service, events, clock)
    bus.subscribe(made.revoke)
    try:
        yield made
    finally:
        events.close()
        await service.close()
        await store.close()
