"""Settings of the edge and the gateway, read from TOML.

`load_edge(path)` and `load_gateway(path)` return frozen models or raise `ConfigError` with one line that
names the file, the key and, for an unknown key, the nearest known one. Secrets are `{ env = "NAME" }` or
`{ file = "path" }`; relative paths are relative to the folder of the file that holds them.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from guestpass.errors import ConfigError
from guestpass.hosts import is_loopback

# A name stands in file names, metrics labels and the OPEN frame: short and plain.
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")

DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a name: use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "beginning and ending with a letter or digit"
        )
    return value


Name = Annotated[str, AfterValidator(_name)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Secret(_Section):
    """`{ env = "NAME" }` or `{ file = "path" }`, so that no secret stands in the configuration or in `ps`."""

    env: str | None = None
    file: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError('a secret is either { env = "NAME" } or { file = "path" }')
        return self

    def of(self, file: Path, key: str) -> str:
        """`read` for a key of `file`, which the error names. Raises ConfigError."""
        try:
            return self.read(file.parent)
        except ConfigError as exc:
            raise ConfigError(f'{file}: {exc.message} (key "{key}")', hint=exc.hint) from exc

    def read(self, base: Path) -> str:
        """The secret's text, stripped. Raises ConfigError."""
        if self.env is not None:
            value = os.environ.get(self.env, "")
            if not value:
                raise ConfigError(
                    f"the environment variable {self.env} is not set", hint=f"Set {self.env} and start again."
                )
            return value.strip()
        assert self.file is not None  # the validator saw to it
        path = base / self.file
        try:
            value = path.read_text("utf-8").strip()
        except OSError as exc:
            raise ConfigError(
                f"cannot read the secret file {path}: {exc.strerror}", hint="Check its path and rights."
            ) from exc
        except UnicodeDecodeError as exc:
            raise ConfigError(f"the secret file {path} is not text in UTF-8") from exc
        if not value:
            raise ConfigError(f"the secret file {path} is empty")
        return value


def _url_parts(value: str, form: str, *, schemes: tuple[str, ...] = ("http", "https")) -> SplitResult:
    """A URL of nothing but scheme, host and port. Raises ValueError that shows the wanted form."""
    wrong = f"{value!r} is not of the form {form}"
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as exc:
        raise ValueError(f"{wrong}: {exc}") from exc
    surplus = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme not in schemes or not parts.hostname or surplus or any(c.isspace() for c in value):
        raise ValueError(wrong)
    return parts


def _listen(value: str) -> str:
    _url_parts(value, "http://HOST:PORT or https://HOST:PORT")
    return value


def _host_port(value: str) -> str:
    if _url_parts("//" + value, "HOST:PORT", schemes=("",)).port is None:
        raise ValueError(f"{value!r} is not of the form HOST:PORT")
    return value


def _origin(value: str) -> str:
    _url_parts(value, "https://HOST[:PORT]")
    return value.rstrip("/").lower()


def _share_domain(value: str) -> str:
    if value.startswith("*"):
        raise ValueError(f"{value!r}: write it without the '*', every share gets a name below it")
    _url_parts("//" + value, "DOMAIN or DOMAIN:PORT", schemes=("",))
    return value.rstrip("/").lower()


def _network(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(value)


Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, BeforeValidator(_network)]


class Tls(_Section):
    """Certificate chain and key, PEM files."""

    cert: Path
    key: Path


# Each is a process with an event loop of its own; beyond the processors that a machine has they only cost.
MAX_WORKERS = 64


class EdgeSection(_Section):
    """`[edge]`"""

    name: str = "guestpass"  # who the gateways believe to talk to; part of what their proof signs
    listen: tuple[Annotated[str, AfterValidator(_listen)], ...] = ("http://127.0.0.1:8080",)
    admin_listen: Annotated[str, AfterValidator(_host_port)] = "127.0.0.1:8081"
    public_url: Annotated[str, AfterValidator(_origin)] = "http://localhost:8080"
    share_domain: Annotated[str, AfterValidator(_share_domain)] = "localhost:8080"
    state: str = "sqlite:///edge.db"
    tls: Tls | None = None
    insecure: bool = False  # plain http:// on other than loopback addresses
    trusted_proxies: tuple[Network, ...] = ()
    workers: int = Field(default=1, ge=1, le=MAX_WORKERS)
    fast_lane: bool = True
    drain_seconds: float = Field(default=30, ge=0, le=3600)
    # Where gateways may go while this edge is drained, besides the edges that they know themselves.
    other_edges: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    api_key: Secret | None = None  # absent: made at the first start, in `api.key` beside the state
    owner: str = "The owner of this Guestpass"  # who shares, on the link page, unless a share says otherwise
    outbox: Path = Path("outbox")  # where mail is written when there is no [mail]
    memory_budget: int = Field(default=512 << 20, ge=16 << 20)  # bytes of receive windows of all tunnels
    # Hex SHA-256 of the certificate that gateways see, where another proxy ends TLS.
    tunnel_certificate_hash: str | None = None
    tunnel_binding: bool = True  # false: gateways' proofs are not bound to the TLS certificate

    @model_validator(mode="after")
    def _consistent(self) -> EdgeSection:
        for url in self.listen:
            parts = urlsplit(url)
            if parts.scheme == "https" and self.tls is None:
                raise ValueError(f"listen: {url} needs tls = {{ cert = …, key = … }}")
            if parts.scheme == "http" and not self.insecure and not is_loopback(parts.hostname or ""):
                raise ValueError(
                    f"listen: {url} is plain HTTP on an address that is not loopback: "
                    "use https, or set insecure = true"
                )
        if not self.state.startswith("sqlite:///"):
            raise ValueError("state: this version stores in SQLite only: sqlite:///PATH")
        return self


