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
from guestpass.hosts import is_address, is_loopback

# A name stands in file names, metrics labels and the OPEN frame: short and plain.
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")

# RFC 1123 labels; what stands in a certificate.
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

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


def _plain_listen(value: str) -> str:
    _url_parts(value, "http://HOST:PORT", schemes=("http",))
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


def _host(value: str) -> str:
    """A host name, or a wildcard for one label below it, in lower case."""
    name = value.lower().removesuffix(".")
    if not HOST.fullmatch(name.removeprefix("*.")) or is_address(name):
        raise ValueError(f"{value!r} is not a host name like share.example.com or *.share.example.com")
    return name


class HostCertificate(Tls):
    """`[[edge.certificate]]`: one more certificate, for the names in it or for `hosts` only."""

    hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = ()


# Each is a process with an event loop of its own; beyond the processors that a machine has they only cost.
MAX_WORKERS = 64


class EdgeSection(_Section):
    """`[edge]`"""

    name: str = "guestpass"  # who the gateways believe to talk to; part of what their proof signs
    listen: tuple[Annotated[str, AfterValidator(_listen)], ...] = ("http://127.0.0.1:8080",)
    # Plain HTTP on any address: answers ACME's challenges, sends everything else to https, and does nothing more.
    redirect_listen: tuple[Annotated[str, AfterValidator(_plain_listen)], ...] = ()
    admin_listen: Annotated[str, AfterValidator(_host_port)] = "127.0.0.1:8081"
    public_url: Annotated[str, AfterValidator(_origin)] = "http://localhost:8080"
    share_domain: Annotated[str, AfterValidator(_share_domain)] = "localhost:8080"
    state: str = "sqlite:///edge.db"
    tls: Tls | None = None
    certificate: tuple[HostCertificate, ...] = ()  # besides `tls`; clients say by name which one they want
    hsts_seconds: int = Field(default=63_072_000, ge=0)  # Strict-Transport-Security; 0: none
    insecure: bool = False  # plain http:// on other than loopback addresses
    trusted_proxies: tuple[Network, ...] = ()
    workers: int = Field(default=1, ge=1, le=MAX_WORKERS)
    fast_lane: bool = True
    drain_seconds: float = Field(default=30, ge=0, le=3600)
    # Where gateways may go while this edge is drained, besides the edges that they know themselves.
    other_edges: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    access_log: str = (
        ""  # a file, or "-" for standard output: a line of JSON for each request on a share's origin
    )
    access_log_paths: bool = False  # with its path, which may tell what the application would rather not
    api_key: Secret | None = None  # absent: made at the first start, in `api.key` beside the state
    # A key signs assertions for so long; 0: until `guestpass keys rotate`. A day is more than a rotation takes.
    assertion_key_days: float = Field(default=90, ge=0, le=3650)
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
            if parts.scheme == "http" and not self.insecure and not is_loopback(parts.hostname or ""):
                raise ValueError(
                    f"listen: {url} is plain HTTP on an address that is not loopback: "
                    "use https, or set insecure = true"
                )
        if 0 < self.assertion_key_days < 1:
            raise ValueError("assertion_key_days: a key signs for at least 1 day; 0 switches rotation off")
        if not self.state.startswith("sqlite:///"):
            raise ValueError("state: this version stores in SQLite only: sqlite:///PATH")
        return self


# A limit in seconds: less than one is not kept exactly (the edge looks once a second), a day is as good as never.
LimitSeconds = Annotated[float, Field(ge=1, le=86_400)]
LimitCount = Annotated[int, Field(ge=1, le=1_000_000)]


class Limits(_Section):
    """`[limits]`: what visitors may take of the edge in time and size, on both lanes. Each worker counts for itself."""

    # For a request head, from its first byte; for the first one from the connection. A phone on a bad link needs some.
    head_seconds: LimitSeconds = 30
    # What fits a tunnel (frames.pxd); nginx takes 4 × 8 KiB, Node 16 KiB.
    head_bytes: Annotated[int, Field(ge=1024, le=32_768)] = 32_768
    # Between two pieces of a request's body while the edge is ready to take them: nginx's client_body_timeout.
    body_progress_seconds: LimitSeconds = 60
    # Of one request's body; 0: of any size. What an upload takes here is bounded however long it is; whether the
    # application has room for it, the operator knows.
    body_bytes: Annotated[int, Field(ge=0, le=1 << 62)] = 0
    # From the last piece of a request to the head of its answer. Long polling answers within a minute or two; reports
    # that are computed on request take longer.
    answer_seconds: LimitSeconds = 300
    # While an answer waits for its visitor, some of it must be acknowledged within: nginx's send_timeout.
    write_progress_seconds: LimitSeconds = 60
    # Between requests of a connection: nginx's keepalive_timeout.
    idle_seconds: LimitSeconds = 75
    # Without a byte in either direction after 101. Applications that ping do so within a minute; the others get the
    # hour that is usual for tunnels in HAProxy.
    upgrade_idle_seconds: LimitSeconds = 3600
    # Open connections of one address (one /64 of IPv6); behind `trusted_proxies`, requests under way of one forwarded
    # address. A browser has 6 for each share: an office of 150 behind one address. Held heads of all: 32 MiB.
    connections_per_client: LimitCount = 1024
    # Requests under way of one session. A browser has 6 and its WebSockets, a script's pool seldom more than 100.
    streams_per_session: LimitCount = 1024
    # Requests under way of one share, WebSockets included: as many as one tunnel carries.
    streams_per_share: LimitCount = 16_384


