"""What the edge and a plugin's own process say to each other: frames, and the types of every hook.

A frame is a length (four bytes, big-endian) and a JSON object whose `do` says what it is:

| from | do | with |
|---|---|---|
| edge | load | section, position, line, file, use, name, settings, secrets, limits, readable, writable |
| process | loaded | name, interactive, label, needs_proof, private_headers, hooks |
| process | refused | message, hint: the plugin cannot be loaded |
| edge | start | id, and seed: what `Host.derive_key` rests on; answered as a call is |
| edge | stop | |
| edge | call, cancel | id, hook, args |
| process | answer | id, and value or error (type, text, permanent) |
| process | yield | id, value: one Revocation of a `watch` |
| process | host | id, name, args: a service of the host is asked for; without an id no answer is wanted |
| edge | answer | id, and value or error |
| process | log | level, text |

Arguments and answers are the dataclasses of the plugin API, written and read by their types: what comes out of the
process is checked field by field, and is data only.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import orjson
from pydantic import TypeAdapter

from guestpass.model import Candidate, Event, Identity, Revocation, Session, Share
from guestpass.plugin import (
    Choice,
    Client,
    Edits,
    Form,
    Message,
    Redirect,
    RequestContext,
    Static,
    Step,
    Unproven,
)

# A request's head is 32 KiB at most, a value of the storage 64 KiB: this is far beyond both.
MAX_FRAME = 1 << 20

LENGTH = struct.Struct(">I")


class WireError(Exception):
    """What came is not of the protocol."""


@dataclass(frozen=True, slots=True)
class WireSignIn:
    """A `SignIn` without its function, which is asked for by the id of the call."""

    flow_id: str
    share: Share | None
    client: Client
    state: Mapping[str, Any]
    callback_url: str
    link: str = ""
    headers: Sequence[tuple[str, str]] = ()
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Hook:
    args: tuple[Any, ...]
    answer: Any


# kind → hook → types. `watch` yields its answer again and again.
HOOKS: Mapping[str, Mapping[str, Hook]] = {
    "authenticator": {
        "begin": Hook((WireSignIn,), Step),
        "complete": Hook((WireSignIn, Mapping[str, str]), Step),
        "prove": Hook((WireSignIn, str), Step),
        "identify": Hook((RequestContext,), Identity | None),
    },
    "revoker": {
        "check": Hook((Share, Session), Revocation | None),
        "watch": Hook((), Revocation),
    },
    "backend-chooser": {"choose": Hook((Choice,), Candidate | None)},
    "request-filter": {
        "compile": Hook((Share, Session), Static | None),
        "on_request": Hook((RequestContext,), Edits | None),
    },
    "notifier": {
        "accepts": Hook((Message,), bool),
        "deliver": Hook((Message,), str),
    },
    "observer": {"on_event": Hook((Event,), None)},
}

# Services of the host that are asked for over the wire: the types of their arguments and of their answer.
SERVICES: Mapping[str, Hook] = {
    "storage.get": Hook((str,), Any),
    "storage.set": Hook((str, Any, float | None), None),
    "storage.delete": Hook((str,), bool),
    "storage.add": Hook((str, int, float | None), int),
    "storage.take": Hook((str,), Any),
    "notify": Hook((Message,), None),
    "emit": Hook((Event,), None),
    "record": Hook((Event,), None),
    "resolve_token": Hook((str,), Identity | None),
    "live_sessions": Hook((str,), list[Session]),
    "idle_sessions": Hook((float, bool), list[Session]),
    "end_session": Hook((str, str), None),
    "sign_out": Hook((str, str, bool), int),
    "address_of": Hook((str, str), str | None),
    "is_invited": Hook((int, str), bool),
}

# A union of dataclasses is written with the name of the one that it is.
STEPS: Mapping[str, type] = {"Form": Form, "Redirect": Redirect, "Identity": Identity, "Unproven": Unproven}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def dump(kind: Any, value: Any) -> Any:
    """JSON-able. Raises WireError when `value` is not a `kind`."""
    try:
        if kind is Step:
            name = type(value).__name__
            return {name: _adapter(STEPS[name]).dump_python(value, mode="json", warnings="error")}
        return _adapter(kind).dump_python(value, mode="json", warnings="error")
    except KeyError as exc:
        raise WireError(f"{type(value).__name__} is not a step") from exc
    except (ValueError, TypeError, AttributeError) as exc:
        raise WireError(
            f"{type(value).__name__} is not what is expected: {' '.join(str(exc).split())}"
        ) from exc


def load(kind: Any, value: Any) -> Any:
    """Raises WireError."""
    try:
        if kind is Step:
            ((name, inner),) = value.items()
            return _adapter(STEPS[name]).validate_python(inner)
        # From JSON, where lists stand for tuples and text for addresses.
        return _adapter(kind).validate_json(orjson.dumps(value))
    except (KeyError, ValueError, TypeError, AttributeError) as exc:
        raise WireError(f"not what is expected: {' '.join(str(exc).split())}") from exc


def pack(message: Mapping[str, Any]) -> bytes:
    """Raises WireError."""
    try:
        data = orjson.dumps(message)
    except TypeError as exc:  # what JSON cannot say: lone surrogates, say
        raise WireError(str(exc)) from exc
    if len(data) > MAX_FRAME:
        raise WireError(f"{len(data)} bytes in one message, {MAX_FRAME} are allowed")
    return LENGTH.pack(len(data)) + data


def unpack(data: bytes) -> dict[str, Any]:
    """Of one frame's body. Raises WireError."""
    try:
        message = orjson.loads(data)
    except ValueError as exc:
        raise WireError(str(exc)) from exc
    if not isinstance(message, dict):
        raise WireError("not an object")
    return message


@dataclass(slots=True)
class Frames:
    """Bytes in pieces of any size → messages."""

    _held: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Raises WireError."""
        self._held += data
        found = []
        while len(self._held) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._held)
            if size > MAX_FRAME:
                raise WireError(f"a message of {size} bytes, {MAX_FRAME} are allowed")
            end = LENGTH.size + size
            if len(self._held) < end:
                break
            found.append(unpack(bytes(self._held[LENGTH.size : end])))
            del self._held[:end]
        return found
