"""`guestpass doctor`: look at everything that usually is wrong, and say what to do."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import socket
import sqlite3
import ssl
import stat
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from guestpass import __version__
from guestpass.cli.client import Client, api_key, ca_file, edge_url, management_options, unreachable
from guestpass.cli.gateway import state
from guestpass.cli.output import Output, count, plain, when
from guestpass.cli.parser import add_command
from guestpass.cli.probe import EXPIRY_WARN, FAIL, OK, TIMEOUT, WARN, Check, edge_path
from guestpass.errors import GuestpassError

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands
    from guestpass.config import EdgeConfig, GatewayConfig

MARKS = {OK: "ok  ", WARN: "warn", FAIL: "FAIL"}


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        "check this installation, a configuration, and the way to an edge",
        about=(
            "Checks DNS, HTTP proxy, TCP, TLS, the WebSocket upgrade, clocks and gateways of --edge, and the plugins,\n"
            "store, ports, keys and services of --config. The status is 1 when a check fails."
        ),
        example="guestpass doctor --config gateway.toml\nguestpass doctor --edge https://share.example.com",
        run=run,
        parents=[management_options()],
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="an edge.toml or gateway.toml")


def run(args: argparse.Namespace, output: Output) -> int:
    checks: list[Check] = []
    for check in _all(args):
        checks.append(check)
        output.say(f"{MARKS[check.status]}  {plain(check.name)}: {plain(check.detail)}")
        if check.hint:
            output.say(f"        {plain(check.hint)}")
    failed = sum(check.status == FAIL for check in checks)
    warned = sum(check.status == WARN for check in checks)
    verdict = f"{count(failed, 'check')} failed." if failed else "Nothing failed."
    if warned:
        verdict += f" {count(warned, 'warning')}."
    output.result({"ok": not failed, "checks": [check.as_json() for check in checks]}, "", verdict)
    return 1 if failed else 0


def _all(args: argparse.Namespace) -> Iterator[Check]:
    yield from installation()
    if args.config is not None:
        yield from _configuration(args.config)
    if args.edge or os.environ.get("GUESTPASS_EDGE"):
        yield from _management(args)


# ── this machine ─────────────────────────────────────────────────────────────────────────────────────────────────


def installation() -> Iterator[Check]:
    """Version, event loop, compiled core."""
    yield Check(
        "version", OK, f"guestpass {__version__}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}"
    )
    try:
        from guestpass_speedups import session, websocket  # noqa: F401
    except ImportError as exc:
        yield Check(
            "compiled core",
            FAIL,
            f"it cannot be imported: {exc}",
            "Install the wheel, or build it: python setup.py build_ext --inplace",
        )
        return
    yield Check("compiled core", OK, "present")
    from guestpass import loop

    event_loop = loop.new_event_loop()
    name = type(event_loop).__module__.partition(".")[0]
    event_loop.close()
    if name == "uvloop":
        yield Check("event loop", OK, "uvloop")
    else:
        yield Check("event loop", WARN, f"{name}; slower than uvloop", "Install uvloop where it exists.")


# ── a configuration ──────────────────────────────────────────────────────────────────────────────────────────────


def _configuration(path: Path) -> Iterator[Check]:
    from guestpass.config import load_edge, load_gateway

    try:
        if is_gateway_file(path):
            gateway = load_gateway(path)
            yield Check("configuration", OK, f"{path}: gateway {gateway.gateway.site}/{gateway.gateway.name}")
            yield from _gateway(gateway)
        else:
            edge = load_edge(path)
            yield Check("configuration", OK, f"{path}: edge {edge.edge.public_url}")
            yield from _edge(edge)
    except GuestpassError as exc:
        yield Check("configuration", FAIL, exc.message, exc.hint)


def is_gateway_file(path: Path) -> bool:
    """Whether a TOML file has the sections of a gateway.toml; faults are left to its loader."""
    try:
        sections = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return "gateway" in sections or "services" in sections


def _edge(config: EdgeConfig) -> Iterator[Check]:
    from guestpass.edge.home import with_notifiers
    from guestpass.edge.plugins import KINDS, PluginSet

    try:
        complete = with_notifiers(config)
        PluginSet.load(complete).discard()
        sections = (getattr(complete, section) for section in KINDS)
        yield Check(
            "plugins", OK, ", ".join(plugin.name or plugin.use for section in sections for plugin in section)
        )
    except GuestpassError as exc:
        yield Check("plugins", FAIL, exc.message, exc.hint)
    running = _running(config)
    yield _store(config, running)
    for url in [*config.edge.listen, *config.edge.redirect_listen, f"http://{config.edge.admin_listen}"]:
        yield _port(url, running)
    yield from certificate(config)


def _running(config: EdgeConfig) -> bool:
    """Whether an edge answers at this configuration's admin_listen."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{config.edge.admin_listen}/healthz", timeout=TIMEOUT) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _store(config: EdgeConfig, running: bool) -> Check:
    """Looks without changing anything: opening it as an edge does would migrate it."""
    path = config.database
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if os.access(folder, os.W_OK | os.X_OK):
            return Check("store", OK, f"{path} will be made at the first start")
        return Check(
            "store",
            FAIL,
            f"{path} cannot be made: {folder} is not writable",
            "Make the folder, or name another.",
        )
    holder = _lock_holder(path.with_name(path.name + ".lock"))
    if holder:
        if running:
            return Check("store", OK, f"{path} is in use by the edge that runs")
        hint = "Stop that process first, or name another database in `state`."
        return Check("store", FAIL, f"{path} is in use by process {holder}", hint)
    if not os.access(path, os.R_OK | os.W_OK):
        return Check(
            "store", FAIL, f"{path} cannot be read and written by this user", "The edge's user must own it."
        )
    try:
        return _schema(path)
    except sqlite3.Error as exc:
        hint = f"Stop the edge, move it away and restore a backup as {path}."
        return Check("store", FAIL, f"{path} cannot be read: {exc}", hint)


