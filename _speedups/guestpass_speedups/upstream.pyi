"""The gateway's side of the fast lane: streams of a tunnel become exchanges with services over HTTP/1.1."""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from guestpass_speedups.session import Session, Stream

class Limits(Protocol):
    """What a Pool reads once. Seconds and counts; each with its reason in gateway/upstream.py."""

    @property
    def response(self) -> float: ...
    @property
    def idle(self) -> float: ...
    @property
    def unsafe_idle(self) -> float: ...
    @property
    def half_closed(self) -> float: ...
    @property
    def interim(self) -> int: ...
    @property
    def idle_connections(self) -> int: ...

class UpstreamStream(Stream):
    """One exchange with a service. Made by `UpstreamSession`."""

    @property
    def pool(self) -> Pool | None: ...
    @property
    def held_bytes(self) -> int: ...  # body from the edge that the service has not taken
    def end(self, code: int) -> None: ...  # give it up: the connection is cut, the edge is told

class UpstreamConnection:
    @property
    def pool(self) -> Pool: ...
    @property
    def idle(self) -> bool: ...
    def __init__(self, pool: Pool, *, half_close: bool = True) -> None: ...  # half_close: False with TLS
    def close(self) -> None: ...

class Connection(UpstreamConnection, asyncio.BufferedProtocol):
    """One connection to a service, read and written by one exchange at a time."""

class Pool:
    """One service: its connections, the streams that use it or wait for it. Subclass it and say how to connect."""

    @property
    def name(self) -> str: ...
    @property
    def streams(self) -> set[UpstreamStream]: ...  # live ones
    @property
    def connections(self) -> list[UpstreamConnection]: ...  # unused ones, the latest used last
    @property
    def connecting(self) -> int: ...  # connections that are being made
    @property
    def closed(self) -> bool: ...
    def __init__(self, name: str, *, host: bytes, origin: bytes, guarded: bool, limits: Limits, loop: Any = None) -> None: ...
    #   host, origin: what the service is called in Host and Origin; empty: as the visitor calls it. guarded: ask `admits`.
    #   loop: call_soon and call_later; by default of the loop that runs when the first stream comes.
    def admits(self, method: bytes, target: bytes) -> bool: ...  # to be overridden, as the next two
    def start_connecting(self) -> None: ...  # make one connection, then call one of the next two, once
    def note(self, code: int, text: str) -> None: ...  # why a stream is about to be reset with `code`
    def connected(self, connection: UpstreamConnection) -> None: ...
    def not_connected(self) -> None: ...
    def sweep(self) -> None: ...  # closes what was not used for too long, and what is too much
    def close(self) -> None: ...  # keeps no connection any more; live streams go on

class Services:
    """What a gateway's sessions may reach, by name."""

    def use(self, pools: Mapping[str, Pool]) -> None: ...  # these from now on
    def unknown(self, service: bytes) -> None: ...  # a stream for a service that is not here is about to be refused

class UpstreamSession(Session):
    """A gateway's session whose streams go to `services`, which is set before the first one. Its handler has no
    `stream_opened`."""

    services: Services
