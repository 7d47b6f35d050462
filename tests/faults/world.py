"""An edge, gateways, applications and visitors as processes and sockets, so that each can be killed, frozen or cut off.

`World.start` runs everything; the shares, tokens and keys are put into the edge's store before its process starts.
`Load` is visitors who ask again and again; each has a session of its own, so they spread over the gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from support.network import EDGE_ADDRESS, Network
from support.programs import Program, free_port
from support.scoreboard import percentile
from yarl import URL

from guestpass.config import EdgeConfig, load_edge
from guestpass.edge.app import Edge
from guestpass.gateway.enroll import load_or_create_key
from guestpass.model import Gateway
from guestpass.shares.service import NewShare
from guestpass.shares.store import gateways as gateway_rows

SITE = "plant"
SERVICE = "dash"
EMAIL = "alice@example.org"
START_SECONDS = 40.0
APP = Path(__file__).parents[1] / "support" / "fault_app.py"

# A request that takes longer is stuck: nothing here may take so long, whatever happens.
REQUEST_SECONDS = 60.0


async def until(look: Callable[[], Any], what: str, *, seconds: float = 30) -> float:
    """Seconds until `look` (which may be a coroutine function) is true; AssertionError that names `what`."""
    began = time.monotonic()
    while True:
        found = look()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return time.monotonic() - began
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Answer:
    began: float
    took: float
    status: int
    """0: no answer, or a broken one."""
    instance: str
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200


class World:
    """`names` are gateways; each has an application of its own, whose instance has the gateway's name."""

    def __init__(
        self,
        folder: Path,
        *,
        names: tuple[str, ...] = ("gw-1",),
        network: Network | None = None,
        beside_edge: tuple[str, ...] = (),
        visitors: int = 8,
        drain: float = 10,
        tunnels: int = 2,
        app: Path = APP,
        settings: str = "",
    ) -> None:
        """`beside_edge`: gateways that run on the edge's side of `network`. `settings`: more of `edge.toml`, from its
        section `[edge]` on."""
        self.folder = folder
        self.names = names
        self.network = network
        self._beside_edge = beside_edge
        self._visitors = visitors
        self._drain = drain
        self._tunnels = tunnels
        self._app = app
        self._settings = settings
        self.address = EDGE_ADDRESS if network is not None else "127.0.0.1"
        self.port, self.tunnel_port, self.admin_port = free_port(), free_port(), free_port()
        self.tokens: list[str] = []
        self.share_id = ""
        self.edge: Program
        self.gateways: dict[str, Program] = {}
        self.apps: dict[str, Program] = {}
        self.app_urls: dict[str, str] = {}
        self.session: aiohttp.ClientSession
        self._logs: Counter[str] = Counter()

    # ── up and down ──────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(REQUEST_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        ca = cert = self.folder / "cert.pem"
        key = self.folder / "key.pem"
        write_certificate(cert, key, self.address)
        (self.folder / "edge.toml").write_text(
            f'[edge]\nlisten = ["http://127.0.0.1:{self.port}", "https://{self.address}:{self.tunnel_port}"]\n'
            f'admin_listen = "127.0.0.1:{self.admin_port}"\npublic_url = "http://localhost:{self.port}"\n'
            f'share_domain = "localhost:{self.port}"\ndrain_seconds = {self._drain}\n'
            f'tls = {{ cert = "{cert.name}", key = "{key.name}" }}\n{self._settings}',
            "utf-8",
        )
        for name in self.names:
            beside = self.network is None or name in self._beside_edge
            command: list[str | Path] = [sys.executable, self._app, name]
            if self.network is not None and not beside:
                command = self.network.at_gateway(command)
            app = Program(command, log=self.folder / f"app-{name}.log")
            self.apps[name] = app
        for name, app in self.apps.items():
            self.app_urls[name] = await asyncio.to_thread(app.wait_for_line, "http://", seconds=START_SECONDS)
            (self.folder / f"{name}.toml").write_text(
                f'[gateway]\nname = "{name}"\nsite = "{SITE}"\nkey = "{name}.key"\nca = "{ca.name}"\n'
                f'edges = ["https://{self.address}:{self.tunnel_port}"]\ndrain_seconds = {self._drain}\n'
                f'tunnels = {self._tunnels}\n[services.{SERVICE}]\nurl = "{self.app_urls[name]}"\n',
                "utf-8",
            )
        keys = {name: load_or_create_key(self.folder / f"{name}.key") for name in self.names}
        self.share_id, self.tokens = await prepare(
            load_edge(self.folder / "edge.toml"), keys, tokens=self._visitors
        )
        await self.start_edge()
        await asyncio.gather(*(self.start_gateway(name) for name in self.names))
        await until(self._all_in, "all gateways are connected")

    async def _all_in(self) -> bool:
        connected = await self.connected()
        return all(connected.get(name) for name in self.names)

    async def start_edge(self) -> None:
        self._logs["edge"] += 1
        log = self.folder / f"edge-{self._logs['edge']}.log"
        command = [sys.executable, "-m", "guestpass", "edge", "--config", self.folder / "edge.toml", "--json"]
        self.edge = Program(command, log=log)
        await asyncio.to_thread(self.edge.wait_for_line, "{", seconds=START_SECONDS)

    async def start_gateway(self, name: str, *, wait: bool = True) -> None:
        if name in self.gateways:
            await asyncio.to_thread(self.gateways[name].process.wait)
        self._logs[name] += 1
        log = self.folder / f"{name}-{self._logs[name]}.log"
        command: list[str | Path] = [sys.executable, "-m", "guestpass", "gateway", "--json"]
        command += ["--config", self.folder / f"{name}.toml"]
        if self.network is not None and name not in self._beside_edge:
            command = self.network.at_gateway(command)
        self.gateways[name] = Program(command, log=log)
        if wait:
            await asyncio.to_thread(self.gateways[name].wait_for_line, "{", seconds=START_SECONDS)

    @property
    def programs(self) -> list[Program]:
        return [*self.gateways.values(), *([self.edge] if hasattr(self, "edge") else []), *self.apps.values()]

    async def __aenter__(self) -> World:
        try:
            await self.start()
        except BaseException:
            await self._stop(show=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop(show=exc is not None)

    async def _stop(self, *, show: bool) -> None:
        await self.session.close()
        for program in self.programs:
            with contextlib.suppress(ProcessLookupError):
                program.process.send_signal(signal.SIGCONT)
                program.process.kill()
            program.stop()
        if show:
            for path in sorted(self.folder.glob("*.log")):
                print(f"── {path.name} ──\n{path.read_text('utf-8', 'replace')[-4000:]}")

    def logs(self, who: str) -> str:
        """What all processes of `who` have logged so far."""
        return "".join(
            path.read_text("utf-8", "replace") for path in sorted(self.folder.glob(f"{who}-*.log"))
        )

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def connected(self) -> Counter[str]:
        """Tunnels of each gateway, as the edge counts them; empty when the edge does not answer."""
        try:
            async with self.session.get(
                f"http://127.0.0.1:{self.admin_port}/metrics", timeout=aiohttp.ClientTimeout(2)
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return Counter()
        found = re.findall(r'^guestpass_tunnels\{gateway="([^"]+)",site="[^"]+"\} ([0-9.]+)$', text, re.M)
        return Counter({name: int(float(count)) for name, count in found})

    async def has(self, name: str) -> bool:
        return bool((await self.connected())[name])

    async def has_not(self, name: str) -> bool:
        return not await self.has(name)

    # ── visitors ─────────────────────────────────────────────────────────────────────────────────────────────────

    def headers(self, visitor: int = 0) -> dict[str, str]:
        return {
            "Host": f"{self.share_id}.localhost:{self.port}",
            "Authorization": f"Bearer {self.tokens[visitor]}",
        }

    def url(self, path: str) -> URL:
        return URL(f"http://127.0.0.1:{self.port}{path}", encoded=True)

    async def ask(self, path: str = "/", visitor: int = 0, *, method: str = "GET", **more: Any) -> Answer:
        began = time.monotonic()
        try:
            async with self.session.request(
                method, self.url(path), headers=self.headers(visitor), allow_redirects=False, **more
            ) as response:
                body = await response.read()
                problem = "" if response.status == 200 else body[:300].decode("utf-8", "replace")
                instance = response.headers.get("X-Instance", "")
                return Answer(began, time.monotonic() - began, response.status, instance, problem)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as exc:
            return Answer(began, time.monotonic() - began, 0, "", f"{type(exc).__name__}: {exc}")

    async def visitors_of(self, name: str) -> list[int]:
        """Visitors whose session is at that gateway."""
        answers = await asyncio.gather(*(self.ask("/", number) for number in range(len(self.tokens))))
        return [number for number, answer in enumerate(answers) if answer.instance == name]

    async def asked_twice(self) -> list[str]:
        """What applications were told to do more than once. Works without a network only."""
        counts: Counter[str] = Counter()
        for url in self.app_urls.values():
            async with self.session.get(f"{url}/twice") as response:
                counts.update((await response.text()).split())
        return sorted(counts)


def write_certificate(cert: Path, key_path: Path, address: str) -> None:
    """One that signs itself. `guestpass.local_ca` vouches for loopback addresses only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert.write_bytes(made.public_bytes(Encoding.PEM))
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


async def prepare(
    config: EdgeConfig, keys: Mapping[str, Ed25519PrivateKey], *, tokens: int = 1
) -> tuple[str, list[str]]:
    """Fill the store of an edge that is not running: enrolled gateways, a share, tokens for it."""
    edge = Edge(config)
    await edge.start()
    try:
        rows = [
            Gateway(SITE, name, key.public_key().public_bytes_raw(), time.time())
            for name, key in keys.items()
        ]

        def enrol(db: Any) -> None:
            for row in rows:
                gateway_rows.insert(db, row)

        await edge.service._store.write(enrol)
        created = await edge.service.create(
            NewShare(site=SITE, service=SERVICE, path="/", to=[EMAIL], invite=False)
        )
        secrets = [(await edge.service.create_token(created.share.id, EMAIL))[1] for _ in range(tokens)]
        return created.share.id, secrets
    finally:
        await edge.stop()


@dataclass
class Load:
    """Visitors who ask one request after the other while the `async with` block runs."""

    world: World
    visitors: int = 8
    path: str = "/"
    method: str = "GET"
    pause: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    sent: int = 0
    """Of POSTs: each has a number of its own."""

    async def _visit(self, number: int) -> None:
        while True:
            path = self.path
            if self.method == "POST":
                self.sent += 1
                path = f"/once/{self.sent}"
            self.answers.append(await self.world.ask(path, number, method=self.method))
            if not self.answers[-1].ok:
                await asyncio.sleep(0.1)  # as somebody would who is told to try again
            elif self.pause:
                await asyncio.sleep(self.pause)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        tasks = [asyncio.create_task(self._visit(number)) for number in range(self.visitors)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.ok]

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.ok]

    def why(self) -> str:
        return "; ".join(sorted({f"{a.status} {a.problem[:120]}" for a in self.failed}))[:600]

    @property
    def slowest(self) -> float:
        return max((answer.took for answer in self.answers), default=0.0)

    def p99(self) -> float:
        return percentile((answer.took for answer in self.answers), 0.99)

    def since(self, moment: float) -> list[Answer]:
        return [answer for answer in self.answers if answer.began >= moment]

    async def served(self, moment: float) -> float:
        """Waits for a good answer to a request of after `moment`; the seconds from there to its end."""
        await until(lambda: any(answer.ok for answer in self.since(moment)), "service again")
        return min(answer.began + answer.took for answer in self.since(moment) if answer.ok) - moment
