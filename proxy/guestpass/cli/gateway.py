"""`guestpass gateway …`: run a gateway, enrol it, and manage those that an edge knows."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from guestpass.cli.client import ca_file, connect, edge_url, management_options
from guestpass.cli.output import Output, count, table, when
from guestpass.cli.parser import add_command, log_option, read_secret
from guestpass.errors import ConfigError, GuestpassError, NotFound, UsageError

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands, Parser
    from guestpass.config import GatewayConfig
    from guestpass.gateway.agent import Agent


def add(commands: Commands) -> None:
    gateway = add_command(
        commands,
        "gateway",
        "run a gateway in the private network, or manage gateways",
        about="SIGTERM and SIGINT drain and end it, SIGHUP reloads the configuration.",
        example="guestpass gateway --config gateway.toml",
        run=_run,
        parents=[log_option()],
    )
    _config(gateway, "gateway.toml")
    actions = gateway.add_subparsers(title="actions", metavar="ACTION", dest="action")

    run = add_command(
        actions,
        "run",
        "run the gateway; the same without `run`",
        example="guestpass gateway run --config gateway.toml",
        run=_run,
        parents=[log_option()],
    )
    _config(run, "gateway.toml")

    enroll = add_command(
        actions,
        "enroll",
        "make this gateway's key and register it with a join token",
        about=(
            "The token comes from `guestpass gateway token`. It is read from a file, standard input or\n"
            "GUESTPASS_JOIN_TOKEN. Once enrolled, the gateway connects by its key for as long as the edge knows it."
        ),
        example=(
            "guestpass gateway enroll --edge https://share.example.com --join-token-file - --name plant-a-1 \\\n"
            "    --service dashboards=http://127.0.0.1:3000 --config gateway.toml"
        ),
        run=_enroll,
    )
    enroll.add_argument("--edge", metavar="URL", help="the edge's public URL (or GUESTPASS_EDGE)")
    enroll.add_argument(
        "--join-token-file", metavar="FILE", help="file with the join token, - for standard input"
    )
    enroll.add_argument("--name", metavar="NAME", help="this gateway's name in its site")
    _config(enroll, "its settings; written when there is no such file, never overwritten")
    enroll.add_argument(
        "--key", type=Path, metavar="FILE", help="where the key is kept (default: gateway.key)"
    )
    enroll.add_argument("--ca", metavar="FILE", help="trust only this CA for the edge (or GUESTPASS_CA)")
    enroll.add_argument(
        "--service",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a service for the new configuration file; repeatable",
    )

    edge = [management_options()]
    token = add_command(
        actions,
        "token",
        "make a join token: one gateway may enrol with it, within the hour",
        example="guestpass gateway token --site plant-a > join-token",
        run=_token,
        parents=edge,
    )
    token.add_argument("--site", required=True, metavar="SITE", help="the site that the gateway will serve")
    add_command(
        actions,
        "list",
        "list gateways and how they are",
        example="guestpass gateway list",
        run=_list,
        parents=edge,
    )
    remove = add_command(
        actions,
        "remove",
        "forget a gateway: its tunnels end at once, its key is refused from then on",
        example="guestpass gateway remove plant-a-1",
        run=_remove,
        parents=edge,
    )
    remove.add_argument(
        "name", metavar="NAME", help="NAME, or SITE/NAME where two sites have one of that name"
    )


def _config(parser: Parser, text: str) -> None:
    # Suppressed: the default of an action's own option would undo what stands before the action.
    parser.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=text)


def _run(args: argparse.Namespace, output: Output) -> int:
    """Raises GuestpassError when it cannot start."""
    if not hasattr(args, "config"):
        raise UsageError(
            "which gateway? --config is missing", hint="Try `guestpass gateway --config gateway.toml`."
        )

    from guestpass import loop
    from guestpass.config import load_gateway
    from guestpass.daemon import set_up_logging

    set_up_logging(getattr(args, "log_level", "info"))
    loop.run(_serve(load_gateway(args.config), output))
    return 0


async def _serve(config: GatewayConfig, output: Output) -> None:
    """Until SIGTERM or SIGINT, then drain; a second signal cuts the drain short."""
    import asyncio

    from guestpass.daemon import Signals, notify_systemd, spare_collector
    from guestpass.gateway.agent import Agent

    name = f"{config.gateway.site}/{config.gateway.name}"

    def ready() -> None:
        edges, services = list(config.gateway.edges), list(config.services)
        output.result(
            {"gateway": name, "edges": edges, "services": services, "pid": os.getpid()},
            f"The gateway {name} is connected to {' and '.join(edges)} (process {os.getpid()}); "
            f"it serves {', '.join(services) or 'nothing yet'}.",
        )
        notify_systemd("READY=1", f"STATUS=Connected as {name}")

    agent = Agent(config, on_ready=ready)
    spare_collector()
    with Signals(on_reload=lambda: _reload(agent, config.file)) as signals:
        serving = asyncio.create_task(agent.run())
        for signalled in (signals.stop, signals.hurry):
            waiting = asyncio.create_task(signalled.wait())
            await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def _reload(agent: Agent, path: Path) -> None:
    from guestpass.config import load_gateway
    from guestpass.daemon import reloading

    log = logging.getLogger("guestpass.gateway")
    with reloading():
        try:
            agent.reload(load_gateway(path))
        except GuestpassError as exc:
            log.error("reload: %s; nothing was changed", exc)
        else:
            log.info("reloaded %s", path)


def _enroll(args: argparse.Namespace, output: Output) -> int:
    import asyncio

    from guestpass.config import load_gateway
    from guestpass.gateway.enroll import enroll

    path: Path | None = getattr(args, "config", None)
    config = load_gateway(path) if path is not None and path.exists() else None
    if config is not None:
        if args.service:
            raise UsageError(f"{path} exists and is not changed: add the services there")
        if args.name and args.name != config.gateway.name:
            raise UsageError(f"--name is {args.name}, but {path} says {config.gateway.name}")
        if args.key:
            raise UsageError(f"--key is for a new configuration; {path} says {config.gateway.key}")
        key = config.resolve(config.gateway.key)
        name = config.gateway.name
        edge = edge_url(args.edge or os.environ.get("GUESTPASS_EDGE") or config.gateway.edges[0])
    else:
        if not args.name:
            raise UsageError("--name is missing: the gateway's name in its site")
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no such folder")
        key = args.key or (path.parent if path else Path()) / "gateway.key"
        name = args.name
        edge = edge_url(args.edge)
    services = _services(args.service)
    ca = ca_file(args.ca)
    if ca is None and config is not None and config.gateway.ca is not None:
        ca = config.resolve(config.gateway.ca)
    proxy = config.gateway.http_proxy if config is not None else None

    result = asyncio.run(enroll(edge, _join_token(args), name, key, ca=ca, http_proxy=proxy))

    data = {
        "site": result.site,
        "name": name,
        "edge": edge,
        "key": str(key),
        "config": str(path) if path else None,
    }
    text = gateway_toml(
        name=name, site=result.site, edge=edge, key=key, ca=ca, services=services, folder=path
    )
    lines = [f"Enrolled {result.site}/{name} at {edge}; its key is in {key}."]
    if path is None:
        lines += [
            "",
            "Put this into gateway.toml, then run `guestpass gateway --config gateway.toml`:",
            "",
            text,
        ]
    elif config is None:
        _write_new(path, text)
        missing = "" if services else " Name what it may reach in a [services.NAME] section first."
        lines.append(f"Wrote {path}.{missing} Run it with `guestpass gateway --config {path}`.")
    elif config.gateway.site != result.site:
        raise ConfigError(
            f'{path}: site is "{config.gateway.site}", but the join token was for "{result.site}" (key "gateway.site")',
            hint=f"The gateway is enrolled; change site to {result.site}.",
        )
    else:
        lines.append(f"Run it with `guestpass gateway --config {path}`.")
    output.result(data, *lines)
    return 0


def _join_token(args: argparse.Namespace) -> str:
    if args.join_token_file:
        return read_secret(args.join_token_file, "join token")
    token = os.environ.get("GUESTPASS_JOIN_TOKEN", "").strip()
    if not token:
        raise UsageError(
            "no join token",
            hint="Give --join-token-file FILE, or - for standard input, or set GUESTPASS_JOIN_TOKEN.",
        )
    return token


def _services(given: list[str]) -> dict[str, str]:
    from pydantic import ValidationError

    from guestpass.config import NAME, Service

    services: dict[str, str] = {}
    for text in given:
        name, equals, url = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UsageError(f"--service {text!r} is not of the form NAME=URL")
        try:
            services[name] = Service(url=url).url
        except ValidationError as exc:
            raise UsageError(f"--service {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc
    return services


def gateway_toml(
    *,
    name: str,
    site: str,
    edge: str,
    key: Path,
    ca: Path | None,
    services: dict[str, str],
    folder: Path | None,
) -> str:
    """A new gateway.toml; `folder` is the file that it is for, to which its paths are relative."""
    base = folder.absolute().parent if folder is not None else Path.cwd()
    lines = ["[gateway]", f"name = {quoted(name)}", f"site = {quoted(site)}", f"edges = [{quoted(edge)}]"]
    if ca is not None:
        lines.append(f"ca = {quoted(_relative(ca, base))}")
    lines += [f"key = {quoted(_relative(key, base))}", ""]
    for service, url in services.items():
        # A dot in a service's name must not read as a table in a table.
        lines += [f"[services.{quoted(service) if '.' in service else service}]", f"url = {quoted(url)}", ""]
    if not services:
        lines += ["# What this gateway may reach, whatever the edge asks:", "#", "# [services.dashboards]"]
        lines += ['# url = "http://127.0.0.1:3000"', '# paths = ["/**"]', ""]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A basic string of TOML; JSON's escapes are a subset of its, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _relative(path: Path, base: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise ConfigError(
            f"cannot write {path}: {exc.strerror}",
            hint="The gateway is enrolled; run it with a configuration of your own.",
        ) from exc


def _token(args: argparse.Namespace, output: Output) -> int:
    answer = connect(args).post("/gateways/join-tokens", {"site": args.site})
    output.result(answer, answer["join_token"])
    return 0


def _list(args: argparse.Namespace, output: Output) -> int:
    gateways = list(connect(args).pages("/gateways", "gateways"))
    rows = [
        (
            f"{gateway['site']}/{gateway['name']}",
            state(gateway),
            "now" if gateway["connected"] else when(gateway["last_seen"]),
            gateway["tunnels"],
            gateway["streams"],
        )
        for gateway in gateways
    ]
    text = table(("gateway", "state", "last seen", "tunnels", "streams"), rows) if rows else "No gateways."
    output.result({"gateways": gateways}, text)
    return 0


def state(gateway: dict[str, Any]) -> str:
    """`connected`, `connected, dashboards down`, `not connected`."""
    if not gateway["connected"]:
        return "not connected"
    down = sorted(name for name, healthy in gateway["services"].items() if not healthy)
    return f"connected, {', '.join(down)} down" if down else "connected"


def _remove(args: argparse.Namespace, output: Output) -> int:
    client = connect(args)
    site, slash, name = args.name.rpartition("/")
    if not slash:
        found = [g["site"] for g in client.pages("/gateways", "gateways") if g["name"] == name]
        if not found:
            raise NotFound(
                f"no gateway is called {name}", hint="See `guestpass gateway list`.", code="gateway_not_found"
            )
        if len(found) > 1:
            raise UsageError(
                f"{name} is a gateway of several sites",
                hint="Say which: " + ", ".join(f"{s}/{name}" for s in found),
            )
        site = found[0]
    answer = client.delete(f"/gateways/{quote(site, safe='')}/{quote(name, safe='')}")
    revoked = answer["revoked"]
    output.result(
        {"site": site, "name": name, **answer},
        f"Removed {site}/{name}: moved {count(revoked['sessions'], 'session')}, "
        f"ended {count(revoked['streams'], 'stream')}. Its key is refused from now on.",
    )
    return 0
