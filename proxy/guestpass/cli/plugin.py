"""`guestpass plugin …`: what is installed, and how it is configured."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from guestpass.cli.output import Output, fields, table
from guestpass.cli.parser import add_command
from guestpass.errors import PluginError

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands
    from guestpass.edge.plugins import Available

KIND_NAMES = ("authenticator", "revoker", "backend-chooser", "request-filter", "notifier", "observer")


def add(commands: Commands) -> None:
    plugin = add_command(
        commands, "plugin", "list, describe, write and check plugins", example="guestpass plugin list"
    )
    actions = plugin.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    add_command(
        actions,
        "list",
        "list the installed plugins, without running any of them",
        about="What runs is named in edge.toml.",
        example="guestpass plugin list",
        run=_list,
    )
    show = add_command(
        actions,
        "show",
        "show what a plugin is for, and its settings",
        example="guestpass plugin show email-code",
        run=_show,
    )
    show.add_argument("name", metavar="NAME", help="as `guestpass plugin list` prints it")
    new = add_command(
        actions,
        "new",
        "write a package with a plugin that works, and its tests",
        about="The folder NAME is made; it has a `make check` of its own.",
        example="guestpass plugin new office-hours --kind request-filter",
        run=_new,
    )
    new.add_argument("name", metavar="NAME", help="of the plugin and its folder")
    new.add_argument("--kind", required=True, choices=sorted(KIND_NAMES), help="what it decides or does")
    new.add_argument("--in", dest="folder", metavar="FOLDER", default=".", help="where (default: here)")
    check = add_command(
        actions,
        "check",
        "check a plugin's hooks, settings and types, and run it in a real edge",
        about="Its code is run: check only what you would install.",
        example="guestpass plugin check office-hours\nguestpass plugin check ./office_hours.py:OfficeHours",
        run=_check,
    )
    check.add_argument(
        "name",
        metavar="NAME_OR_PATH",
        help="an installed plugin, a folder with its pyproject.toml, a file, or module:Class",
    )
    check.add_argument("--settings", metavar="FILE", help="TOML file with its settings, as in its section")


def _new(args: argparse.Namespace, output: Output) -> int:
    from guestpass.cli.plugin_new import new

    return new(args, output)


def _check(args: argparse.Namespace, output: Output) -> int:
    from guestpass.cli.plugin_check import check

    return check(args, output)


def _list(args: argparse.Namespace, output: Output) -> int:
    from guestpass.edge.plugins import load_available

    plugins = load_available()
    rows = [(p.name, p.kind, p.target, f"{p.package} {p.version}") for p in plugins]
    text = table(("name", "kind", "class", "package"), rows) if rows else "No plugins are installed."
    output.result({"plugins": [dataclasses.asdict(plugin) for plugin in plugins]}, text)
    return 0


def _show(args: argparse.Namespace, output: Output) -> int:
    from guestpass.config import nearest
    from guestpass.edge.plugins import load_available

    plugins = load_available()
    found = [_describe(plugin) for plugin in plugins if plugin.name == args.name]
    if not found:
        near = nearest(args.name, [plugin.name for plugin in plugins])
        raise PluginError(
            f'no plugin is called "{args.name}"',
            hint=f'Did you mean "{near}"?' if near else "See `guestpass plugin list`.",
            code="plugin_not_found",
        )
    # Two kinds may have a plugin of one name: their sections in edge.toml tell them apart.
    data = found[0] if len(found) == 1 else {"plugins": found}
    output.result(data, "\n\n".join(_text(plugin) for plugin in found))
    return 0


def _describe(plugin: Available) -> dict[str, Any]:
    from guestpass.edge.plugins import KINDS, load_class

    kind = next(kind for kind in KINDS.values() if kind.name == plugin.kind)
    cls = load_class(kind, plugin.name, Path())
    settings = [
        {
            "key": field.alias or name,
            "type": _type_name(field.annotation),
            "required": field.is_required(),
            "default": None if field.is_required() else _plain(field.get_default(call_default_factory=True)),
            "about": field.description or "",
        }
        for name, field in cls.Config.model_fields.items()
    ]
    return {
        **dataclasses.asdict(plugin),
        "section": kind.section,
        "doc": inspect.cleandoc(cls.__doc__ or sys.modules[cls.__module__].__doc__ or ""),
        "config": settings,
    }


# What is written in TOML; secrets are { env = … } or { file = … }.
TYPE_NAMES = {
    "str": "text",
    "SecretStr": "secret",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
}


def _type_name(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type_name(annotation.__origin__)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) in (tuple, list, set, frozenset):
        return f"list of {_type_name(get_args(annotation)[0])}"
    if get_origin(annotation) in (dict, Mapping):
        return "table"
    if not isinstance(annotation, type) or get_origin(annotation) is not None:
        return str(annotation).replace("typing.", "")
    return TYPE_NAMES.get(annotation.__name__, annotation.__name__.lower())


def _plain(value: Any) -> Any:
    """As JSON and TOML have it."""
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(of) for key, of in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _need(setting: dict[str, Any]) -> str:
    if setting["required"]:
        return "required"
    return (
        "optional"
        if setting["default"] in (None, "", [], {})
        else f"default {json.dumps(setting['default'])}"
    )


def _header(section: str) -> str:
    """As the documentation writes it: of choosers there is usually one."""
    return "[choose]" if section == "choose" else f"[[{section}]]"


def _text(plugin: dict[str, Any]) -> str:
    head = fields(
        [
            ("Plugin", plugin["name"]),
            ("Kind", plugin["kind"]),
            ("Class", plugin["target"]),
            ("Package", f"{plugin['package']} {plugin['version']}"),
            ("In edge.toml", f'{_header(plugin["section"])} with use = "{plugin["name"]}"'),
        ]
    )
    rows = [(s["key"], s["type"], _need(s), s["about"]) for s in plugin["config"]]
    settings = table(("setting", "type", "", ""), rows) if rows else "It has no settings."
    return "\n\n".join(part for part in (head, plugin["doc"], settings) if part)
