"""`guestpass up`: an edge, gateways and one share for a local application, in one command."""

from __future__ import annotations

import argparse
import http.client
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guestpass.cli.output import Output, fields, plain, when
from guestpass.cli.parser import add_command, addresses, expires, flatten, number
from guestpass.cli.share import scope_rules
from guestpass.errors import UsageError

if TYPE_CHECKING:
    from guestpass.cli.local import Plan, Running
    from guestpass.cli.parser import Commands

# A local application answers at once; a slow one is warned about, not waited for.
PROBE_TIMEOUT = 5.0

# More gateways of one machine show nothing more.
MAX_GATEWAYS = 16

# As edge.toml has it: whoever parses a command line does not import all of that.
MAX_WORKERS = 64


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "up",
        "share a local application: edge, gateways and one share in one command",
        about=(
            "Everything runs on this machine, each part as a process of its own, and ends with Ctrl-C.\n"
            "Without --only and --scope the whole application is shared. With no [mail] in --config,\n"
            "mail is written to a folder and the sign-in code is printed here."
        ),
        example="guestpass up http://127.0.0.1:3000 --to alice@example.org --path /line-3 --only --expires 12h",
        run=run,
    )
    parser.add_argument(
        "url", metavar="URL", help="the application, like http://127.0.0.1:3000 or unix:///run/app.sock"
    )
    parser.add_argument(
        "--to",
        required=True,
        action="append",
        type=addresses,
        metavar="EMAIL[,EMAIL…]",
        help="with whom; repeatable",
    )
    parser.add_argument(
        "--path", metavar="/x", help="where the recipient lands (default: the path of URL, or /)"
    )
    parser.add_argument("--only", action="store_true", help="nothing but what is below --path")
    parser.add_argument(
        "--scope",
        action="append",
        default=[],
        metavar="RULE",
        help="a method and path that are shared, like 'GET /x/**'; repeatable",
    )
    parser.add_argument(
        "--expires", type=expires, metavar="WHEN", help="90s, 15m, 12h, 7d, or an RFC 3339 time"
    )
    parser.add_argument("--name", default="", metavar="TEXT", help="how the share is called")
    parser.add_argument("--message", default="", metavar="TEXT", help="a line for the recipient")
    parser.add_argument(
        "--port",
        type=number(0, 65535),
        default=8080,
        metavar="N",
        help="for visitors; 0: any free one (default: 8080)",
    )
    parser.add_argument(
        "--gateways",
        type=number(1, MAX_GATEWAYS),
        default=1,
        metavar="N",
        help="how many gateways (default: 1)",
    )
    parser.add_argument(
        "--workers",
        type=number(1, MAX_WORKERS),
        metavar="N",
        help="how many processes serve visitors (default: 1, or what --config says)",
    )
    parser.add_argument("--https", action="store_true", help="serve visitors over TLS, with a throw-away CA")
    parser.add_argument("--no-fast-lane", action="store_true", help="relay every request in Python")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="take the plugin sections and [mail] of this edge.toml"
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="how much the parts log on standard error (default: warning)",
    )


def run(args: argparse.Namespace, output: Output) -> int:
    """Raises GuestpassError when a part cannot start, or ends by itself."""
    from guestpass import loop
    from guestpass.cli.local import run_locally

    plan = make_plan(args)
    if not answers(plan.service):
        output.warn(
            f"nothing answers at {plain(plan.service)} yet; visitors see an error page until the application is there"
        )
    loop.run(run_locally(plan, output, ready=lambda running: _ready(plan, running, output)))
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """What the arguments ask for. Raises UsageError, InvalidEmail."""
    from guestpass.addresses import canonical
    from guestpass.cli.local import Plan, user_sections
    from guestpass.config import Service
    from guestpass.scope import check_path, parse_scope

    service, path = split_application(args.url)
    if args.path is not None and path not in ("", "/"):
        raise UsageError(f"the URL has a path, {path}, and so has --path: give one of them")
    args.path = args.path or path or "/"
    check_path(args.path, what="--path")
    scope = scope_rules(args)
    for rule in scope:
        parse_scope(rule)
    try:
        service = Service(url=service).url
    except ValueError as exc:
        raise UsageError(f"{args.url!r} is not a URL of an application", hint=URL_HINT) from exc
    recipients = list(dict.fromkeys(canonical(address) for address in flatten(args.to)))
    if not recipients:
        raise UsageError("--to names nobody")
    return Plan(
        service=service,
        path=args.path,
        scope=scope,
        recipients=recipients,
        expires=args.expires,
        name=args.name,
        message=args.message,
        port=args.port,
        gateways=args.gateways,
        workers=args.workers,
        https=args.https,
        fast_lane=not args.no_fast_lane,
        sections=user_sections(args.config) if args.config is not None else {},
        config=args.config,
        log_level=args.log_level,
    )


URL_HINT = "Write it like http://127.0.0.1:3000, or unix:///path/to/socket."


def split_application(url: str) -> tuple[str, str]:
    """(service, path): `http://127.0.0.1:3000/x?y` is the path `/x?y` of a service. Raises UsageError."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as exc:
        raise UsageError(f"{url!r} is not a URL: {exc}", hint=URL_HINT) from exc
    if parts.scheme == "unix":
        return url, ""
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or "@" in parts.netloc:
        raise UsageError(f"{url!r} is not a URL of an application", hint=URL_HINT)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}", (parts.path or ("/" if query else "")) + query


def answers(service: str) -> bool:
    """Whether an HTTP server is there; whatever it answers."""
    parts = urlsplit(service)
    connection: http.client.HTTPConnection
    if parts.scheme == "unix":
        connection = http.client.HTTPConnection("localhost", timeout=PROBE_TIMEOUT)
    elif parts.scheme == "https":
        # Only whether it answers is asked here; the gateway verifies the certificate.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=PROBE_TIMEOUT, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PROBE_TIMEOUT)
    try:
        if parts.scheme == "unix":
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(PROBE_TIMEOUT)
            connection.sock.connect(parts.path)
        connection.request("HEAD", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _ready(plan: Plan, running: Running, output: Output) -> None:
    facts = running.facts
    limits = "; ".join(plan.scope) if plan.scope else "the whole application; limit it with --only or --scope"
    links = list(running.links.items())
    rows: list[tuple[str, object]] = [
        ("Application", plan.service),
        ("Shared", limits),
        ("Expires", when(running.expires) if running.expires else "when this ends"),
    ]
    rows += [(f"Link for {email}", link) for email, link in links]
    rows += [
        ("Origin", facts["origin"]),
        ("Console", f"{facts['edge']}/console (API key {facts['api_key']})"),
        ("Metrics", facts["metrics"]),
        ("Mail", f"{facts['outbox']} (no mail server is configured)" if facts["outbox"] else "is sent"),
    ]
    if plan.https:
        rows.append(("CA", f"{facts['ca']} (a browser must trust it, or you click through its warning)"))
    text = [fields(rows), ""]
    if facts["outbox"]:
        text.append("Open a link and ask for a code: it is printed here. Ctrl-C ends everything.")
    else:
        text.append("Ctrl-C ends everything.")
    output.result(facts, *text)
