"""An edge of several workers, a gateway and an application, with visitors who choose the worker that serves them.

Edge and gateway are processes as in an installation; the application is the test's own. Which worker accepts a
connection is the kernel's choice; `visit` leaves it none, by stopping the others for the moment of the handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import psutil
from aiohttp import WSMsgType, web
from support.programs import Program, free_port, wait_until
from support.served import serving

from guestpass.gateway.enroll import enroll
from guestpass.local_ca import write_certificates

SITE = "plant"
SERVICE = "dash"
EMAIL = "alice@example.org"
START_SECONDS = 60.0
REQUEST_SECONDS = 30.0
MB = 1 << 20
PIECE = bytes(range(256)) * 256


# ── the application ──────────────────────────────────────────────────────────────────────────────────────────────


async def _who(request: web.Request) -> web.Response:
    return web.json_response({"method": request.method, "email": request.headers.get("X-Guestpass-Email")})


async def _down(request: web.Request) -> web.StreamResponse:
    """As many pieces as are asked for; without a number, until nobody listens any more."""
    response = web.StreamResponse()
    await response.prepare(request)
    wanted = request.query.get("pieces")
    sent = 0
    while wanted is None or sent < int(wanted):
        await response.write(PIECE)
        sent += 1
    await response.write_eof()
    return response


async def _up(request: web.Request) -> web.Response:
    digest, size = hashlib.sha256(), 0
    async for piece in request.content.iter_chunked(65536):
        digest.update(piece)
        size += len(piece)
    return web.json_response({"sha256": digest.hexdigest(), "size": size})


async def _trickle(request: web.Request) -> web.StreamResponse:
    """A few bytes every few milliseconds, until nobody listens any more."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"tick\n")
        await asyncio.sleep(0.02)


async def _echo(request: web.Request) -> web.StreamResponse:
    socket_ = web.WebSocketResponse()
    await socket_.prepare(request)
    async for message in socket_:
        if message.type is WSMsgType.TEXT:
            await socket_.send_str(message.data)
    return socket_


@contextlib.asynccontextmanager
async def application() -> AsyncIterator[str]:
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/", _who)
    app.router.add_get("/down", _down)
    app.router.add_post("/up", _up)
    app.router.add_get("/trickle", _trickle)
    app.router.add_get("/echo", _echo)
    async with serving(app, handler_cancellation=True) as url:
        yield url


