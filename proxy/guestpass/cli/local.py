"""The processes of `guestpass up`: an edge and gateways in a temporary folder, and one share.

How it works:

1. A folder (0700) gets a throw-away CA, a leaf certificate, `edge.toml`, and a `gateway.toml` and key per gateway.
2. `guestpass edge` and `guestpass gateway` run as children, in sessions of their own: Ctrl-C in the terminal reaches
   this process only, which then ends them in order. Where this process is killed, the kernel ends them (Linux).
3. Each gateway enrols with a join token of its own, by the same code as `guestpass gateway enroll`.
4. When every gateway is connected, the share and a bearer token are made through the management API.
5. Until a signal comes, the outbox is watched for sign-in codes. A child that ends by itself ends everything.
6. The edge is drained while the gateways still run, then they end, then the folder goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import email
import email.policy
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestpass.cli.client import Client
from guestpass.cli.gateway import quoted
from guestpass.cli.output import Output, plain
from guestpass.cli.parser import read_secret
from guestpass.config import EdgeConfig, parse, read_toml
from guestpass.daemon import Signals
from guestpass.errors import ConfigError, GuestpassError, PortTaken
from guestpass.gateway.enroll import enroll
from guestpass.local_ca import write_certificates

SITE = "local"
SERVICE = "app"

# What people know from other programs; others are taken when these are in use.
TUNNEL_PORT = 8443
ADMIN_PORT = 8081

# Importing everything on a busy machine takes seconds; more means that something hangs.
START_TIMEOUT = 60.0

# Ports are looked at first and taken later: in between somebody else can be quicker, but hardly thrice.
START_TRIES = 3

# A trial ends when its owner says so; long downloads are not waited for.
DRAIN_SECONDS = 2.0

# After the drain a child has this long before it is killed.
STOP_TIMEOUT = DRAIN_SECONDS + 8.0

# How soon a code is printed after its mail was written.
OUTBOX_POLL = 0.3

# The largest mail that Guestpass writes is a few KiB.
MAX_MAIL = 1 << 20

# Linux, prctl(2).
PR_SET_PDEATHSIG = 1

# Keys of [edge] that describe what `up` itself decides.
OWN_KEYS = (
    "listen",
    "admin_listen",
    "public_url",
    "share_domain",
    "state",
    "tls",
    "certificate",
    "redirect_listen",
    "api_key",
    "fast_lane",
    "outbox",
    "tunnel_certificate_hash",
    "tunnel_binding",
)

# A line of its own in the mail of `email-code`.
CODE = re.compile(r"^[ \t]*(\d{4} \d{4})[ \t\r]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    service: str  # the application's URL, without a path
    path: str
    scope: list[str]
    recipients: list[str]  # canonical addresses
    expires: str | None
    name: str
    message: str
    port: int  # 0: any free one
    gateways: int
    workers: int | None  # None: as `sections` says
    https: bool
    fast_lane: bool
    sections: Mapping[str, Any]  # of the user's edge.toml
    config: Path | None  # where they came from
    log_level: str


@dataclass(frozen=True, slots=True)
class Running:
    """What is running; `facts` is the JSON line."""

    facts: dict[str, Any]
    links: dict[str, str]  # by recipient
    expires: str | None


async def run_locally(plan: Plan, output: Output, *, ready: Callable[[Running], None]) -> None:
    """Start everything, call `ready` once, run until SIGINT or SIGTERM, clean up. Raises GuestpassError."""
    with Signals() as signals, _folder() as folder:
        local = _Local(plan, folder, output)
        try:
            running = await _unless(signals.stop, local.start())
            if running is not None:
                ready(running)
                await _unless(signals.stop, local.watch())
        finally:
            await local.stop(signals.hurry)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="guestpass-"))  # 0700
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def _unless(stop: asyncio.Event, work: Awaitable[Any]) -> Any:
    """The result of `work`, or None as soon as `stop` is set."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for future in (task, stopped):
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, GuestpassError):
                await future