class Mail(_Section):
    """`[mail]`: absent means the outbox folder."""

    smtp: str  # smtp[s]://[user:password@]host[:port][?tls=starttls|none|tls]
    sender: str = Field(alias="from")
    password: Secret | None = None  # instead of one in the URL


class PluginSection(BaseModel):
    """One `[[authenticate]]`, `[[revoke]]`, `[choose]`, `[[filter]]`, `[[notify]]`, `[[observe]]`.

    What stands beside `use` and `name` is the plugin's own and validated by its `Config`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str
    name: str = ""
    # Where it stands for a section of another name: that name, and how the settings are called there.
    _stands_for: str = PrivateAttr("")
    _keys: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def standing_for(cls, name: str, keys: Mapping[str, str], use: str, **settings: Any) -> PluginSection:
        """One that was made from the section `name`: errors name what the operator wrote."""
        section = cls(use=use, **settings)
        section._stands_for, section._keys = name, keys
        return section

    def where(self, kind: str, position: int) -> str:
        """How an error names it."""
        return self._stands_for or f'[[{kind}]] number {position} (use = "{self.use}")'

    def in_its_words(self, fault: str) -> str:
        for ours, theirs in self._keys.items():
            fault = fault.replace(f'(key "{ours}")', f'(key "{theirs}")')
        return fault

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


PluginSections = Annotated[tuple[PluginSection, ...], BeforeValidator(_as_list)]


class EdgeConfig(_Section):
    """The whole edge.toml. `file` and `folder` say where it came from."""

    edge: EdgeSection = EdgeSection()
    mail: Mail | None = None
    authenticate: PluginSections = (PluginSection(use="email-code"), PluginSection(use="bearer-token"))
    revoke: PluginSections = (PluginSection(use="share-state"),)
    choose: PluginSections = (PluginSection(use="random"),)
    filter: PluginSections = ()
    notify: PluginSections = ()
    observe: PluginSections = (PluginSection(use="audit-log"),)
    file: Path = Field(default=Path("edge.toml"), exclude=True)

    @property
    def folder(self) -> Path:
        return self.file.parent

    def resolve(self, path: Path) -> Path:
        """A path of this file, relative to it."""
        return self.folder / path

    @property
    def database(self) -> Path:
        return self.folder / self.edge.state.removeprefix("sqlite:///")


class GatewaySection(_Section):
    """`[gateway]`"""

    name: Name
    site: Name
    edges: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(min_length=1)
    ca: Path | None = None
    key: Path = Path("gateway.key")
    tunnels: int = Field(default=2, ge=1, le=16)
    http_proxy: str | None = None
    weight: int = Field(default=1, ge=0, le=1000)
    labels: dict[str, str] = {}
    drain_seconds: float = Field(default=30, ge=0, le=3600)
    insecure: bool = False  # plain http:// edges on other than loopback addresses
    edge_name: str | None = None  # refuse an edge that calls itself otherwise (`name` in its edge.toml)

    @model_validator(mode="after")
    def _consistent(self) -> GatewaySection:
        for url in self.edges:
            parts = urlsplit(url)
            if parts.scheme == "http" and not self.insecure and not is_loopback(parts.hostname or ""):
                raise ValueError(
                    f"edges: {url} is plain HTTP on an address that is not loopback: "
                    "use https, or set insecure = true"
                )
        return self


def _service_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme in ("http", "https"):
        _url_parts(value, "http://HOST:PORT (a share's path is chosen by the share)")
    elif parts.scheme == "unix":
        if not parts.path.startswith("/"):
            raise ValueError(f"{value!r} is not of the form unix:///path/to/socket")
    else:
        raise ValueError(f"{value!r}: a service is http://…, https://… or unix:///…")
    return value.rstrip("/")


class Service(_Section):
    """`[services.NAME]`: what this gateway may reach, whatever the edge asks."""

    url: Annotated[str, AfterValidator(_service_url)]
    paths: tuple[str, ...] = ("/**",)
    methods: tuple[str, ...] = ("*",)
    host_header: str = "upstream"  # or "public", or a fixed name
    ca: Path | None = None  # for https: trust only this CA
    verify: bool = True  # for https


class GatewayConfig(_Section):
    """The whole gateway.toml."""

    gateway: GatewaySection
    services: dict[Name, Service] = {}
    file: Path = Field(default=Path("gateway.toml"), exclude=True)

    @property
    def folder(self) -> Path:
        return self.file.parent

    def resolve(self, path: Path) -> Path:
        return self.folder / path


Model = TypeVar("Model", bound=BaseModel)


def load_edge(path: Path) -> EdgeConfig:
    """Raises ConfigError."""
    return parse(EdgeConfig, read_toml(path), path)


def load_gateway(path: Path) -> GatewayConfig:
    """Raises ConfigError."""
    return parse(GatewayConfig, read_toml(path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError that names the file and, for a syntax error, the line."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: there is no such file", hint="Give its path with --config.") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc


def parse(model: type[Model], data: Mapping[str, Any], path: Path) -> Model:
    """Validate `data`, which came from `path`. Raises ConfigError with the first fault."""
    if "file" in data and "file" in model.model_fields:  # ours: where the settings came from
        raise ConfigError(f"{path}: {_unknown(['file'], model)}")
    try:
        return model.model_validate({**data, "file": path} if "file" in model.model_fields else dict(data))
    except ValidationError as exc:
        raise ConfigError(f"{path}: {first_fault(exc, model)}") from exc


def first_fault(exc: ValidationError, model: type[BaseModel]) -> str:
    """One line for the fault that a person should mend first: the key, what is wrong, the nearest known key.

    An unknown key goes first: a mistyped key is usually missing under its right name as well.
    """
    faults = exc.errors(include_url=False)
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    # Of the steps that are not keys (validators, members of a union) pydantic writes brackets into the name.
    where = [part for part in fault["loc"] if isinstance(part, int) or "[" not in part]
    if fault["type"] == "extra_forbidden":
        return _unknown(where, model)
    if fault["type"] == "missing":
        # Sections with keys of a plugin's own take any key, so the mistyped one is not a fault by itself.
        given = [key for key in fault["input"] if key not in known_keys(model, where[:-1])]
        near = nearest(str(where[-1]), given)
        return _unknown([*where[:-1], near], model) if near else f'the key "{_dotted(where)}" is missing'
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    # A fault of a whole section may begin with the key that it is about.
    key, colon, rest = message.partition(": ")
    if colon and key in known_keys(model, where):
        where, message = [*where, key], rest
    return f'{message} (key "{_dotted(where)}")' if where else message


def _unknown(where: list[int | str], model: type[BaseModel]) -> str:
    key = str(where[-1])
    known = known_keys(model, where[:-1])
    near = nearest(key, known)
    if near:
        advice = f'did you mean "{near}"?'
    elif len(where) == 1 and (sections := [s for s in known if key in known_keys(model, [s])]):
        advice = f"it belongs under [{sections[0]}]"
    else:
        advice = "known keys: " + ", ".join(sorted(known))
    return f'unknown key "{_dotted(where)}"; {advice}'


def _dotted(where: list[int | str]) -> str:
    return ".".join(str(part) for part in where)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What was probably meant: a close spelling, or a name that contains it (`host` and `host_header`)."""
    known = list(known)
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    # Shorter than three letters, a name is contained in too many others to tell anything.
    parts = [k for k in known if min(len(plain), len(k)) >= 3 and (k in plain or plain in k)]
    if parts:
        return min(parts, key=lambda k: (not (k.startswith(plain) or plain.startswith(k)), len(k)))
    far = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    return far[0] if far else None


def known_keys(model: type[BaseModel], where: Sequence[int | str]) -> list[str]:
    """The keys of the section at `where`, as they are written in the file; none where any key may stand."""
    current: Any = model
    for part in where:
        if isinstance(current, type) and issubclass(current, BaseModel):
            fields = current.model_fields.items()
            found = next((f for name, f in fields if part in (name, f.alias)), None)
            current = found.annotation if found is not None else None
        else:  # an item of a list or a table whose names are free
            current = _model_in(current)
    current = _model_in(current)
    return [f.alias or n for n, f in current.model_fields.items() if not f.exclude] if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)


def duration(text: str) -> float:
    """Seconds of `90s`, `15m`, `12h`, `7d`. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration: use 90s, 15m, 12h or 7d")
    return int(match[1]) * DURATION_UNITS[match[2]]


LogLevel = Literal["debug", "info", "warning", "error"]
