"""What a visitor is told, and the operator, when a limit of `[limits]` was reached.

Who keeps the limits: the front and its compiled half (`relay.pyx`) those of connections and of the fast lane, the relay
those of its own requests. Whoever refuses something asks `Refusals` first, which counts it by the limit's name and logs
it. A flood must not fill the disk: of each limit there is one line a second at most, which says how many it stands for.
"""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from guestpass.config import Limits
from guestpass.hosts import client_network

log = logging.getLogger("guestpass.edge.limits")

# How often one limit is logged at most, in seconds.
LOG_SECONDS = 1.0

# Addresses whose client is remembered: half a megabyte.
CLIENTS_KNOWN = 4096

# What those are told to wait who may try again: what they have open must end first.
RETRY_AFTER = 5


@dataclass(frozen=True, slots=True)
class Refused:
    """How a limit shows itself. `status` 0: an answer is under way or nobody reads it, so the connection is cut."""

    status: int
    message: str
    retry: bool = False


# By name. 408: the visitor was too slow (RFC 9110 §15.5.9); 429: it has too much open (RFC 6585); 503: others have.
TABLE: dict[str, Refused] = {
    "head_seconds": Refused(408, "the request's head did not come in time"),
    "head_bytes": Refused(431, "the request's head is too large"),
    "body_bytes": Refused(413, "the request's body is too large"),
    "body_progress_seconds": Refused(408, "the request's body stopped coming"),
    "answer_seconds": Refused(504, "the application did not answer in time"),
    "write_progress_seconds": Refused(0, "the visitor took nothing of its answer"),
    "upgrade_idle_seconds": Refused(0, "nothing came from either side of an upgraded connection"),
    "connections_per_client": Refused(429, "your address has too many connections open", True),
    "streams_per_session": Refused(429, "this session has too many requests under way", True),
    "streams_per_share": Refused(503, "this share has too many requests under way", True),
}


# Asked for each connection.
client_of = functools.lru_cache(CLIENTS_KNOWN)(client_network)


class Refusals:
    """Counts and logs what was refused. One instance per worker."""

    def __init__(
        self,
        limits: Limits,
        *,
        count: Callable[[str], None] = lambda limit: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._count = count
        self._now = now
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def note(self, limit: str, who: str) -> str:
        """`who` was refused by `limit`; returns the id of the error."""
        error_id = secrets.token_hex(4)
        self._count(limit)
        now = self._now()
        if now - self._said.get(limit, -LOG_SECONDS) < LOG_SECONDS:
            self._unsaid[limit] = self._unsaid.get(limit, 0) + 1
            return error_id
        self._said[limit] = now
        others = self._unsaid.pop(limit, 0)
        log.info(
            "error %s: %s: %s: %s (limits.%s = %g)%s",
            error_id,
            TABLE[limit].status or "cut",
            who,
            TABLE[limit].message,
            limit,
            getattr(self.limits, limit),
            f"; {others} more since the last line" if others else "",
        )
        return error_id

    @staticmethod
    def message(limit: str) -> str:
        """For the visitor."""
        return f"{TABLE[limit].message} (limit: {limit})"
