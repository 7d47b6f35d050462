"""`scope`: limits methods and paths of every share of a site or service, whatever its owner allowed.

The rules are those of a share's own scope: a request must match one of them, and one of the share's as well if it has
any. Where an edge belongs to one person and its shares to others, this is how that person keeps `/admin` out of all.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from guestpass.plugin import Invalid, RequestFilter, Scope, Session, Share, Static, parse_scope
from guestpass_plugins.filter.where import Where

__all__ = ["ScopeFilter"]


def _rule(value: Any) -> Scope:
    try:
        return parse_scope(value)
    except Invalid as exc:
        raise ValueError(f"{exc.message}. {exc.hint}".rstrip(". ")) from exc


class ScopeFilter(RequestFilter):
    class Config(Where):
        allow: tuple[Annotated[Scope, BeforeValidator(_rule)], ...] = Field(min_length=1)
        message: str = "This is not part of what may be shared here."

    def compile(self, share: Share, session: Session) -> Static | None:
        if not self.config.covers(share):
            return None
        return Static(scope=self.config.allow, message=self.config.message)
