"""`guestpass plugin check`: whether a plugin fits the plugin API, and what it does in a real edge.

The steps, in order; the first that fails ends the check, because the next ones rest on it:

1. *load*: found and imported, by an installed name, a folder with a pyproject.toml, a file, or a dotted path;
2. *class*: of a kind, of our API version, with every hook that it needs;
3. *docstring*: what `guestpass plugin show` tells an operator;
4. *hooks*: their parameters and types, and names that are nearly those of hooks;
5. *settings*: typed, and which are required;
6. *run*: started in a real edge, asked what its kind is asked, and stopped.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import difflib
import inspect
import logging
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from guestpass.cli.output import Output, table
from guestpass.edge.plugin_loader import KINDS, Kind, load_available, load_class
from guestpass.errors import GuestpassError, PluginError, UsageError
from guestpass.plugin import Plugin
from guestpass.testing import TestEdge, edge_with, use

# What a check waits for, in seconds: the plugin's own deadlines are shorter.
RUN_SECONDS = 60.0

# What a visitor types into.
INPUT = re.compile(r'<input [^>]*name="([A-Za-z0-9_-]+)"')

# Methods of a plugin that the edge calls.
LIFECYCLE = ("start", "stop")


@dataclass
class Report:
    """What was looked at, and what was found."""

    steps: list[dict[str, Any]] = field(default_factory=list)

    def passed(self, step: str, detail: str) -> None:
        self.steps.append({"step": step, "ok": True, "detail": detail})

    def failed(self, step: str, *faults: str) -> None:
        self.steps += [{"step": step, "ok": False, "detail": fault} for fault in faults]

    @property
    def ok(self) -> bool:
        return all(step["ok"] for step in self.steps)


def check(args: argparse.Namespace, output: Output) -> int:
    settings = _settings(args.settings)
    report = Report()
    found: tuple[Kind, type[Plugin]] | None = None
    with _path_of(args.name), _silent("guestpass"):  # what the edge logs is told as a step
        try:
            found = find(args.name)
        except GuestpassError as exc:
            report.failed("load", f"{exc.message}. {exc.hint}".rstrip(". ") + ".")
        if found is not None:
            examine(report, *found, settings)
    kind, cls = found or (None, None)
    data = {
        "plugin": args.name,
        "kind": kind.name if kind is not None else None,
        "class": f"{cls.__module__}:{cls.__qualname__}" if cls is not None else None,
        "ok": report.ok,
        "steps": report.steps,
    }
    lines = table(
        ("step", "", "found"),
        [(s["step"], "ok" if s["ok"] else "FAILED", s["detail"]) for s in report.steps],
    )
    output.result(data, lines, "", "It fits." if report.ok else "It does not fit yet.")
    return 0 if report.ok else 1


def _settings(path: str | None) -> dict[str, Any]:
    """Raises UsageError."""
    if path is None:
        return {}
    try:
        found = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{path}: {exc}", hint="A TOML file with the plugin's settings, as in its section."
        ) from exc
    return {key: value for key, value in found.items() if key not in ("use", "name", "isolation")}


# ── load ────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _path_of(name: str) -> Iterator[None]:
    """A package's folder is looked for modules as its own tests do."""
    source = Path(name) / "src"
    if not (Path(name) / "pyproject.toml").is_file() or not source.is_dir():
        yield
        return
    sys.path.insert(0, str(source.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(source.resolve()))


def find(name: str) -> tuple[Kind, type[Plugin]]:
    """The class that a name, a folder, a file or a dotted path names. Raises PluginError."""
    folder = Path(name)
    if (folder / "pyproject.toml").is_file():
        return _from_folder(folder)
    if name.endswith(".py"):
        return _only_class(name)
    if ":" in name:
        errors: list[PluginError] = []
        target = name if not name.partition(":")[0].endswith(".py") or name[0] in "./" else f"./{name}"
        for kind in KINDS.values():
            try:
                return kind, load_class(kind, target, Path.cwd())
            except PluginError as exc:
                if "is of kind" not in exc.message:
                    errors.append(exc)
        raise errors[0]
    installed = [plugin for plugin in load_available() if plugin.name == name]
    if not installed:
        near = difflib.get_close_matches(name, [p.name for p in load_available()], n=1)
        raise PluginError(
            f'no plugin is called "{name}", and there is no such folder with a pyproject.toml',
            hint=f'Did you mean "{near[0]}"?' if near else "`guestpass plugin list` shows what is installed.",
        )
    kind = next(kind for kind in KINDS.values() if kind.name == installed[0].kind)
    return kind, load_class(kind, name, Path.cwd())


def _from_folder(folder: Path) -> tuple[Kind, type[Plugin]]:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise PluginError(f"{folder / 'pyproject.toml'}: {exc}") from exc
    groups: Mapping[str, Any] = project.get("project", {}).get("entry-points", {})
    for kind in KINDS.values():
        for target in dict(groups.get(kind.group, {})).values():
            return kind, load_class(kind, str(target), folder)
    known = ", ".join(kind.group for kind in KINDS.values())
    raise PluginError(
        f"{folder / 'pyproject.toml'} has no entry point of a plugin", hint=f"The groups are {known}."
    )


def _only_class(name: str) -> tuple[Kind, type[Plugin]]:
    """Of a file without a class behind a colon: the one that it has."""
    path = Path(name)
    try:
        tree = ast.parse(path.read_text("utf-8"), str(path))
    except (OSError, SyntaxError, ValueError) as exc:
        raise PluginError(f"{path} cannot be read: {exc}") from exc
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef)]
    found: list[tuple[Kind, type[Plugin]]] = []
    faults: list[PluginError] = []
    for cls in classes:
        for kind in KINDS.values():
            try:
                found.append((kind, load_class(kind, f"{path.resolve()}:{cls}", Path.cwd())))
            except PluginError as exc:
                # Of another kind, or no plugin at all: helpers are classes as well.
                if "is of kind" not in exc.message and "is not a plugin class" not in exc.message:
                    faults.append(exc)
    if len(found) == 1:
        return found[0]
    if not found and faults:
        raise faults[0]
    raise PluginError(
        f"{path} has {len(found) or 'no'} plugin classes that can be loaded", hint=f"Name one: {path}:Class."
    )