# ── the edge ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Edge:
    """`guestpass edge` with several workers, one gateway with one tunnel, and a share."""

    def __init__(self, folder: Path, *, workers: int, fast_lane: bool = True, more: str = "") -> None:
        self.folder = folder
        self.count = workers
        self.port, self.tunnel_port = free_port(), free_port()
        self._ca, cert, key = write_certificates(folder, ("localhost", "127.0.0.1", "::1"))
        (folder / "edge.toml").write_text(
            f'[edge]\nlisten = ["http://127.0.0.1:{self.port}", "https://127.0.0.1:{self.tunnel_port}"]\n'
            f'admin_listen = "127.0.0.1:0"\npublic_url = "http://localhost:{self.port}"\n'
            f'share_domain = "localhost:{self.port}"\nworkers = {workers}\ndrain_seconds = 10\n'
            f'tls = {{ cert = "{cert}", key = "{key}" }}\nfast_lane = {str(fast_lane).lower()}\n{more}',
            "utf-8",
        )
        self.program: Program
        self.gateways: list[Program] = []
        self.visits: list[Visit] = []
        self.facts: dict[str, Any] = {}
        self.share_id = ""
        self.token = ""

    @property
    def pids(self) -> list[int]:
        """Of the workers that live now."""
        supervisor = psutil.Process(self.program.process.pid)
        return sorted(child.pid for child in supervisor.children() if child.status() != psutil.STATUS_ZOMBIE)

    def start(self) -> None:
        command = [sys.executable, "-m", "guestpass", "edge", "--config", self.folder / "edge.toml", "--json"]
        self.program = Program(command, log=self.folder / "edge.log")
        self.facts = json.loads(self.program.wait_for_line("{", seconds=START_SECONDS))

    async def start_gateway(self, app_url: str, name: str = "gw-1") -> None:
        made = await asyncio.to_thread(self.api, "POST", "/gateways/join-tokens", {"site": SITE})
        await enroll(
            f"http://localhost:{self.port}",
            made["join_token"],
            name,
            self.folder / f"{name}.key",
            ca=self._ca,
        )
        (self.folder / f"{name}.toml").write_text(
            f'[gateway]\nname = "{name}"\nsite = "{SITE}"\nkey = "{name}.key"\nca = "{self._ca}"\n'
            f'edges = ["https://localhost:{self.tunnel_port}"]\ndrain_seconds = 5\ntunnels = 1\n'
            f'[services.{SERVICE}]\nurl = "{app_url}"\n',
            "utf-8",
        )
        command = [sys.executable, "-m", "guestpass", "gateway", "--json"]
        program = Program(
            [*command, "--config", self.folder / f"{name}.toml"], log=self.folder / f"{name}.log"
        )
        self.gateways.append(program)
        await asyncio.to_thread(program.wait_for_line, "{", seconds=START_SECONDS)

    def new_share(self, **more: Any) -> str:
        share = {"site": SITE, "service": SERVICE, "path": "/", "to": [EMAIL], "invite": False, **more}
        return str(self.api("POST", "/shares", share)["id"])

    def new_token(self, share_id: str) -> str:
        return str(self.api("POST", f"/shares/{share_id}/tokens", {"email": EMAIL})["token"])

    def stop(self) -> None:
        for visit in self.visits:
            visit.close()
        for pid in self.pids if self.program.process.poll() is None else ():
            os.kill(pid, signal.SIGCONT)
        for program in (*self.gateways, self.program):
            with contextlib.suppress(ProcessLookupError):
                program.process.send_signal(signal.SIGCONT)
            program.stop()

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────

    def api(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        connection: Visit | None = None,
    ) -> Any:
        """The JSON that the management API answers."""
        key = (self.folder / "api.key").read_text().strip()
        headers = {
            "Host": f"localhost:{self.port}",
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
        }
        visit = connection or self.open()
        status, data = visit.ask(
            method,
            f"/api/v1{path}",
            headers=headers,
            body=json.dumps(body).encode() if body is not None else None,
        )
        if connection is None:
            visit.close()
        assert status < 300, data
        return json.loads(data) if data else None

    def metrics(self) -> dict[str, float]:
        parts = self.facts["metrics"].removeprefix("http://").partition("/")
        connection = HTTPConnection(parts[0], timeout=REQUEST_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return {
            name: float(value)
            for name, value in re.findall(r"^([a-z_]+(?:\{.*?\})?) ([-+0-9.e]+)$", text, re.M)
        }

    def total(self, name: str) -> float:
        """Of all label values together."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def headers(self, **more: str) -> dict[str, str]:
        return {
            "Host": f"{self.share_id}.localhost:{self.port}",
            "Authorization": f"Bearer {self.token}",
            **more,
        }

    @contextlib.contextmanager
    def only(self, pid: int) -> Iterator[None]:
        """No worker but this one runs."""
        others = [other for other in self.pids if other != pid]
        try:
            for other in others:
                os.kill(other, signal.SIGSTOP)
            yield
        finally:
            for other in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGCONT)

    def visit(self, pid: int) -> Visit:
        """A connection that this worker has accepted."""
        with self.only(pid):
            sock = socket.create_connection(("127.0.0.1", self.port))
            mine = sock.getsockname()[1]
            wait_until(f"worker {pid} has accepted", lambda: mine in self._visitors_of(pid), seconds=2)
        return Visit(self, sock)

    def open(self) -> Visit:
        """A connection that any worker accepts."""
        return Visit(self, socket.create_connection(("127.0.0.1", self.port)))

    @staticmethod
    def _visitors_of(pid: int) -> set[int]:
        return {c.raddr.port for c in psutil.Process(pid).net_connections("tcp") if c.raddr}

    @property
    def sockets(self) -> Path:
        """The folder of the workers' sockets."""
        command = psutil.Process(self.pids[0]).cmdline()
        return Path(command[command.index("--path") + 1]).parent

    def holders(self) -> list[int]:
        """Workers that hold a tunnel."""
        return [
            pid
            for pid in self.pids
            if any(
                c.raddr and c.laddr.port == self.tunnel_port
                for c in psutil.Process(pid).net_connections("tcp")
            )
        ]


class Visit:
    """One connection of a visitor."""

    def __init__(self, edge: Edge, sock: socket.socket) -> None:
        self._edge = edge
        edge.visits.append(self)
        self.sock = sock
        sock.settimeout(REQUEST_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = HTTPConnection("127.0.0.1", edge.port)
        self._connection.sock = sock

    def begin(
        self,
        method: str = "GET",
        path: str = "/",
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        chunked: bool = False,
    ) -> HTTPResponse:
        """The answer's head has come."""
        self._connection.request(
            method, path, body, dict(headers or self._edge.headers()), encode_chunked=chunked
        )
        return self._connection.getresponse()

    def ask(self, method: str = "GET", path: str = "/", **more: Any) -> tuple[int, bytes]:
        answer = self.begin(method, path, **more)
        return answer.status, answer.read()

    def upgrade(self) -> None:
        """To the WebSocket that sends back what it gets."""
        fields = {
            **self._edge.headers(Origin=f"http://{self._edge.share_id}.localhost:{self._edge.port}"),
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        self.send_head("GET", "/echo", fields)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.sock.recv(1)  # no byte of what follows
        assert head.startswith(b"HTTP/1.1 101 "), head

    def send_head(self, method: str, path: str, fields: Mapping[str, str]) -> None:
        lines = (f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()))
        self.sock.sendall("\r\n".join((*lines, "", "")).encode())

    def close(self) -> None:
        self._connection.close()
        self.sock.close()


async def off(work: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """The application runs in this loop: whoever waits for it does so elsewhere."""
    return await asyncio.to_thread(work, *args, **more)


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, workers: int = 2, fast_lane: bool = True, gateway: bool = True, more: str = ""
) -> AsyncIterator[Edge]:
    async with application() as app_url:
        edge = Edge(folder, workers=workers, fast_lane=fast_lane, more=more)
        try:
            await asyncio.to_thread(edge.start)
            if gateway:
                await edge.start_gateway(app_url)
            edge.share_id = await asyncio.to_thread(edge.new_share)
            edge.token = await asyncio.to_thread(edge.new_token, edge.share_id)
            yield edge
        except BaseException:
            for path in folder.glob("*.log"):
                print(f"── {path.name} ──\n{path.read_text('utf-8', 'replace')[-6000:]}")
            raise
        finally:
            await asyncio.to_thread(edge.stop)
