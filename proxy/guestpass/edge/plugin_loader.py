"""Loading of plugins: exactly the classes that a configuration names, never what is merely installed.

A plugin is named by an entry point, as "package.module:Class", or as "./file.py:Class" beside the configuration. The
class is checked, its section validated and the plugin constructed; whatever is wrong is found here, before anything
listens: a ConfigError or PluginError names the file, the section, the key and the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from guestpass.config import EdgeConfig, PluginSection, first_fault
from guestpass.errors import (
    ConfigError,
    GuestpassError,
    PluginError,
)
from guestpass.plugin import (
    API_VERSION,
    Authenticator,
    BackendChooser,
    Notifier,
    Observer,
    Plugin,
    PluginConfig,
    RequestFilter,
    Revoker,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the six kinds: its section in edge.toml, its base class, its entry-point group."""

    section: str
    base: type[Plugin]
    group: str

    @property
    def name(self) -> str:
        return self.base.kind


KINDS: Mapping[str, Kind] = {
    section: Kind(section, base, f"guestpass.{section}")
    for section, base in (
        ("authenticate", Authenticator),
        ("revoke", Revoker),
        ("choose", BackendChooser),
        ("filter", RequestFilter),
        ("notify", Notifier),
        ("observe", Observer),
    )
}

# The parts of edge.toml that plugins come from.
OF_PLUGINS = (*KINDS, "mail")

# What has no abstract hook needs one of these all the same.
NEEDS_ONE_OF: Mapping[str, tuple[str, ...]] = {"request-filter": ("compile", "on_request")}

# Those that run in a thread where the plugin is `blocking`.
BLOCKING_HOOKS: Mapping[str, tuple[str, ...]] = {
    "authenticator": ("begin", "complete", "prove", "identify"),
    "revoker": ("check",),
    "backend-chooser": ("choose",),
    "request-filter": ("compile", "on_request"),
    "notifier": ("accepts", "deliver"),
    "observer": ("on_event",),
}


@dataclass(frozen=True, slots=True)
class Available:
    """An installed plugin. It runs only when a configuration names it."""

    kind: str
    name: str
    target: str  # "package.module:Class"
    package: str  # the distribution that brings it
    version: str


def load_available() -> list[Available]:
    """What is installed, by kind and name, without importing any of it."""
    found = []
    for kind in KINDS.values():
        for point in entry_points(group=kind.group):
            dist = point.dist
            found.append(
                Available(
                    kind.name,
                    point.name,
                    point.value,
                    dist.name if dist else "",
                    dist.version if dist else "",
                )
            )
    return sorted(found, key=lambda a: (a.kind, a.name))


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────


def load_class(kind: Kind, use: str, folder: Path) -> type[Plugin]:
    """The class that `use` names; relative files are relative to `folder`. Raises PluginError."""
    if use.startswith(("./", "../", "/")):
        found = _from_file(use, folder)
    elif ":" in use:
        found = _from_module(use)
    else:
        found = _from_entry_point(kind, use)
    return check_class(kind, use, found)