# ── examine ─────────────────────────────────────────────────────────────────────────────────────────────────


def examine(report: Report, kind: Kind, cls: type[Plugin], settings: Mapping[str, Any]) -> None:
    report.passed("load", f"{cls.__module__}:{cls.__qualname__}")
    report.passed("class", f"{kind.name}, API version {cls.api_version}")
    doc = inspect.cleandoc(cls.__doc__ or sys.modules[cls.__module__].__doc__ or "")
    if not doc or cls.__doc__ == kind.base.__doc__:
        report.failed("docstring", f"{cls.__name__} has none: say in one line what it does for an operator")
    else:
        report.passed("docstring", doc.splitlines()[0])
    faults = list(hook_faults(kind, cls))
    if faults:
        report.failed("hooks", *faults)
    else:
        report.passed("hooks", ", ".join(overridden(kind, cls)))
    _examine_settings(report, cls, settings)
    if report.ok:
        _run(report, kind, cls, settings)


def hooks_of(base: type[Plugin]) -> list[str]:
    """What a kind may override, besides the life cycle."""
    return [
        name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")
    ]


def overridden(kind: Kind, cls: type[Plugin]) -> list[str]:
    return [h for h in hooks_of(kind.base) if getattr(cls, h) is not getattr(kind.base, h)]


