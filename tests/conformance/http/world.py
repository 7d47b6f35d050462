"""Two edges (the fast lane on, and off), one gateway that serves both, and all origins behind it, as processes.

Whatever a visitor may send is sent as bytes, on plain connections and on TLS ones, and the whole of what comes back is
cut into answers strictly. What the origins saw is in their logs.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from conformance.http.origins import Origin, serving
from support.programs import Program, free_port, wait_until

from guestpass.config import EdgeConfig, load_edge
from guestpass.edge.app import Edge
from guestpass.gateway.enroll import load_or_create_key
from guestpass.local_ca import write_certificates
from guestpass.model import Gateway, Scope
from guestpass.shares.service import NewShare
from guestpass.shares.store import gateways as gateway_rows

SITE = "plant"
EMAIL = "alice@example.org"
LANES = ("fast", "aiohttp")
SCHEMES = ("plain", "tls")
START_SECONDS = 40.0
# For an answer; nothing here takes a tenth of it on a machine that has time.
ANSWER_SECONDS = 20.0
# Shares of every origin: NAME is whole; NAME-limited has these rules at the edge, and the gateway has much the same
# ones for its service; NAME-guarded has only the gateway's.
SCOPE = ("GET /limited/**", "POST /limited/*/comments")
ERROR_ID = re.compile(rb"Error id: ([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    fields: tuple[tuple[str, str], ...]
    body: bytes
    whole: bool = True
    """False: it broke off."""

    def get(self, name: str) -> str | None:
        """The value of a field that may come once."""
        found = self.all(name)
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else None

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    @property
    def seen(self) -> dict[str, Any] | None:
        """What the origin says it read; None: the answer is not an origin's."""
        value = self.get("X-Seen")
        return json.loads(value) if value is not None else None

    @property
    def received(self) -> list[tuple[str, str]]:
        """The fields that the origin received."""
        return [(name, value) for name, value in json.loads(self.body)["fields"]]

    @property
    def error_id(self) -> str | None:
        """Of a refusal of the edge's own."""
        match = ERROR_ID.search(self.body)
        return match[1].decode() if match else None

    @property
    def interim(self) -> bool:
        return 100 <= self.status < 200 and self.status != 101


def cut(data: bytes, methods: Sequence[str]) -> list[Answer]:
    """The answers in `data`, to requests of these methods. AssertionError for bytes that belong to none."""
    found: list[Answer] = []
    at = 0
    while at < len(data):
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            found.append(Answer(0, (), data[at:], whole=False))
            break
        first, *lines = data[at:end].decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 ([1-5][0-9]{2}) [^\r\n]*", first)
        assert match, f"not an answer: {data[at : at + 200]!r}"
        fields = []
        for line in lines:
            name, colon, value = line.partition(":")
            assert colon, f"not a field: {line!r}"
            assert re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name), f"not a field: {line!r}"
            fields.append((name, value.strip(" \t")))
        status = int(match[1])
        head = Answer(status, tuple(fields), b"")
        at = end + 4
        if head.interim or status == 101:
            found.append(head)
            continue
        number = sum(not answer.interim for answer in found)
        method = methods[number] if number < len(methods) else "GET"
        length, coding = head.get("Content-Length"), head.get("Transfer-Encoding")
        assert length is None or coding is None, "both framings"
        body, whole = b"", True
        if method == "HEAD" or status in (204, 304):
            pass
        elif coding is not None:
            assert coding == "chunked", coding
            while True:
                line_end = data.find(b"\r\n", at)
                size = int(data[at:line_end], 16) if line_end >= 0 else -1
                part = data[line_end + 2 : line_end + 2 + size]
                if line_end < 0 or len(part) < size or data[line_end + 2 + size :][:2] != b"\r\n":
                    whole, at = False, len(data)
                    break
                body += part
                at = line_end + 4 + size
                if size == 0:
                    break
        elif length is not None:
            body = data[at : at + int(length)]
            whole = len(body) == int(length)
            at += len(body)
        else:
            body, at = data[at:], len(data)
        found.append(Answer(status, tuple(fields), body, whole))
    return found