class Mail(_Section):
    """`[mail]`: absent means the outbox folder."""

    smtp: str  # smtp[s]://[user:password@]host[:port][?tls=starttls|none|tls]
    sender: str = Field(alias="from")
    password: Secret | None = None  # instead of one in the URL


class AcmeSection(_Section):
    """`[acme]`: absent means certificates from files only."""

    hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = Field(min_length=1)
    directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    email: str = ""
    challenge: Literal["http-01", "dns-01"] = "http-01"
    hook: tuple[str, ...] = ()  # for dns-01: a command and its arguments
    hook_seconds: float = Field(default=120, gt=0, le=3600)
    dns_seconds: float = Field(default=0, ge=0, le=3600)  # from the hook's end until the server may look
    storage: Path | None = None  # absent: `acme` beside the database
    ca: Path | None = None  # trust only this CA for `directory`

    @model_validator(mode="after")
    def _consistent(self) -> AcmeSection:
        wildcard = next((host for host in self.hosts if host.startswith("*.")), None)
        if self.challenge == "http-01" and wildcard is not None:
            raise ValueError(f'hosts: {wildcard} can be proven by challenge = "dns-01" only')
        if self.challenge == "dns-01" and not self.hook:
            raise ValueError('hook: challenge = "dns-01" needs a command that adds and removes TXT records')
        parts = urlsplit(self.directory)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError(f"directory: {self.directory!r} is not of the form https://…")
        return self


class Isolation(_Section):
    """`isolation` of a plugin's section: a process of its own, and what that may use. `"process"` is all defaults."""

    process: Literal[True] = True
    memory_mb: int = Field(default=512, ge=128, le=65536)  # address space; an idle one uses 60 MB of it
    files: int = Field(default=64, ge=16, le=65536)  # open at the same time, sockets among them
    cpu_seconds: int | None = Field(default=None, ge=1)  # in all; then it is killed, and started again


def _isolation(value: Any) -> Any:
    if isinstance(value, str):
        if value != "process":
            raise ValueError(f'isolation: {value!r} is unknown; the one value is "process"')
        return Isolation()
    return value


class PluginSection(BaseModel):
    """One `[[authenticate]]`, `[[revoke]]`, `[choose]`, `[[filter]]`, `[[notify]]`, `[[observe]]`.

    What stands beside `use`, `name` and `isolation` is the plugin's own and validated by its `Config`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str
    name: str = ""
    isolation: Annotated[Isolation | None, BeforeValidator(_isolation)] = None
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

    @property
    def stands_for(self) -> str:
        """The section that the operator wrote instead; "" when it is this one."""
        return self._stands_for

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
    limits: Limits = Limits()
    mail: Mail | None = None
    acme: AcmeSection | None = None
    authenticate: PluginSections = (PluginSection(use="email-code"), PluginSection(use="bearer-token"))
    revoke: PluginSections = (PluginSection(use="share-state"),)
    choose: PluginSections = (PluginSection(use="random"),)
    filter: PluginSections = ()
    notify: PluginSections = ()
    observe: PluginSections = (PluginSection(use="audit-log"),)
    file: Path = Field(default=Path("edge.toml"), exclude=True)

    @model_validator(mode="after")
    def _consistent(self) -> EdgeConfig:
        edge = self.edge
        for url in edge.listen:
            if url.startswith("https:") and edge.tls is None and not edge.certificate and self.acme is None:
                raise ValueError(f'{url} needs tls = {{ cert = …, key = … }}, or [acme] (key "edge.listen")')
        plain = edge.redirect_listen or any(url.startswith("http:") for url in edge.listen)
        if self.acme is not None and self.acme.challenge == "http-01" and not plain:
            raise ValueError(
                'challenge = "http-01" is answered on port 80: set redirect_listen = ["http://0.0.0.0:80"] '
                '(key "edge.redirect_listen")'
            )
        named = [host for section in edge.certificate for host in section.hosts]
        named += self.acme.hosts if self.acme is not None else ()
        twice = next((host for at, host in enumerate(named) if host in named[:at]), None)
        if twice is not None:
            raise ValueError(f'{twice} has two certificates (keys "edge.certificate.hosts" and "acme.hosts")')
        return self

    @property
    def folder(self) -> Path:
        return self.file.parent

    def resolve(self, path: Path) -> Path:
        """A path of this file, relative to it."""
        return self.folder / path

    @property
    def acme_storage(self) -> Path:
        """Where certificates by ACME are kept."""
        named = self.acme.storage if self.acme is not None else None
        return self.resolve(named) if named is not None else self.database.parent / "acme"

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
        if near:
            return _unknown([*where[:-1], near], model)
        wanted = model.model_fields.get(str(where[0])) if len(where) == 1 else None
        if (
            wanted is not None
            and isinstance(wanted.annotation, type)
            and issubclass(wanted.annotation, _Section)
        ):
            return f"the section [{where[0]}] is missing"
        return f'the key "{_dotted(where)}" is missing'
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
