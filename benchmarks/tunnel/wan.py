"""One stream over a long way: 100 ms there and back, 1 Gbit/s, made of network namespaces and a relay of packets.

    edge  10.204.0.1 ── veth ── relay ── veth ── 10.204.0.2  gateway

    python wan.py relay DEVICE DEVICE       runs in the relay's namespace
    python wan.py end DEVICE                runs once in each end's, before all else

The kernel's netem would do it, but many kernels lack it. The relay takes Ethernet frames from one device and puts them
on the other 50 ms later, and not faster than the rate; both ends speak TCP with each other, over the delay, not with
the relay. The devices carry frames of up to 64 KiB, so that Python keeps up with 1 Gbit/s; checksums are made by
software, because a frame that is copied has none when it was to be made by hardware.

TCP's own buffers are as large as the way is long (Linux's defaults end at 6 MiB, which is half of it).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import itertools
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RTT = 0.1
RATE = 125_000_000
MTU = 65_000
# What may wait at the relay for its turn on the line: as much as the line holds in 100 ms.
QUEUE = 12_500_000
ADDRESSES = ("10.204.0.1", "10.204.0.2")
# Highest bound of TCP's buffers at both ends.
TCP_BUFFER = 64 * 1024 * 1024

SECONDS = 7.0
SETTLED = 3.0

SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM = 0x17
ETHTOOL_STSO = 0x1F
ETHTOOL_SGSO = 0x24


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine cannot do it; "" if it can."""
    if shutil.which("ip") is None:
        return "there is no ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with namespaces():
            return ""
    except subprocess.CalledProcessError as exc:
        return f"no network namespaces here: {(exc.stderr or '').strip()}"


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[str, str, str]]:
    """Names of the edge's, the gateway's and the relay's. In the relay's: devices `e` and `g`."""
    tag = secrets.token_hex(3)
    names = (f"gpb-e-{tag}", f"gpb-g-{tag}", f"gpb-r-{tag}")
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        peer = "wan"
        for name, address, device in zip(names, ADDRESSES, "eg", strict=False):
            run(
                "ip",
                "link",
                "add",
                peer,
                "netns",
                name,
                "type",
                "veth",
                "peer",
                "name",
                device,
                "netns",
                names[2],
            )
            run("ip", "-n", name, "link", "set", peer, "mtu", str(MTU), "up")
            run("ip", "-n", names[2], "link", "set", device, "mtu", str(MTU), "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", peer)
            run("ip", "netns", "exec", name, sys.executable, __file__, "end", peer)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def measure(end: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """`end` is run.End. Share of the line's rate that the stream had from SETTLED on."""
    with namespaces() as (edge_side, gateway_side, relay_side):
        relay = subprocess.Popen(
            ["ip", "netns", "exec", relay_side, sys.executable, __file__, "relay", "e", "g"]
        )
        try:
            edge = end(
                "edge", folder, "task", "--host", ADDRESSES[0], before=("ip", "netns", "exec", edge_side)
            )
            try:
                gateway = end(
                    "gateway", folder, "task", "--url", edge.first["url"],
                    before=("ip", "netns", "exec", gateway_side),
                )  # fmt: skip
                try:
                    result: dict[str, Any] = edge.do("timeline", seconds=SECONDS)
                finally:
                    gateway.close()
            finally:
                edge.close()
        finally:
            relay.terminate()
            relay.wait()
    came = result["came"]
    first = next(point for point in came if point[0] >= SETTLED)
    last = came[-1]
    rate = (last[1] - first[1]) / (last[0] - first[0])
    steps = [
        [round(at, 2), round(8 * (b - a) / (at - before) / 1e6)]
        for (before, a), (at, b) in itertools.pairwise(came)
    ]
    return {
        "share": rate / RATE,
        "rtt": result["rtt"],
        "window": result["window"],
        "Mbit/s at": steps,
    }


# ── in the namespaces ────────────────────────────────────────────────────────────────────────────────────────────────


def prepare_end(device: str) -> None:
    """Checksums and segments are made before a frame reaches the device; TCP's buffers hold the whole line."""
    for name in ("tcp_rmem", "tcp_wmem"):
        Path(f"/proc/sys/net/ipv4/{name}").write_text(f"4096 131072 {TCP_BUFFER}\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for what in (ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO):
            value = array.array("B", struct.pack("II", what, 0))
            request = struct.pack("16sP", device.encode(), value.buffer_info()[0])
            fcntl.ioctl(sock, SIOCETHTOOL, request)


class Line:
    """One direction: frames that are on their way, each with the time at which it arrives."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.frames: deque[tuple[float, bytes]] = deque()
        self.free_at = 0.0

    def take(self, now: float) -> None:
        for _ in range(64):
            try:
                frame, address = self.source.recvfrom(MTU + 64)
            except BlockingIOError:
                return
            if address[2] == socket.PACKET_OUTGOING:  # our own
                continue
            self.free_at = max(self.free_at, now)
            if (self.free_at - now) * RATE > QUEUE:
                continue  # as a router drops what its queue does not hold
            self.free_at += len(frame) / RATE
            self.frames.append((self.free_at + RTT / 2, frame))

    def give(self, now: float) -> None:
        while self.frames and self.frames[0][0] <= now:
            frame = self.frames.popleft()[1]
            with contextlib.suppress(OSError):  # the device has gone, or takes no more: lost
                self.target.send(frame)


def relay(first: str, second: str) -> None:
    socks = []
    for device in (first, second):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((device, 0))
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            forced = {socket.SO_RCVBUF: 33, socket.SO_SNDBUF: 32}[option]  # SO_…BUFFORCE
            sock.setsockopt(socket.SOL_SOCKET, forced, 64 * 1024 * 1024)
        socks.append(sock)
    ctypes.CDLL(None).prctl(29, 1)  # PR_SET_TIMERSLACK: wake up when asked to
    lines = (Line(socks[0], socks[1]), Line(socks[1], socks[0]))
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLIN)
    while True:
        due = min((line.frames[0][0] for line in lines if line.frames), default=None)
        poll.poll(None if due is None else max(0.0, (due - time.monotonic()) * 1000))
        now = time.monotonic()
        for line in lines:
            line.take(now)
            line.give(now)


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        relay(*sys.argv[2:])
    else:
        prepare_end(sys.argv[2])
