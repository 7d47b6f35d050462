"""Two network namespaces with a cable between them, for faults of networks. Needs root, iproute2 and nftables.

    edge side  10.203.0.1 ── veth ── 10.203.0.2  gateway side

Nothing of the machine's own network is touched: addresses, filters and shaping live in the namespaces and go with them.
The test itself enters the edge's side, so that its own sockets and the programs that it starts are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

EDGE_ADDRESS = "10.203.0.1"
GATEWAY_ADDRESS = "10.203.0.2"

CLONE_NEWNET = 0x40000000

# The filter of the gateway's side: what is to happen to packets that leave, and that arrive, over the cable.
FILTER = """
table inet fault
delete table inet fault
table inet fault {{
    chain leaving {{ type filter hook output priority 0; {leaving}; }}
    chain arriving {{ type filter hook input priority 0; {arriving}; }}
}}
"""


TBF = ("burst", "32kb", "latency", "50ms", "rate")


def run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip().partition(chr(10))[0]}"
    return done.stdout


@cache
def why_not() -> str:
    """Why this machine cannot make namespaces; "" if it can."""
    for program, package in (("ip", "iproute2"), ("nft", "nftables"), ("tc", "iproute2")):
        if shutil.which(program) is None:
            return f"there is no {program}: apt-get install {package}"
    if os.geteuid() != 0:
        return "it needs root"
    try:
        with Network() as network:
            run("ip", "netns", "exec", network.gateway, "nft", "add", "table", "inet", "fault")
            run("tc", "-n", network.edge, "qdisc", "replace", "dev", "lo", "root", "tbf", *TBF, "1mbit")
    except AssertionError as exc:
        return str(exc)
    return ""


class Network:
    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.edge = f"gp-e-{tag}"
        self.gateway = f"gp-g-{tag}"
        self._cable = (f"gpe{tag}", f"gpg{tag}")

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def _make(self) -> None:
        here, there = self._cable
        for name in (self.edge, self.gateway):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            "ip",
            "link",
            "add",
            here,
            "netns",
            self.edge,
            "type",
            "veth",
            "peer",
            there,
            "netns",
            self.gateway,
        )
        for name, device, address in (
            (self.edge, here, EDGE_ADDRESS),
            (self.gateway, there, GATEWAY_ADDRESS),
        ):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")

    def _remove(self) -> None:
        for name in (self.edge, self.gateway):
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, timeout=20, check=False)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def at_gateway(self, command: Sequence[str | Path]) -> list[str | Path]:
        """`command` for the gateway's side."""
        return ["ip", "netns", "exec", self.gateway, *command]

    def at_edge(self, command: Sequence[str | Path]) -> list[str | Path]:
        """`command` for the edge's side."""
        return ["ip", "netns", "exec", self.edge, *command]

    @contextlib.contextmanager
    def entered(self, *, gateway: bool = False) -> Iterator[None]:
        """The calling thread, what it starts, and the sockets that it makes, are on the edge's (the gateway's) side."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(f"/run/netns/{self.gateway if gateway else self.edge}")
            try:
                yield
            finally:
                _enter(f"/proc/self/fd/{own}")
        finally:
            os.close(own)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────

    def filter(self, *, leaving: str = "", arriving: str = "") -> None:
        """Rules for packets over the cable, as seen from the gateway."""
        device = self._cable[1]
        text = FILTER.format(
            leaving=leaving and f'oifname "{device}" {leaving}',
            arriving=arriving and f'iifname "{device}" {arriving}',
        )
        run("ip", "netns", "exec", self.gateway, "nft", "-f", "-", stdin=text)

    def block(self) -> None:
        """Everything is lost, and nobody is told."""
        self.filter(leaving="drop", arriving="drop")

    def cut(self) -> None:
        """Nothing gets through, connections are reset: what a router does that has lost its line."""
        self.filter(
            leaving="tcp flags & rst != rst reject with tcp reset",
            arriving="tcp flags & rst != rst reject with tcp reset",
        )

    def open(self) -> None:
        self.filter()

    def link(self, *, up: bool) -> None:
        """Pull the cable at the gateway, or put it in."""
        run("ip", "-n", self.gateway, "link", "set", self._cable[1], "up" if up else "down")

    def bandwidth(self, megabits: int) -> None:
        """Of each direction, by tbf."""
        for name, device in zip((self.edge, self.gateway), self._cable, strict=True):
            run(
                *("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf"),
                *(*TBF, f"{megabits}mbit"),
            )


def _enter(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns", path)
