"""`rate-limit`: so many requests, and then 429 with Retry-After.

A token bucket: `burst` requests at once, refilled at `per_second`. A page of an application is often dozens of
requests, so the burst should be a page or two, and the rate what a person at work does.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from guestpass.plugin import Rate, RequestFilter, Session, Share, Static
from guestpass_plugins.filter.where import Where

__all__ = ["RateLimit"]


class RateLimit(RequestFilter):
    class Config(Where):
        per_second: float = Field(gt=0, le=1_000_000)
        burst: int = Field(ge=1, le=1_000_000)
        each: Literal["session", "recipient", "share"] = "session"
        message: str = "Too many requests. Please wait a moment."

    def compile(self, share: Share, session: Session) -> Static | None:
        if not self.config.covers(share):
            return None
        rate = Rate(self.config.per_second, self.config.burst, each=self.config.each)
        return Static(rate=rate, message=self.config.message)