def check_class(kind: Kind, use: str, found: object) -> type[Plugin]:
    """Whether `found` can be a plugin of this kind. Raises PluginError that says what is missing."""
    what = f'plugin "{use}"'
    if not isinstance(found, type) or not issubclass(found, Plugin):
        raise PluginError(
            f"{what} is not a plugin class", hint=f"Derive it from guestpass.plugin.{kind.base.__name__}."
        )
    if not issubclass(found, kind.base):
        actual = getattr(found, "kind", "plugin")
        section = next((k.section for k in KINDS.values() if issubclass(found, k.base)), "?")
        raise PluginError(
            f"{what} is of kind {actual}, not {kind.name}",
            hint=f"Move it to the section [[{section}]] of edge.toml.",
        )
    version = getattr(found, "api_version", None)
    if version != API_VERSION:
        raise PluginError(
            f"{what} is written for version {version} of the plugin API, this edge speaks version {API_VERSION}",
            hint="Install versions of both that fit.",
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise PluginError(
            f"{what} lacks {', '.join(missing)}", hint=f"{kind.base.__name__} needs every one of them."
        )
    needed = NEEDS_ONE_OF.get(kind.name, ())
    if needed and not any(getattr(found, hook) is not getattr(kind.base, hook) for hook in needed):
        raise PluginError(f"{what} lacks {' and '.join(needed)}", hint="It needs one of them.")
    if found.blocking:
        for hook in BLOCKING_HOOKS[kind.name]:
            if asyncio.iscoroutinefunction(inspect.unwrap(getattr(found, hook))) and (
                getattr(found, hook) is not getattr(kind.base, hook)
            ):
                raise PluginError(
                    f"{what}: it is blocking, and its {hook} is an async function",
                    hint=f"Write `def {hook}` there, or leave `blocking = True` out.",
                )
    if not isinstance(found.Config, type) or not issubclass(found.Config, PluginConfig):
        raise PluginError(f"{what}: its Config is not a guestpass.plugin.PluginConfig")
    return found


def _from_entry_point(kind: Kind, name: str) -> object:
    points: dict[str, EntryPoint] = {}
    for found in entry_points(group=kind.group):
        first = points.setdefault(found.name, found)
        if found.name == name and found.value != first.value:
            # Else a package that is merely installed could take the place of what the configuration names.
            raise PluginError(
                f'several installed packages bring a {kind.name} "{name}": {first.value}, {found.value}',
                hint='Remove one of them, or write use = "package.module:Class".',
            )
    point = points.get(name)
    if point is None:
        near = difflib.get_close_matches(name, points, n=1, cutoff=0.5)
        known = (
            f'Did you mean "{near[0]}"?'
            if near
            else "Installed: " + (", ".join(sorted(points)) or "none") + "."
        )
        raise PluginError(
            f'there is no {kind.name} "{name}"', hint=f"{known} `guestpass plugin list` shows all."
        )
    try:
        return point.load()
    except (Exception, SystemExit) as exc:
        raise PluginError(f'plugin "{name}" ({point.value}) cannot be imported: {in_one_line(exc)}') from exc


def _from_module(use: str) -> object:
    module_name, _, attribute = use.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:
        raise PluginError(
            f'plugin "{use}": the module {module_name} cannot be imported: {in_one_line(exc)}',
            hint="Is it installed in the environment that runs the edge?",
        ) from exc
    return _attribute(module, attribute, use)


def _from_file(use: str, folder: Path) -> object:
    name, separator, attribute = use.rpartition(":")
    if not separator or not name.endswith(".py"):
        raise PluginError(f'plugin "{use}" is not of the form ./file.py:Class')
    path = (folder / name).resolve()
    check_file(path, use)
    # By its own spec and under a name that cannot shadow an installed module; sys.path stays as it is.
    module_name = f"_guestpass_plugin_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f'plugin "{use}": {path} cannot be imported')
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pydantic look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        sys.modules.pop(module_name, None)
        raise PluginError(f'plugin "{use}": {path} cannot be imported: {in_one_line(exc)}') from exc
    return _attribute(module, attribute, use)


def check_file(path: Path, use: str) -> None:
    """Refuse code that somebody else could have put there. Raises PluginError."""
    for part, is_file in ((path, True), (path.parent, False)):
        try:
            info = part.stat()
        except OSError as exc:
            raise PluginError(
                f'plugin "{use}": {part}: {exc.strerror}', hint="Its path is relative to edge.toml."
            ) from exc
        sticky_folder = not is_file and bool(
            info.st_mode & stat.S_ISVTX
        )  # as /tmp: others cannot replace our files
        if os.name == "posix" and info.st_mode & 0o022 and not sticky_folder:
            raise PluginError(f'plugin "{use}": others may write to {part}', hint=f"Run: chmod go-w {part}")
        if os.name == "posix" and is_file and info.st_uid not in (0, os.geteuid()):
            raise PluginError(
                f'plugin "{use}": {part} belongs to another user', hint="Own the file that you let run."
            )


def _attribute(module: object, attribute: str, use: str) -> object:
    try:
        return getattr(module, attribute)
    except AttributeError as exc:
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Plugin)]
        near = difflib.get_close_matches(attribute, classes, n=1, cutoff=0.5)
        hint = f'Did you mean "{near[0]}"?' if near else ""
        raise PluginError(f'plugin "{use}": there is no {attribute!r} in it', hint=hint) from exc