def _lock_holder(lock: Path) -> str:
    """The process that has the store open; empty when none has."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "?"
    finally:
        os.close(handle)
    return ""


def _schema(path: Path) -> Check:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    from guestpass.shares.store.database import MIGRATIONS
    from guestpass.shares.store.schema import REVISION, VERSION_TABLE

    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found = (
            db.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
            if VERSION_TABLE in tables
            else None
        )
    if tables and found is None:
        return Check("store", FAIL, f"{path} is a database of another program", "Name a new file in `state`.")
    if found is None or found[0] == REVISION:
        return Check("store", OK, f"{path} opens, schema {REVISION}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    if found[0] not in {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}:
        hint = "Install that version again, or restore the backup from before the upgrade."
        return Check("store", FAIL, f"{path} was written by a newer Guestpass (schema {found[0]})", hint)
    return Check("store", OK, f"{path} opens; the next start migrates schema {found[0]} to {REVISION}")


def _port(url: str, running: bool) -> Check:
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port if parts.port is not None else 443 if parts.scheme == "https" else 80
    name = f"port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except PermissionError:
        hint = "Ports below 1024 need a right: AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit."
        return Check(name, FAIL, f"{url}: not allowed", hint)
    except OSError as exc:
        if running:
            return Check(name, OK, f"{url} is in use by the edge that runs")
        return Check(
            name, FAIL, f"{url}: {exc.strerror}", "Stop what listens there (ss -ltnp), or listen elsewhere."
        )
    return Check(name, OK, f"{url} is free")


def certificate(config: EdgeConfig) -> Iterator[Check]:
    """Certificates and keys: they load, belong together, are valid, and cover our names."""
    from guestpass.edge import certificates
    from guestpass.edge.acme import Storage

    covered: list[str] = []
    found = list(certificates.sources(config))
    if config.acme is not None:
        storage = Storage(config.acme_storage)
        for host in config.acme.hosts:
            source = storage.source(host)
            if source is not None:
                found.append(source)
            else:
                text = f"{host} has none by ACME yet"
                yield Check(
                    "certificate", WARN, text, "The edge orders it when it runs; its log says how it went."
                )
    for source in found:
        try:
            loaded = certificates.load(source, config.file)
        except GuestpassError as exc:
            yield Check("certificate", FAIL, exc.message, exc.hint)
            return
        yield _validity(source.cert, loaded.begins, loaded.expires)
        if not loaded.hosts:
            yield Check(
                "certificate names",
                FAIL,
                f"{source.cert} names no host",
                "Ask for one with subject alternative names.",
            )
        covered += loaded.hosts
    if not covered:
        return
    wanted = []
    if config.edge.public_url.startswith("https:"):
        host = urlsplit(config.edge.public_url).hostname or ""
        wanted = [host, f"*.{urlsplit('//' + config.edge.share_domain).hostname}"]
    absent = [name for name in wanted if not certificates.covers(covered, name)]
    if absent:
        yield Check(
            "certificate names",
            WARN,
            f"{' and '.join(str(source.cert) for source in found)} does not cover {' and '.join(absent)}",
            "Shares live below share_domain: a certificate needs that wildcard, unless another proxy ends TLS.",
        )
    else:
        yield Check("certificate names", OK, ", ".join(sorted(covered)))


def _validity(path: Path, begins: float, expires: float) -> Check:
    from datetime import UTC, datetime

    first, last = datetime.fromtimestamp(begins, UTC), datetime.fromtimestamp(expires, UTC)
    left = expires - time.time()
    if begins > time.time():
        text = f"{path} is not valid before {first:%Y-%m-%d %H:%M} UTC"
        return Check("certificate", FAIL, text, "Check this machine's clock.")
    if left < EXPIRY_WARN:
        text = f"{path} {'expired' if left <= 0 else 'expires'} on {last:%Y-%m-%d}"
        return Check("certificate", FAIL if left <= 0 else WARN, text, "Renew it, then send the edge SIGHUP.")
    return Check("certificate", OK, f"{path} and its key fit, valid until {last:%Y-%m-%d}")


def _gateway(config: GatewayConfig) -> Iterator[Check]:
    yield key_file(config.resolve(config.gateway.key))
    if not config.services:
        yield Check("services", WARN, "none is configured", "Add a section [services.NAME] with its url.")
    for name, service in config.services.items():
        yield _service(name, service.url)
    ca = config.resolve(config.gateway.ca) if config.gateway.ca is not None else None
    for edge in config.gateway.edges:
        for check in edge_path(edge, ca=ca, http_proxy=config.gateway.http_proxy):
            yield Check(f"{edge} {check.name}", check.status, check.detail, check.hint)


def key_file(path: Path) -> Check:
    """A gateway's private key: there, private, and of the right kind."""
    from guestpass.gateway.enroll import load_key

    try:
        load_key(path)
    except GuestpassError as exc:
        return Check("key", FAIL, exc.message, exc.hint)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Check("key", FAIL, f"{path} can be read by others (mode {mode:04o})", f"Run: chmod 600 {path}")
    return Check("key", OK, f"{path} is an Ed25519 key and private")


