"""What runs for every read and write of a tunnel: see wire.pyx. `guestpass.mux.link.Link` is the Python half."""

import asyncio
from collections.abc import Callable
from typing import Any

from guestpass_speedups.session import Session
from guestpass_speedups.websocket import WebSocket

def keep_freed_memory() -> None: ...  # once, in a process whose business is tunnels
def _use_clock(clock: Callable[[], float] | None) -> None: ...  # for tests

class Wire:
    """Half of a protocol. `Link` overrides `_faulty`, `_after_read`, `_received_raw`."""

    session: Session
    end: Any
    bytes_received: int
    bytes_sent: int
    guard: Callable[[], None] | None  # called before what was read is looked at, and before writing: may end streams
    _transport: asyncio.Transport | None
    _websocket: WebSocket
    _end_due: Any
    _paused: bool
    _receiving: bool
    _raw: bool
    _written: int
    def _connect(
        self, transport: asyncio.Transport, call_soon: Callable[..., Any], copies: bool
    ) -> None: ...
    def _disconnect(self) -> None: ...
    def _faulty(self, exc: Exception) -> None: ...
    def _after_read(self) -> None: ...
    def _received_raw(self, data: bytes) -> None: ...
    def get_buffer(self, sizehint: int) -> bytearray: ...
    def buffer_updated(self, size: int) -> None: ...
    def _received(self, buffer: bytearray | memoryview, size: int) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def output_ready(self) -> None: ...
    def _write_frames(self) -> bool: ...