def in_one_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}" if str(exc) else type(exc).__name__


def _default_name(use: str) -> str:
    return use.rpartition(":")[2]


def section_line(file: Path, section: str, position: int) -> int | None:
    """Where the header of this section stands in edge.toml, counted from 1; TOML itself does not tell. None: it is
    written otherwise, as an inline table, say."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    header = re.compile(rf"\s*\[\[?\s*{re.escape(section)}\s*\]\]?\s*(?:#.*)?")
    found = [number for number, line in enumerate(lines, 1) if header.fullmatch(line)]
    return found[position - 1] if 0 < position <= len(found) else None


def place(kind: Kind, section: PluginSection, position: int, file: Path, line: int | None = None) -> str:
    """How an error names a plugin's section."""
    line = line or section_line(file, kind.section, position)
    return f"{file}{'' if line is None else f':{line}'}: {section.where(kind.section, position)}"


def build(
    kind: Kind,
    section: PluginSection,
    position: int,
    file: Path,
    *,
    secret: Callable[[Any], str | None] | None = None,
    line: int | None = None,
) -> Plugin:
    """Load, validate and construct one plugin. `secret` knows what cannot be read here. Raises ConfigError or
    PluginError that names file, line and section."""
    where = place(kind, section, position, file, line)
    try:
        cls = load_class(kind, section.use, file.parent)
    except PluginError as exc:
        raise PluginError(f"{where}: {exc.message}", hint=exc.hint) from exc
    try:
        config = cls.Config.model_validate(
            section.settings, context={"folder": file.parent, "secret": secret}
        )
    except ValidationError as exc:
        hint = "" if section.stands_for else f"`guestpass plugin show {section.use}` lists its settings."
        raise ConfigError(
            f"{where}: {section.in_its_words(first_fault(exc, cls.Config))}", hint=hint
        ) from exc
    name = section.name or _default_name(section.use)
    try:
        return cls(name, config)
    except GuestpassError:
        raise
    except Exception as exc:
        raise PluginError(f"{where}: it cannot be constructed: {in_one_line(exc)}") from exc
    except BaseException as exc:
        raise PluginError(f"{where}: it raised {type(exc).__name__} when it was constructed") from exc


# ── reloading ───────────────────────────────────────────────────────────────────────────────────────────────


def fingerprint(config: EdgeConfig, parts: Iterable[str] = OF_PLUGINS) -> bytes:
    """Of all that plugins in these parts of edge.toml are made from: their sections, the files that they come from, and
    those of their secrets."""
    digest = hashlib.sha256()
    for name in parts:
        digest.update(repr((name, getattr(config, name))).encode())
    for path in _files(config, parts):
        with contextlib.suppress(OSError, ValueError):  # whoever needs it says what is wrong with it
            digest.update((config.folder / path).read_bytes())
    return digest.digest()


def _files(config: EdgeConfig, parts: Iterable[str]) -> Iterator[str | Path]:
    for section in (section for kind in KINDS if kind in parts for section in getattr(config, kind)):
        source, _, _ = section.use.rpartition(":")
        if source.endswith(".py"):
            yield source
        yield from _secret_files(section.settings)
    password = config.mail.password if config.mail is not None and "mail" in parts else None
    if password is not None and password.file is not None:
        yield password.file


def _secret_files(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if list(value) == ["file"] and isinstance(value["file"], str):
            yield value["file"]
        else:
            for inner in value.values():
                yield from _secret_files(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _secret_files(inner)
