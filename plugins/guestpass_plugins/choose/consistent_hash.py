"""`consistent-hash`: the same person, or the same share, always reaches the same gateway while it is there; for
applications behind several gateways that keep something per user in memory.

Rendezvous hashing (Thaler and Ravishankar, 1998): each gateway gets a score from a hash of the key and its own name,
and the highest one serves. There is no ring to keep and nothing to agree on: any edge, after any restart, comes to
the same answer from the names alone. When a gateway leaves, only its own keys move, to where each had its second-
highest score; when one joins, it takes its share of keys, and no key moves between the others. With `weights`, a
gateway gets keys in proportion to its weight (the logarithmic method of Schindelhauer and Schomaker, 2005), with the
same property.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Literal

from guestpass.plugin import BackendChooser, Candidate, Choice, PluginConfig

__all__ = ["ConsistentHash"]

# A double has 53 bits; the score must be neither 0 nor 1.
BITS = 52


def score(key: str, candidate: Candidate, weight: int) -> float:
    """Greater than 0; a greater weight makes it greater."""
    text = f"{len(key)}:{key}{candidate.site}/{candidate.name}".encode()
    number = int.from_bytes(blake2b(text, digest_size=8, person=b"guestpass-choose").digest(), "big")
    uniform = ((number >> (64 - BITS)) + 0.5) / (1 << BITS)
    return weight / -math.log(uniform)


class ConsistentHash(BackendChooser):
    class Config(PluginConfig):
        key: Literal["recipient", "share", "session"] = "recipient"
        weights: bool = False

    def choose(self, choice: Choice) -> Candidate:
        key = {
            "recipient": choice.session.email,
            "share": choice.share.id,
            "session": choice.session.id,
        }[self.config.key]
        return max(choice.candidates, key=lambda c: (score(key, c, self._weight(c)), c.name))

    def _weight(self, candidate: Candidate) -> int:
        return candidate.weight if self.config.weights else 1
