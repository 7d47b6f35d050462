"""A simulation of BackendChoosers: the plugins themselves, with candidates instead of gateways.

People come and go: each has sessions, each session one live stream, and a session stays with its gateway while that one
is there, as at an edge. One gateway leaves in the middle and comes back later. What is looked at:

* *balance*: the busiest gateway's streams over the mean of those that serve;
* *moved*: sessions that had to change their gateway when one left or came;
* *same again*: how many people's next session reaches the gateway that their last one had.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random as Generator
from typing import Any

from guestpass.model import Candidate, Session, SessionKind, Share
from guestpass.plugin import BackendChooser, Choice
from guestpass_plugins.choose.consistent_hash import ConsistentHash
from guestpass_plugins.choose.failover import Failover
from guestpass_plugins.choose.least_loaded import LeastLoaded
from guestpass_plugins.choose.random import Random
from guestpass_plugins.choose.weighted import Weighted

SITE = "plant"
SHARE = Share("s1", "n", SITE, "dash", "/", (), "o", "", 0.0, None, None)

CHOOSERS: Mapping[str, type[BackendChooser]] = {
    "random": Random,
    "least-loaded": LeastLoaded,
    "weighted": Weighted,
    "consistent-hash": ConsistentHash,
    "failover": Failover,
}

GATEWAYS = 8
PEOPLE = 2_000
SESSIONS = 4_000
LEAVER = "g2"
# Between two looks so many sessions end and as many begin; the gateway is away between the two looks that are named.
STEP = 200
LEAVES, RETURNS, LOOKS = 40, 80, 120


def gateways() -> list[Candidate]:
    """Alike; for `failover` the first half has the better rank."""
    return [
        Candidate(SITE, f"g{n}", rtt=0.01, labels={"priority": "1" if n < GATEWAYS // 2 else "2"})
        for n in range(GATEWAYS)
    ]


@dataclass
class Place:
    """One site with its sessions."""

    chooser: BackendChooser
    generator: Generator
    candidates: dict[str, Candidate] = field(default_factory=lambda: {c.name: c for c in gateways()})
    sessions: dict[str, tuple[Session, str]] = field(default_factory=dict)
    streams: Counter[str] = field(default_factory=Counter)
    last: dict[str, str] = field(default_factory=dict)  # person → gateway of their last session
    begun: int = 0

    def choose(self, session: Session) -> str:
        candidates = [replace(c, streams=self.streams[c.name]) for c in self.candidates.values()]
        chosen = self.chooser.choose(Choice(SHARE, session, candidates))
        assert not inspect.isawaitable(chosen)
        assert chosen in candidates
        return chosen.name

    def begin(self, email: str) -> str:
        self.begun += 1
        name = f"e{self.begun}"
        session = Session(name, "s1", email, email, SessionKind.COOKIE, "p", 0.0, 0.0, None, "c")
        gateway = self.choose(session)
        self.sessions[name] = (session, gateway)
        self.streams[gateway] += 1
        self.last[email] = gateway
        return gateway

    def churn(self, number: int) -> float:
        """So many sessions end and begin; returns how many of those people met their gateway again."""
        for name in self.generator.sample(sorted(self.sessions), min(number, len(self.sessions))):
            _, gateway = self.sessions.pop(name)
            self.streams[gateway] -= 1
        again = known = 0
        for _ in range(number):
            email = f"p{self.generator.randrange(PEOPLE)}@example.org"
            before = self.last.get(email)
            gateway = self.begin(email)
            known += before is not None
            again += before == gateway
        return again / max(known, 1)

    def leave(self, gateway: str) -> dict[str, tuple[str, str]]:
        """The gateway is gone; its sessions choose again. Returns session → (from, to)."""
        del self.candidates[gateway]
        moved = {}
        for name, (session, at) in list(self.sessions.items()):
            if at not in self.candidates:
                self.streams[at] -= 1
                to = self.choose(session)
                self.streams[to] += 1
                self.sessions[name] = (session, to)
                moved[name] = (at, to)
        return moved

    def balance(self) -> float:
        counts = [self.streams[name] for name in self.serving()]
        return max(counts) / (sum(counts) / len(counts))

    def serving(self) -> list[str]:
        """Where sessions go: with `failover` the best rank that is there."""
        if not isinstance(self.chooser, Failover):
            return list(self.candidates)
        best = min(c.labels["priority"] for c in self.candidates.values())
        return [c.name for c in self.candidates.values() if c.labels["priority"] == best]


@dataclass(frozen=True)
class Run:
    name: str
    balance: list[float]
    again: list[float]
    moved: int  # when the gateway left
    of: int  # sessions that it had


def simulate(name: str, seed: int = 1, **settings: Any) -> Run:
    """The whole story with one chooser. The same seed gives the same numbers."""
    cls = CHOOSERS[name]
    chooser = cls(name, cls.Config(**settings))
    generator = Generator(seed)
    if hasattr(chooser, "generator"):
        chooser.generator = Generator(seed + 1)
    place = Place(chooser, generator)
    place.churn(SESSIONS)
    balance: list[float] = []
    again: list[float] = []
    moved = of = 0
    for look in range(LOOKS):
        if look == LEAVES:
            of = place.streams[LEAVER]
            moved = len(place.leave(LEAVER))
        if look == RETURNS:
            place.candidates[LEAVER] = next(c for c in gateways() if c.name == LEAVER)
        again.append(place.churn(STEP))
        balance.append(place.balance())
    return Run(name, balance, again, moved, of)