@dataclass
class Lane:
    """One edge."""

    name: str
    folder: Path
    port: int
    tls_port: int
    admin_port: int
    tls: ssl.SSLContext
    program: Program | None = None
    shares: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Origin (with -limited or -guarded behind) → (share id, token)."""

    def host(self, share: str) -> str:
        return f"{self.shares[share][0]}.localhost:{self.port}"

    def token(self, share: str) -> str:
        return self.shares[share][1]

    def head(self, share: str, method: str, target: str, *lines: str, version: str = "HTTP/1.1") -> bytes:
        """A request head with the share's token."""
        first = (f"{method} {target} {version}", f"Host: {self.host(share)}")
        return "\r\n".join((*first, f"Authorization: Bearer {self.token(share)}", *lines, "", "")).encode(
            "latin-1"
        )

    async def connect(self, scheme: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if scheme == "tls":
            return await asyncio.open_connection(
                "127.0.0.1", self.tls_port, ssl=self.tls, server_hostname="localhost", limit=1 << 22
            )
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)

    async def send(
        self, scheme: str, pieces: Iterable[bytes], *, seconds: float = ANSWER_SECONDS
    ) -> tuple[bytes, bool]:
        """All pieces, each in a write of its own, and what comes back until the edge closes; whether it did."""
        reader, writer = await self.connect(scheme)
        received = bytearray()
        closed = False
        try:
            for number, piece in enumerate(pieces):
                if number:
                    await asyncio.sleep(0.002)  # a segment of its own
                writer.write(piece)
            async with asyncio.timeout(seconds):
                while part := await reader.read(1 << 16):
                    received += part
            closed = True
        except TimeoutError:
            pass
        except (ConnectionError, ssl.SSLError):
            closed = True
        finally:
            writer.transport.abort()
        return bytes(received), closed

    def ask(self, scheme: str, data: bytes | Sequence[bytes], *methods: str) -> list[Answer]:
        """What comes back for these bytes, until the edge closes."""
        pieces = [data] if isinstance(data, bytes) else data
        received, closed = asyncio.run(self.send(scheme, pieces))
        assert closed, f"the edge kept the connection open: {received[:500]!r}"
        return cut(received, methods or ("GET",))

    # ── how it is ────────────────────────────────────────────────────────────────────────────────────────────────

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of `name` that have these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=10) as response:
            text = response.read().decode()
        total = 0.0
        for line in text.splitlines():
            match = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? ([-+0-9.e]+)", line)
            if match and match[1] == name:
                found = dict(re.findall(r'([a-z_]+)="([^"]*)"', match[2] or ""))
                if labels.items() <= found.items():
                    total += float(match[3])
        return total

    @property
    def process(self) -> psutil.Process:
        assert self.program is not None
        return psutil.Process(self.program.process.pid)

    @property
    def log(self) -> str:
        assert self.program is not None
        return self.program.output()


@dataclass
class World:
    lanes: dict[str, Lane]
    origins: dict[str, Origin]
    gateway: Program

    def seen(self, origin: str, since: int = 0) -> list[dict[str, Any]]:
        """What an origin has read to the end, from this byte of its log on."""
        with self.origins[origin].log.open("rb") as file:
            file.seek(since)
            return [json.loads(line) for line in file]

    def mark(self, origin: str) -> int:
        return self.origins[origin].log.stat().st_size

    def processes(self) -> dict[str, psutil.Process]:
        return {
            **{f"edge, {lane.name} lane": lane.process for lane in self.lanes.values()},
            "gateway": psutil.Process(self.gateway.process.pid),
        }

    def descriptors(self) -> dict[str, int]:
        """Open ones of each of our processes, but for pooled connections to origins, which come and go."""
        ports = {int(origin.url.rpartition(":")[2]) for origin in self.origins.values()}
        found = {}
        for name, process in self.processes().items():
            pooled = sum(
                1
                for connection in process.net_connections("tcp")
                if connection.raddr and connection.raddr.port in ports
            )
            found[name] = process.num_fds() - pooled
        return found

    def settled(self, before: dict[str, int], started: dict[str, float]) -> None:
        """After a group of tests: everybody lives, no stream is open, no descriptor was kept."""
        for name, process in self.processes().items():
            alive = process.is_running() and process.create_time() == started[name]
            assert alive, f"{name} died"
        for lane in self.lanes.values():
            wait_until(
                f"no stream is open ({lane.name} lane)",
                lambda lane=lane: lane.metric("guestpass_streams") == 0,  # type: ignore[misc]
                seconds=20,
            )
            assert "Traceback" not in lane.log, lane.log[-4000:]
        assert "Traceback" not in self.gateway.output(), self.gateway.output()[-4000:]
        wait_until(
            f"as many descriptors as before: {before}",
            lambda: all(count <= before[name] for name, count in self.descriptors().items()),
            seconds=30,
        )


