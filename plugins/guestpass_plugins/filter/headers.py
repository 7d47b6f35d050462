"""`headers`: sets and removes fields of the requests that an application gets.

`set` replaces what the visitor sent under that name. A value may name who is there, in braces: `{email}`, `{share}`,
`{session}`. Names that decide how a message is framed, and those in which the edge vouches for something, are refused.
"""

from __future__ import annotations

import re
from itertools import product
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from guestpass.plugin import Edits, RequestFilter, Session, Share, Static
from guestpass_plugins.filter.where import Where

__all__ = ["Headers"]

# RFC 9110 §5.1 and §5.5; a configuration is text, so values are visible ASCII.
NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
VALUE = re.compile(r"[\t\x20-\x7e]*")
PLACEHOLDER = re.compile(r"\{([a-z]*)\}")
PLACEHOLDERS = ("email", "share", "session")

# What a message is made of, where it goes and who sends it (RFC 9112 §6, RFC 9110 §7): the relay's affair.
FRAMING = frozenset(
    ("connection", "content-length", "expect", "forwarded", "host", "keep-alive", "proxy-authenticate")
    + ("proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "via")
)
# Who the visitor is, as the edge proved it.
VOUCHED = ("x-guestpass-", "x-forwarded-")

# Filters together may add five fields; see `Static`.
MAX_SET = 5

# Servers that put fields into variables (CGI, WSGI) take `X_Team` for `X-Team`: every spelling is removed. With more
# separators there would be too many of them.
MAX_SEPARATORS = 4
SEPARATORS = "-_"


def _name(name: str) -> str:
    folded = re.sub(r"[^a-z0-9]", "-", name.lower())
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a header field")
    if folded in FRAMING or folded.startswith(VOUCHED):
        raise ValueError(f"{name} is the edge's own, a filter cannot change it")
    if folded.count("-") > MAX_SEPARATORS:
        raise ValueError(f"{name} has more than {MAX_SEPARATORS} separators")
    return name


def spellings(name: str) -> list[str]:
    """The name with each separator in each way."""
    parts = re.split(r"[-_]", name)
    return [
        parts[0] + "".join(map(str.__add__, separators, parts[1:]))
        for separators in product(SEPARATORS, repeat=len(parts) - 1)
    ]


def _value(value: str) -> str:
    if not VALUE.fullmatch(value):
        raise ValueError(f"{value!r} has a character that a header field cannot hold")
    for found in PLACEHOLDER.findall(value):
        if found not in PLACEHOLDERS:
            raise ValueError(f"there is no {{{found}}}: known are {{email}}, {{share}}, {{session}}")
    return value


Name = Annotated[str, AfterValidator(_name)]
Value = Annotated[str, AfterValidator(_value)]


class Headers(RequestFilter):
    class Config(Where):
        set: dict[Name, Value] = Field(default={}, max_length=MAX_SET)
        remove: tuple[Name, ...] = ()

        @model_validator(mode="after")
        def _does_something(self) -> Headers.Config:
            if not self.set and not self.remove:
                raise ValueError("it neither sets nor removes anything")
            return self

    def compile(self, share: Share, session: Session) -> Static | None:
        if not self.config.covers(share):
            return None
        known = {"email": session.email, "share": share.id, "session": session.id}
        add = tuple(
            (name, PLACEHOLDER.sub(lambda match: known[match[1]], value))
            for name, value in self.config.set.items()
        )
        remove = frozenset(s for name in (*self.config.remove, *self.config.set) for s in spellings(name))
        return Static(edits=Edits(remove=remove, add=add))