def hook_faults(kind: Kind, cls: type[Plugin]) -> Iterator[str]:
    """Hooks whose signature is another one than the API's, and methods that look like a hook."""
    hooks = hooks_of(kind.base)
    for name in (
        *overridden(kind, cls),
        *(n for n in LIFECYCLE if getattr(cls, n) is not getattr(Plugin, n)),
    ):
        base = getattr(kind.base, name)
        ours = list(inspect.signature(base).parameters.values())
        theirs = list(inspect.signature(getattr(cls, name)).parameters.values())
        takes_all = any(p.kind is p.VAR_POSITIONAL for p in theirs)
        required = [p for p in theirs if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if not takes_all and (len(theirs) < len(ours) or len(required) > len(ours)):
            wanted = ", ".join(p.name for p in ours)
            given = ", ".join(p.name for p in theirs)
            yield f"{name}({given}) should be {name}({wanted})"
            continue
        yield from _type_faults(name, base, getattr(cls, name))
    for name, value in vars(cls).items():
        if name.startswith("_") or name in (*hooks, *LIFECYCLE) or not inspect.isfunction(value):
            continue
        near = difflib.get_close_matches(name, [*hooks, *LIFECYCLE], n=1, cutoff=0.75)
        if near:
            yield f"{name} is no hook: did you mean {near[0]}?"


def _type_faults(name: str, base: Callable[..., Any], own: Callable[..., Any]) -> Iterator[str]:
    """Parameters that are annotated with another type. Return types are mypy's: they may be narrower."""
    try:
        wanted, given = get_type_hints(base), get_type_hints(own)
    except (NameError, TypeError) as exc:
        yield f"{name}: its annotations cannot be read: {exc}"
        return
    names = [p for p in inspect.signature(base).parameters if p != "self"]
    theirs = [p for p in inspect.signature(own).parameters if p != "self"]
    for ours, other in zip(names, theirs, strict=False):
        if other in given and ours in wanted and not _fits(wanted[ours], given[other]):
            yield f"{name}: {other} is {_named(wanted[ours])}, not {_named(given[other])}"


def _fits(wanted: Any, given: Any) -> bool:
    """Whether a hook that takes `given` can be called with `wanted`."""
    if given in (wanted, Any, object):
        return True
    if isinstance(wanted, type) and isinstance(given, type):
        return issubclass(wanted, given)
    return str(wanted) == str(given) or not isinstance(given, type)


def _named(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _examine_settings(report: Report, cls: type[Plugin], settings: Mapping[str, Any]) -> None:
    fields = cls.Config.model_fields
    missing = [f.alias or n for n, f in fields.items() if f.is_required() and (f.alias or n) not in settings]
    if missing:
        report.failed(
            "settings", f"it needs {', '.join(missing)}: give them in a TOML file with --settings, to run it"
        )
        return
    described = [f"{f.alias or n}{'' if f.is_required() else '?'}" for n, f in fields.items()]
    report.passed("settings", ", ".join(described) or "none")


# ── run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(report: Report, kind: Kind, cls: type[Plugin], settings: Mapping[str, Any]) -> None:
    async def run() -> str:
        async with asyncio.timeout(RUN_SECONDS), edge_with(use(cls, **settings), gateways=2) as edge:
            said: str = await RUNS[kind.name](edge, edge.plugin(cls))
            if faults := edge.faults():
                raise PluginError("; ".join(faults.values()) + ": " + "; ".join(handler.seen))
            return said

    handler = _Logged()
    logger = logging.getLogger("guestpass.edge.plugins")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        report.passed("run", asyncio.run(run()))
    except GuestpassError as exc:
        report.failed("run", exc.message)
    except TimeoutError:
        report.failed("run", f"it did not end within {RUN_SECONDS:g} seconds")
    except AssertionError as exc:
        report.failed("run", str(exc))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


class _Logged(logging.Handler):
    """The last line of each failure's traceback, which says more than an error id."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            exc = record.exc_info[1]
            self.seen.append(f"{type(exc).__name__}: {exc}")


async def _run_authenticator(edge: TestEdge, plugin: Any) -> str:
    if not plugin.interactive:
        page = await (await edge.admitted()).get("/")
        return f"a request with a bearer token was looked at and answered with {page.status}"
    page = await edge.visitor().get("/")
    if page.status >= 500:
        raise AssertionError(f"its sign-in page answered {page.status}: {page.words}")
    if "<form" not in page.text:
        return f"sign-in began, and led to {page.status}"
    names = sorted(set(INPUT.findall(page.text)) - {"csrf"})
    page = await page.submit(**dict.fromkeys(names, "x"))
    if page.status >= 500:
        raise AssertionError(f"it answered nonsense with {page.status}: {page.words}")
    return f"its form has {', '.join(names) or 'no fields'}; nonsense was answered with {page.status}"


async def _run_revoker(edge: TestEdge, plugin: Any) -> str:
    page = await (await edge.admitted()).get("/")
    return f"a session was asked about; its first request was answered with {page.status}"


async def _run_chooser(edge: TestEdge, plugin: Any) -> str:
    used = {(await (await edge.admitted()).get("/")).request["gateway"] for _ in range(4)}
    return f"of two gateways it chose {' and '.join(sorted(used))} for four sessions"


async def _run_filter(edge: TestEdge, plugin: Any) -> str:
    visitor = await edge.admitted()
    found = [(await visitor.request(method, "/a?b")).status for method in ("GET", "POST")]
    return f"GET and POST were answered with {found[0]} and {found[1]}"


async def _run_notifier(edge: TestEdge, plugin: Any) -> str:
    await edge.new_share("somebody@example.org", invite=True)

    def outcomes() -> list[str]:
        return [event.type for event in edge.events if event.type.startswith("mail.")]

    await edge.until(outcomes, "the invitation was delivered or refused")
    return f"an invitation to somebody@example.org ended as {outcomes()[0]}"


async def _run_observer(edge: TestEdge, plugin: Any) -> str:
    await edge.new_share("somebody@example.org")
    await edge.until(lambda: any(e.type == "recipient.added" for e in edge.events), "events were told")
    await asyncio.sleep(0.1)  # its own turn
    return f"{len(edge.events)} events were told"


RUNS: Mapping[str, Callable[[TestEdge, Any], Any]] = {
    "authenticator": _run_authenticator,
    "revoker": _run_revoker,
    "backend-chooser": _run_chooser,
    "request-filter": _run_filter,
    "notifier": _run_notifier,
    "observer": _run_observer,
}