@contextmanager
def running(folder: Path) -> Iterator[World]:
    with ExitStack() as stack:
        origins = stack.enter_context(serving(folder))
        key = load_or_create_key(folder / "gateway.key")
        lanes: dict[str, Lane] = {}
        ca, cert, cert_key = write_certificates(folder, ("localhost", "127.0.0.1", "::1"))
        trust = ssl.create_default_context(cafile=str(ca))
        for name in LANES:
            own = folder / f"edge-{name}"
            own.mkdir()
            lane = Lane(name, own, free_port(), free_port(), free_port(), trust)
            (own / "edge.toml").write_text(
                f'[edge]\nlisten = ["http://127.0.0.1:{lane.port}", "https://127.0.0.1:{lane.tls_port}"]\n'
                f'admin_listen = "127.0.0.1:{lane.admin_port}"\npublic_url = "http://localhost:{lane.port}"\n'
                f'share_domain = "localhost:{lane.port}"\nfast_lane = {str(name == "fast").lower()}\n'
                f'tls = {{ cert = "{cert}", key = "{cert_key}" }}\ndrain_seconds = 1\n',
                "utf-8",
            )
            config = load_edge(own / "edge.toml")
            lane.shares = asyncio.run(_prepare(config, key.public_key().public_bytes_raw(), origins))
            lanes[name] = lane
        edges = ", ".join(f'"https://localhost:{lane.tls_port}"' for lane in lanes.values())
        text = f'[gateway]\nname = "gw-1"\nsite = "{SITE}"\nkey = "gateway.key"\nca = "{ca}"\nedges = [{edges}]\n'
        for origin in origins.values():
            text += f'[services.{origin.name}]\nurl = "{origin.url}"\n'
            # The same rules once more: what the edge lets through by mistake ends here.
            text += (
                f'[services.{origin.name}-limited]\nurl = "{origin.url}"\n'
                'paths = ["/limited/**"]\nmethods = ["GET", "POST"]\n'
            )
        (folder / "gateway.toml").write_text(text, "utf-8")
        guestpass = (sys.executable, "-m", "guestpass")
        for lane in lanes.values():
            command = [*guestpass, "edge", "--config", str(lane.folder / "edge.toml"), "--json"]
            lane.program = stack.enter_context(Program(command, log=lane.folder / "edge.log"))
        for lane in lanes.values():
            assert lane.program is not None
            lane.program.wait_for_line("{", seconds=START_SECONDS)
        command = [*guestpass, "gateway", "--config", str(folder / "gateway.toml"), "--json"]
        gateway = stack.enter_context(Program(command, log=folder / "gateway.log"))
        gateway.wait_for_line("{", seconds=START_SECONDS)
        for lane in lanes.values():
            wait_until(
                "the gateway is connected",
                lambda lane=lane: lane.metric("guestpass_tunnels") == 2,  # type: ignore[misc]
                seconds=START_SECONDS,
            )
        world = World(lanes, origins, gateway)
        for lane in lanes.values():  # the first request of a session is always aiohttp's
            for share in lane.shares:
                lane.ask("plain", lane.head(share, "GET", "/limited/warm", "Connection: close"))
        yield world


async def _prepare(
    config: EdgeConfig, public_key: bytes, origins: dict[str, Origin]
) -> dict[str, tuple[str, str]]:
    """Fill the store of an edge that is not running: the gateway, and for each origin three shares with a token."""
    edge = Edge(config)
    await edge.start()
    try:
        row = Gateway(SITE, "gw-1", public_key, time.time())
        await edge.service._store.write(lambda db: gateway_rows.insert(db, row))
        found = {}
        for name in origins:
            for share, service, scope in (
                (name, name, ()),
                (f"{name}-limited", f"{name}-limited", SCOPE),
                (f"{name}-guarded", f"{name}-limited", ()),
            ):
                created = await edge.service.create(
                    NewShare(
                        site=SITE,
                        service=service,
                        path="/limited/" if scope else "/",
                        to=[EMAIL],
                        invite=False,
                        scope=tuple(Scope(*rule.split(" ")) for rule in scope),
                    )
                )
                token = (await edge.service.create_token(created.share.id, EMAIL))[1]
                found[share] = (created.share.id, token)
        return found
    finally:
        await edge.stop()