def _service(name: str, url: str) -> Check:
    parts = urlsplit(url)
    what = f"service {name}"
    try:
        if parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(TIMEOUT)
                sock.connect(parts.path)
        else:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=TIMEOUT).close()
    except OSError as exc:
        error = unreachable(url, exc)
        return Check(what, FAIL, error.message, "Start the application, or correct the service's url.")
    return Check(what, OK, f"{url} accepts connections")


# ── the edge's management API ────────────────────────────────────────────────────────────────────────────────────


def _management(args: argparse.Namespace) -> Iterator[Check]:
    edge = edge_url(args.edge)
    ca = ca_file(args.ca)
    well = True
    for check in edge_path(edge, ca=ca):
        well = well and check.status != FAIL
        yield check
    if not well:
        return
    if not (args.api_key or args.api_key_file or os.environ.get("GUESTPASS_API_KEY")):
        yield Check(
            "API key", WARN, "none was given: the gateways were not looked at", "Set GUESTPASS_API_KEY."
        )
        return
    try:
        gateways = list(Client(edge, api_key(args), ca=ca, timeout=TIMEOUT).pages("/gateways", "gateways"))
    except GuestpassError as exc:
        yield Check("API key", FAIL, exc.message, exc.hint)
        return
    yield Check("API key", OK, "the edge accepts it")
    if not gateways:
        yield Check(
            "gateways", WARN, "none is enrolled", "Make a join token: `guestpass gateway token --site SITE`."
        )
    for gateway in gateways:
        yield _gateway_state(gateway)


def _gateway_state(gateway: dict[str, Any]) -> Check:
    name = f"gateway {gateway['site']}/{gateway['name']}"
    text = state(gateway)
    if text == "connected":
        return Check(name, OK, f"connected by {count(gateway['tunnels'], 'tunnel')}")
    if gateway["connected"]:
        return Check(
            name, WARN, text, "Start the application, or run doctor with --config gateway.toml there."
        )
    seen = when(gateway["last_seen"])
    return Check(
        name, WARN, f"not connected, last seen: {seen}", "Is it running? Try `guestpass doctor` there."
    )
