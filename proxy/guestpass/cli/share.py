"""`guestpass share …`: the owner's shares, through the management API."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from guestpass.cli.client import connect, management_options
from guestpass.cli.output import Output, count, fields, plain, table, when
from guestpass.cli.parser import add_command, addresses, expires, flatten, names, number
from guestpass.errors import UsageError

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands, Parser

# As the edge says (shares.rules), which has the last word.
MAX_SESSIONS = 100_000


def add(commands: Commands) -> None:
    share = add_command(
        commands,
        "share",
        "create, list, change and delete shares",
        example="guestpass share create --service plant-a/dashboards --path /line-3 --only --to alice@example.org",
    )
    actions = share.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    edge = [management_options()]

    create = add_command(
        actions,
        "create",
        "share a path of a service with somebody",
        about="Without --only and without --scope the whole service is shared.",
        example=(
            "guestpass share create --service plant-a/dashboards --path /line-3 --only \\\n"
            "    --to alice@example.org --expires 7d"
        ),
        run=_create,
        parents=edge,
    )
    create.add_argument("--service", required=True, metavar="SITE/SERVICE", help="what to share")
    create.add_argument(
        "--to",
        required=True,
        action="append",
        type=addresses,
        metavar="EMAIL[,EMAIL…]",
        help="with whom; repeatable",
    )
    create.add_argument("--path", default="/", metavar="/x", help="where the recipient lands (default: /)")
    _scope_options(create)
    create.add_argument("--name", metavar="TEXT", help="how it is called in lists and mails")
    create.add_argument("--message", metavar="TEXT", help="a line for the recipient")
    create.add_argument("--owner", metavar="TEXT", help="who shares, as the recipient reads it")
    create.add_argument(
        "--expires", type=expires, metavar="WHEN", help="90s, 15m, 12h, 7d, or an RFC 3339 time"
    )
    create.add_argument(
        "--max-sessions", type=number(1, MAX_SESSIONS), metavar="N", help="how many may be open at once"
    )
    create.add_argument(
        "--sign-in",
        action="append",
        type=names,
        metavar="NAME[,NAME…]",
        help="take only these ways of signing in, by their names in edge.toml (default: all)",
    )
    create.add_argument("--no-mail", action="store_true", help="send no invitation; the links are printed")

    listing = add_command(
        actions, "list", "list shares", example="guestpass share list --all", run=_list, parents=edge
    )
    listing.add_argument("--all", action="store_true", help="expired and deleted ones too")

    show = add_command(
        actions, "show", "show one share", example="guestpass share show ID", run=_show, parents=edge
    )
    _id(show)

    update = add_command(
        actions,
        "update",
        "change a share",
        about="Only what is given changes. Who is removed loses what they have open at once.",
        example="guestpass share update ID --expires 30d --add bob@example.org",
        run=_update,
        parents=edge,
    )
    _id(update)
    update.add_argument("--name", metavar="TEXT", help="how it is called in lists and mails")
    update.add_argument("--message", metavar="TEXT", help="a line for recipients")
    update.add_argument(
        "--expires",
        type=_expires_or_never,
        default=argparse.SUPPRESS,
        metavar="WHEN",
        help="90s, 15m, 12h, 7d, an RFC 3339 time, or never",
    )
    update.add_argument(
        "--max-sessions",
        type=_sessions_or_unlimited,
        default=argparse.SUPPRESS,
        metavar="N",
        help="how many may be open at once, or unlimited",
    )
    update.add_argument(
        "--sign-in",
        action="append",
        type=names,
        metavar="NAME[,NAME…]",
        help="take only these ways of signing in, or any",
    )
    update.add_argument("--path", metavar="/x", help="where recipients land")
    _scope_options(update)
    update.add_argument("--whole-service", action="store_true", help="lift the path limits")
    update.add_argument(
        "--add", action="append", type=addresses, metavar="EMAIL[,EMAIL…]", help="invite further recipients"
    )
    update.add_argument(
        "--remove", action="append", type=addresses, metavar="EMAIL[,EMAIL…]", help="remove recipients"
    )

    delete = add_command(
        actions,
        "delete",
        "end a share: links, sessions and open connections, at once",
        example="guestpass share delete ID",
        run=_delete,
        parents=edge,
    )
    _id(delete)

    token = add_command(
        actions,
        "token",
        "make a bearer token for a script or native application of a recipient",
        about="It is admitted like the recipient's browser, without signing in, and ends with the share.",
        example="guestpass share token ID --to alice@example.org --expires 1h",
        run=_token,
        parents=edge,
    )
    _id(token)
    token.add_argument("--to", required=True, metavar="EMAIL", help="for whom")
    token.add_argument(
        "--expires", type=expires, metavar="WHEN", help="90s, 15m, 12h, 7d, or an RFC 3339 time"
    )

    resend = add_command(
        actions,
        "resend",
        "mail the invitation again, with a new link",
        example="guestpass share resend ID --to alice@example.org",
        run=_resend,
        parents=edge,
    )
    _id(resend)
    resend.add_argument("--to", required=True, metavar="EMAIL", help="to whom")

    link = add_command(
        actions,
        "link",
        "print a new link for a recipient, without mailing it",
        about="The link alone admits nobody: its recipient still proves the email address.",
        example="guestpass share link ID --to alice@example.org",
        run=_link,
        parents=edge,
    )
    _id(link)
    link.add_argument("--to", required=True, metavar="EMAIL", help="for whom")


def _id(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="the share, as `guestpass share list` prints it")


def _scope_options(parser: Parser) -> None:
    parser.add_argument("--only", action="store_true", help="nothing but what is below --path")
    parser.add_argument(
        "--scope",
        action="append",
        default=[],
        metavar="RULE",
        help="a method and path that are shared, like 'GET /x/**'; repeatable",
    )


def scope_rules(args: argparse.Namespace) -> list[str]:
    """What `--only` and `--scope` say, as rules; empty for the whole service. Raises UsageError."""
    rules = list(args.scope)
    if args.only:
        path = (args.path or "/").partition("?")[0].rstrip("/")
        if not path:
            raise UsageError(
                "--only limits the share to --path, but no --path is given", hint="Add --path /x."
            )
        rules += [f"* {path}/**"]
    return rules


def _expires_or_never(text: str) -> str | None:
    return None if text == "never" else expires(text)


def _sessions_or_unlimited(text: str) -> int | None:
    return None if text == "unlimited" else number(1, MAX_SESSIONS)(text)


def site_and_service(text: str) -> tuple[str, str]:
    """Raises UsageError."""
    site, slash, service = text.partition("/")
    if not slash or not site or not service or "/" in service:
        raise UsageError(
            f"--service {text!r} is not of the form SITE/SERVICE",
            hint="`guestpass gateway list` shows the sites and their services.",
        )
    return site, service


def _at(share_id: str, *parts: str) -> str:
    return "/".join(("/shares", *(quote(part, safe="@+") for part in (share_id, *parts))))


def _create(args: argparse.Namespace, output: Output) -> int:
    site, service = site_and_service(args.service)
    share = connect(args).post(
        "/shares",
        {
            "name": args.name,
            "owner": args.owner,
            "site": site,
            "service": service,
            "path": args.path,
            "scope": scope_rules(args),
            "to": flatten(args.to),
            "expires": args.expires,
            "max_sessions": args.max_sessions,
            "sign_in": flatten(args.sign_in),
            "message": args.message,
            "invite": not args.no_mail,
        },
    )
    lines = [f"Shared {_what(share)} as {share['id']}.", "", _links(share)]
    if not share["scope"]:
        lines += [
            "",
            f"The whole service {share['site']}/{share['service']} is shared; limit it with --only or --scope.",
        ]
    if warning := share.get("warning"):
        output.warn(plain(warning))
    output.result(share, *lines)
    return 0


def _links(share: Mapping[str, Any]) -> str:
    """They cannot be printed again, only made anew."""
    return table(("for", "link"), sorted(share["links"].items()))


def _what(share: Mapping[str, Any]) -> str:
    return f"{share['site']}/{share['service']}{share['path']}"


def _list(args: argparse.Namespace, output: Output) -> int:
    shares = list(connect(args).pages("/shares", "shares", include_ended="true" if args.all else None))
    rows = [
        (
            share["id"],
            share["name"] or _what(share),
            ", ".join(r["email"] for r in share["recipients"]) or "nobody",
            share["state"],
            when(share["expires"]) if share["expires"] else "-",
            count(share["live"]["sessions"], "viewer"),
        )
        for share in shares
    ]
    text = table(("id", "name", "to", "state", "expires", "live"), rows) if rows else "No shares."
    output.result({"shares": shares}, text)
    return 0


def _show(args: argparse.Namespace, output: Output) -> int:
    share = connect(args).get(_at(args.id))
    output.result(share, _detail(share))
    return 0


def _detail(share: Mapping[str, Any]) -> str:
    live = share["live"]
    head = fields(
        [
            ("Share", share["id"]),
            ("Name", share["name"]),
            ("Of", _what(share)),
            ("Limits", "; ".join(share["scope"]) or "none: the whole service"),
            ("Origin", share["origin"]),
            ("State", share["state"]),
            ("Created", when(share["created"])),
            ("Expires", when(share["expires"])),
            ("Sessions", share["max_sessions"] and f"at most {share['max_sessions']}"),
            ("Sign-in", ", ".join(share.get("sign_in", ())) or "any"),
            ("Message", share["message"]),
            ("Live", f"{count(live['sessions'], 'session')}, {count(live['streams'], 'stream')}"),
        ]
    )
    rows = [
        (
            recipient["email"],
            " ".join(filter(None, (recipient["delivery"] or "-", recipient["delivery_detail"]))),
            when(recipient["first_opened"]),
            when(recipient["last_opened"]),
        )
        for recipient in share["recipients"]
    ]
    people = table(("recipient", "mail", "first opened", "last opened"), rows) if rows else "No recipients."
    return f"{head}\n\n{people}"


def _update(args: argparse.Namespace, output: Output) -> int:
    changes: dict[str, Any] = {}
    for key in ("name", "message", "path"):
        if getattr(args, key) is not None:
            changes[key] = getattr(args, key)
    # None is a value here ("never", "unlimited"); absent options leave no trace in what was typed.
    for key, default in (("expires", ...), ("max_sessions", ...)):
        if getattr(args, key, default) is not default:
            changes[key] = getattr(args, key)
    if args.whole_service and (args.only or args.scope):
        raise UsageError("--whole-service lifts the limits that --only and --scope set: give one of them")
    if args.whole_service:
        changes["scope"] = []
    elif args.only or args.scope:
        changes["scope"] = scope_rules(args)
    if ways := flatten(args.sign_in):
        changes["sign_in"] = [] if ways == ["any"] else ways
    if added := flatten(args.add):
        changes["add"] = added
    if removed := flatten(args.remove):
        changes["remove"] = removed
    if not changes:
        raise UsageError("nothing to change", hint="See `guestpass share update --help`.")
    share = connect(args).patch(_at(args.id), changes)
    lines = [f"Changed {share['id']}.", "", _detail(share)]
    if share["links"]:
        lines += ["", _links(share)]
    if removed:
        revoked = share["revoked"]
        lines += [
            "",
            f"Ended {count(revoked['sessions'], 'session')} and {count(revoked['streams'], 'stream')}.",
        ]
    output.result(share, *lines)
    return 0


def _delete(args: argparse.Namespace, output: Output) -> int:
    answer = connect(args).delete(_at(args.id))
    revoked = answer["revoked"]
    output.result(
        {"id": args.id, **answer},
        f"Deleted {args.id}: ended {count(revoked['sessions'], 'session')} and "
        f"{count(revoked['streams'], 'stream')} in {revoked['took_ms']:.1f} ms. Its links are dead.",
    )
    return 0


def _token(args: argparse.Namespace, output: Output) -> int:
    answer = connect(args).post(_at(args.id, "tokens"), {"email": args.to, "expires": args.expires})
    output.result(answer, answer["token"])
    return 0


def _resend(args: argparse.Namespace, output: Output) -> int:
    answer = connect(args).post(_at(args.id, "resend"), {"email": args.to})
    output.result(answer, f"A new invitation to {args.to} is on its way.")
    return 0


def _link(args: argparse.Namespace, output: Output) -> int:
    answer = connect(args).post(_at(args.id, "links"), {"email": args.to})
    output.result(answer, answer["link"])
    return 0