class _Local:
    def __init__(self, plan: Plan, folder: Path, output: Output) -> None:
        self.plan = plan
        self.folder = folder
        self.output = output
        self.outbox: Path | None = None
        self.edge: _Child | None = None
        self.gateways: list[_Child] = []
        self.loopback = ["127.0.0.1", "[::1]"] if _has_ipv6() else ["127.0.0.1"]
        self._choose_ports(TUNNEL_PORT, ADMIN_PORT)

    def _choose_ports(self, tunnel: int = 0, admin: int = 0) -> None:
        """Raises PortTaken when the visitors' port is not to be had."""
        self.port = _free_port(self.plan.port, self.loopback, required=True)
        self.tunnel_port = _free_port(tunnel, self.loopback, taken={self.port})
        self.admin_port = _free_port(admin, ["127.0.0.1"], taken={self.port, self.tunnel_port})

    @property
    def scheme(self) -> str:
        return "https" if self.plan.https else "http"

    @property
    def public_url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    @property
    def tunnel_url(self) -> str:
        return f"https://localhost:{self.tunnel_port}"

    async def start(self) -> Running:
        plan = self.plan
        names = [
            "localhost",
            "127.0.0.1",
            "::1",
            *(["share.localhost", "*.share.localhost"] if plan.https else []),
        ]
        ca, cert, key = write_certificates(self.folder, names)
        ready = await self._start_edge(cert, key)
        self.outbox = Path(ready["outbox"]) if ready["outbox"] else None
        api_key = await asyncio.to_thread(read_secret, ready["api_key_file"], "API key")
        client = Client(self.public_url, api_key, ca=ca)

        for index in range(1, plan.gateways + 1):
            await self._start_gateway(client, f"{SITE}-{index}", ca)
        for gateway in self.gateways:
            await self._first(gateway.ready)

        share = await asyncio.to_thread(
            client.post,
            "/shares",
            {
                "name": plan.name or plan.service.partition("://")[2] + plan.path.rstrip("/"),
                "site": SITE,
                "service": SERVICE,
                "path": plan.path,
                "scope": plan.scope,
                "to": plan.recipients,
                "expires": plan.expires,
                "message": plan.message,
            },
        )
        token = await asyncio.to_thread(
            client.post, f"/shares/{share['id']}/tokens", {"email": plan.recipients[0], "expires": None}
        )
        links: dict[str, str] = share["links"]
        facts = {
            "edge": ready["edge"],
            "share": share["id"],
            "link": links[plan.recipients[0]],
            "origin": share["origin"],
            "token": token["token"],
            "metrics": ready["metrics"],
            "outbox": ready["outbox"],
            # With several workers the first is their supervisor.
            "pids": {
                "edge": [ready["pid"], *ready.get("workers", ())],
                "gateways": [gateway.pid for gateway in self.gateways],
            },
            "tunnel": self.tunnel_url,
            "ca": str(ca),
            "api": ready["api"],
            "api_key": api_key,
        }
        return Running(facts, links, share["expires"])

    async def _start_edge(self, cert: Path, key: Path) -> dict[str, Any]:
        """Its `ready` line."""
        for left in reversed(range(START_TRIES)):
            config = self._write("edge.toml", self._edge_settings(cert, key))
            self.edge = await _Child.start("edge", ["edge", "--config", str(config)], self)
            try:
                return await self._first(self.edge.ready)
            except GuestpassError as exc:
                # Between our look and its start somebody, perhaps another `up`, took a port: choose again.
                if exc.error_code != PortTaken.code or not left:
                    raise
                self._choose_ports()
        raise AssertionError("the last try returns or raises")

    async def _start_gateway(self, client: Client, name: str, ca: Path) -> None:
        join = await asyncio.to_thread(client.post, "/gateways/join-tokens", {"site": SITE})
        key = self.folder / f"{name}.key"
        await enroll(self.public_url, join["join_token"], name, key, ca=ca if self.plan.https else None)
        settings = {
            "gateway": {
                "name": name,
                "site": SITE,
                "edges": [self.tunnel_url],
                "ca": str(ca),
                "key": str(key),
                "drain_seconds": DRAIN_SECONDS,
            },
            "services": {SERVICE: {"url": self.plan.service}},
        }
        config = self._write(f"{name}.toml", settings)
        self.gateways.append(
            await _Child.start(f"gateway {name}", ["gateway", "--config", str(config)], self)
        )

    def _edge_settings(self, cert: Path, key: Path) -> dict[str, Any]:
        netloc = f"localhost:{self.port}"
        edge = {
            "drain_seconds": DRAIN_SECONDS,
            **self.plan.sections.get("edge", {}),
            "listen": [
                *(f"{self.scheme}://{host}:{self.port}" for host in self.loopback),
                *(f"https://{host}:{self.tunnel_port}" for host in self.loopback),
            ],
            "admin_listen": f"127.0.0.1:{self.admin_port}",
            "public_url": self.public_url,
            # OpenSSL does not accept the wildcard *.localhost, which has nothing but a top-level domain behind it.
            "share_domain": f"share.{netloc}" if self.plan.https else netloc,
            "state": "sqlite:///edge.db",
            "tls": {"cert": str(cert), "key": str(key)},
            "fast_lane": self.plan.fast_lane,
            "outbox": str(self.folder / "outbox"),
            **({"workers": self.plan.workers} if self.plan.workers is not None else {}),
        }
        return {**self.plan.sections, "edge": edge}

    def _write(self, name: str, settings: Mapping[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(toml(settings), "utf-8")
        return path

    async def _first(self, wanted: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
        """The result of `wanted`. Raises GuestpassError when any child ends before, or nothing happens for long."""
        waiting: set[asyncio.Future[Any]] = {wanted, *(child.ended for child in self._children())}
        done, _ = await asyncio.wait(waiting, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        for child in self._children():
            if child.ended in done:
                raise child.failure(self.plan, self.folder)
        if not done:
            raise GuestpassError(
                f"nothing was ready within {START_TIMEOUT:.0f} s",
                hint="Try again with --log-level info.",
                code="start_timeout",
            )
        return wanted.result()

    def _children(self) -> list[_Child]:
        return [child for child in (self.edge, *self.gateways) if child is not None]

    async def watch(self) -> None:
        """Print sign-in codes; raises GuestpassError when a child ends."""
        seen: set[str] = set()
        ended = [child.ended for child in self._children()]
        while True:
            if not self.output.json and self.outbox is not None:
                for line in await asyncio.to_thread(new_codes, self.outbox, seen):
                    self.output.say(line)
            done, _ = await asyncio.wait(ended, timeout=OUTBOX_POLL, return_when=asyncio.FIRST_COMPLETED)
            for child in self._children():
                if child.ended in done:
                    raise child.failure(self.plan, self.folder)

    async def stop(self, hurry: asyncio.Event) -> None:
        """The edge first: what it drains needs the gateways, which then rightly complain that it is gone."""
        for gateway in self.gateways:
            gateway.quiet = self.plan.log_level in ("warning", "error")
        if self.edge is not None:
            await self.edge.stop(hurry)
        await asyncio.gather(*(gateway.stop(hurry) for gateway in self.gateways))


@dataclass(eq=False)
class _Child:
    """One part of ours as a process; its standard error goes to ours, line by line."""

    name: str
    process: Process
    ready: asyncio.Future[dict[str, Any]]
    ended: asyncio.Task[None] = field(init=False)
    error: dict[str, str] | None = None
    last_line: str = ""
    quiet: bool = False

    @classmethod
    async def start(cls, name: str, arguments: list[str], local: _Local) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a file in the current folder must not pass for one of our modules
            "-m",
            "guestpass",
            *arguments,
            "--json",
            "--log-level",
            local.plan.log_level,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        child = cls(name, process, asyncio.get_running_loop().create_future())
        child.ended = asyncio.create_task(child._follow())
        return child

    @property
    def pid(self) -> int:
        return self.process.pid

    async def _follow(self) -> None:
        await asyncio.gather(self._read_output(), self._read_log())
        await self.process.wait()

    async def _read_output(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if "error" in data:
                self.error = data["error"]
            elif not self.ready.done():
                self.ready.set_result(data)

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        while True:
            try:
                line = await self.process.stderr.readline()
            except ValueError:  # longer than the reader's limit: it was dropped, the next one follows
                continue
            if not line:
                return
            text = plain(line.decode("utf-8", "replace").rstrip("\n"))
            if text.strip():
                self.last_line = text
                if not self.quiet:
                    print(f"[{self.name}] {text}", file=sys.stderr, flush=True)

    def failure(self, plan: Plan, folder: Path) -> GuestpassError:
        """Why it ended by itself, in its own words; our temporary edge.toml is called by the user's name for it."""
        if self.error is None:
            status = self.process.returncode
            message = f"the {self.name} ended by itself (status {status})"
            if self.last_line:
                message += f": {self.last_line}"
            return GuestpassError(message, code="process_ended")
        message, hint = self.error["message"], self.error["hint"]
        if plan.config is not None:
            # Without the line, which is that of our file.
            ours = re.escape(str(folder / "edge.toml")) + r"(:\d+)?"
            message = re.sub(ours, str(plan.config).replace("\\", r"\\"), message)
        return GuestpassError(f"the {self.name} did not start: {message}", hint=hint, code=self.error["code"])

    async def stop(self, hurry: asyncio.Event) -> None:
        """SIGTERM, and SIGKILL after a while, or at once when the person is in a hurry."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            hurried = asyncio.create_task(hurry.wait())
            either: set[asyncio.Future[Any]] = {self.ended, hurried}
            await asyncio.wait(either, timeout=STOP_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
        await self.ended


def _die_with_parent() -> Callable[[], None] | None:
    """Runs in the child before exec: the kernel sends it SIGTERM when this process dies. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def arrange() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return arrange


# ── ports ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _has_ipv6() -> bool:
    return _can_bind("[::1]", 0) is not None


def _can_bind(host: str, port: int) -> int | None:
    """The port that was bound, for a moment; None when it is taken or the address is not there."""
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host.strip("[]"), port))
            return int(sock.getsockname()[1])
    except OSError:
        return None


def _free_port(
    wanted: int, hosts: list[str], *, required: bool = False, taken: set[int] | None = None
) -> int:
    """`wanted` if it is free on all hosts, else any. Raises PortTaken where it is `required` (and not 0)."""
    if wanted and wanted not in (taken or ()) and all(_can_bind(host, wanted) is not None for host in hosts):
        return wanted
    if wanted and required:
        raise PortTaken(
            f"port {wanted} is taken, or not allowed, on {' or '.join(hosts)}",
            hint="Give another with --port N; --port 0 takes any free one.",
        )
    for _ in range(100):
        port = _can_bind(hosts[0], 0)
        if port is not None and port not in (taken or ()) and all(_can_bind(host, port) for host in hosts):
            return port
    raise PortTaken(f"no port is free on {' and '.join(hosts)}")


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def user_sections(path: Path) -> dict[str, Any]:
    """The plugin sections, [mail] and harmless [edge] keys of an edge.toml, paths made absolute. Raises ConfigError."""
    data = read_toml(path)
    for key in data.get("edge", {}) if isinstance(data.get("edge"), dict) else ():
        if key in OWN_KEYS:
            raise ConfigError(
                f'{path}: `guestpass up` sets "edge.{key}" itself',
                hint="Leave it out: `up` takes plugin sections and [mail]. `guestpass edge` takes the whole file.",
            )
    parse(EdgeConfig, data, path)
    sections: dict[str, Any] = _absolute(data, path.absolute().parent)
    return sections


def _absolute(value: Any, folder: Path) -> Any:
    """`./file.py:Class`, other `./…` and `{ file = "…" }`, as seen from the folder of the user's file."""
    if isinstance(value, str):
        return str(folder / value) if value.startswith(("./", "../")) else value
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"file"} and isinstance(value["file"], str):
        return {"file": str(folder / value["file"])}
    return {key: _absolute(item, folder) for key, item in value.items()}


def toml(settings: Mapping[str, Any]) -> str:
    """TOML of what tomllib reads: every top-level key a line, tables in it inline."""
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in settings.items())


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else quoted(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # Numbers, and dates and times in RFC 3339.
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)


# ── mail ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def new_codes(outbox: Path, seen: set[str]) -> list[str]:
    """A line for each sign-in code in the mails that are not in `seen`, which learns them."""
    lines = []
    try:
        files = sorted(
            path for path in outbox.iterdir() if path.match("*-code-*.eml") and path.name not in seen
        )
    except OSError:
        return []  # not there before the first mail
    for path in files:
        seen.add(path.name)
        try:
            with path.open("rb") as file:
                message = email.message_from_bytes(file.read(MAX_MAIL), policy=email.policy.default)
        except OSError:
            continue
        body = message.get_body(("plain",))
        code = CODE.search(body.get_content()) if body is not None else None
        if code is not None:
            lines.append(f"Sign-in code for {plain(message['To'])}: {code[1]}")
    return lines
