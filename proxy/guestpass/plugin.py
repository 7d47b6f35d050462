"""The plugin API: everything a plugin author imports.

A plugin is a class of one of six kinds. It is *available* when it is installed (an entry point), *enabled*
only when `edge.toml` names it, and runs in this order:

1. the class is loaded and its `api_version` checked;
2. its section of `edge.toml` is validated by `Config` (a pydantic model; unknown keys are errors);
3. `__init__(name, config)`; 4. `await start(host)`; 5. hooks; 6. `await stop()`.

Hooks that decide (Authenticator, Revoker, RequestFilter) fail closed: an exception, or a hook that overruns
its deadline, denies, with an error id that stands in the log. `asyncio.CancelledError` always passes. A
plugin that fails again and again is not asked for a while, which denies as well.

Hooks run in the edge's event loop, so what waits is awaited. A plugin that cannot (its library blocks) says
`blocking = True` and has plain functions for hooks, each of which runs in a thread. One that may block, crash
or be taken over gets `isolation = "process"` in its section of `edge.toml`, and needs no change.

Contexts are frozen; fields are only ever added. A plugin imports this module, and nothing else of ours.
"""

from __future__ import annotations

import ipaddress
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias, TypeVar

import aiohttp
from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr, ValidationInfo

from guestpass.addresses import canonical as canonical_address
from guestpass.config import Secret as _SecretSource
from guestpass.errors import ConfigError, Invalid, InvalidEmail
from guestpass.hosts import client_network, is_loopback
from guestpass.model import Candidate, Event, Identity, Revocation, Scope, Session, SessionKind, Share
from guestpass.scope import parse_scope

API_VERSION = 1

__all__ = [
    "API_VERSION",
    "Action",
    "Answer",
    "Authenticator",
    "BackendChooser",
    "Candidate",
    "Choice",
    "Client",
    "ConfigPath",
    "Denied",
    "Edits",
    "Event",
    "Field",
    "Form",
    "Host",
    "Identity",
    "Incoming",
    "Invalid",
    "InvalidEmail",
    "Message",
    "NotDelivered",
    "Notifier",
    "Observer",
    "Passkey",
    "Plugin",
    "PluginConfig",
    "Rate",
    "Redirect",
    "Reply",
    "RequestContext",
    "RequestFilter",
    "Revocation",
    "Revoker",
    "Scope",
    "Secret",
    "Session",
    "SessionKind",
    "Share",
    "SignIn",
    "Static",
    "Step",
    "Storage",
    "Unproven",
    "canonical_address",
    "is_loopback",
    "parse_scope",
    "settled",
]


T = TypeVar("T")

Answer: TypeAlias = Awaitable[T] | T
"""What a hook returns: the answer, or a promise of it. So a hook is an `async def` where it waits, and a plain `def`
where it need not."""


async def settled(answer: Answer[T]) -> T:
    """The answer itself, however the hook was written."""
    return await answer if isinstance(answer, Awaitable) else answer


class PluginConfig(BaseModel):
    """Base of a plugin's settings. Frozen; unknown keys are errors that name the nearest known key. Defaults are
    validated as what is written is."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True
    )


def _folder(info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", ".")
    return Path(folder)


def _read_secret(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str | SecretStr):
        return value
    known: Callable[[Any], str | None] | None = (info.context or {}).get("secret")
    if known is not None and (secret := known(value)) is not None:
        return secret
    try:
        return _SecretSource.model_validate(value).read(_folder(info))
    except ConfigError as exc:
        raise ValueError(f"{exc.message}. {exc.hint}".rstrip(". ")) from exc


def _resolve_path(value: Any, info: ValidationInfo) -> Any:
    return _folder(info) / value if isinstance(value, str | Path) else value


Secret = Annotated[SecretStr, BeforeValidator(_read_secret)]
"""A setting that must not be printed: a string, or `{ env = "NAME" }`, or `{ file = "path" }`. Read it with
`.get_secret_value()`."""

ConfigPath = Annotated[Path, BeforeValidator(_resolve_path)]
"""A path that is relative to the folder of edge.toml."""


class Denied(Exception):
    """Raise from a deciding hook to refuse. The text is shown to the visitor."""


class NotDelivered(Exception):
    """A Notifier could not deliver. `permanent`: the address refused it for good; do not retry."""

    def __init__(self, detail: str, *, permanent: bool) -> None:
        super().__init__(detail)
        self.detail = detail
        self.permanent = permanent


class Storage(Protocol):
    """Key-value storage of the plugin's own, durable. Keys ≤ 200 characters, values ≤ 64 KiB of JSON."""

    async def get(self, key: str) -> Any | None:
        """The value; None when there is none or it has expired."""
        ...

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Keep a value, for `ttl` seconds or for good."""
        ...

    async def delete(self, key: str) -> bool:
        """Whether there was something to delete."""
        ...

    async def add(self, key: str, amount: int = 1, *, ttl: float | None = None) -> int:
        """Add atomically to a counter (0 when absent or expired; `ttl` is set when it is created), return the
        sum."""
        ...

    async def take(self, key: str) -> Any | None:
        """Get and delete atomically: of several takers one gets the value."""
        ...


class Host(Protocol):
    """What the edge offers to a plugin. It holds no secret that is not the plugin's."""

    @property
    def logger(self) -> logging.Logger:
        """For what an operator should know. Nothing secret: no code, token, link, path or query."""
        ...

    @property
    def http(self) -> aiohttp.ClientSession:
        """For requests to providers: keeps no cookies, gives up after some seconds."""
        ...

    @property
    def storage(self) -> Storage:
        """What outlasts a restart."""
        ...

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run in the background until it ends or the plugin stops; an exception is logged with the plugin's
        name."""
        ...

    async def notify(self, message: Message) -> None:
        """Queue a message for the Notifiers. Durable on return; delivery is not waited for."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the Observers. Never blocks, never raises."""
        ...

    def derive_key(self, purpose: str) -> bytes:
        """32 secret bytes of this plugin's own for one purpose, the same after a restart, and not in the
        store: for keyed hashes of what has too little entropy to be hashed plainly."""
        ...

    async def resolve_token(self, token: str) -> Identity | None:
        """Who holds this bearer token of ours; None when it is unknown, expired or revoked."""
        ...

    async def live_sessions(self, share_id: str) -> Sequence[Session]:
        """The sessions of a share that have neither ended nor expired, in the order of their creation."""
        ...

    async def record(self, event: Event) -> None:
        """Write to the audit. Durable on return."""
        ...

    async def idle_sessions(self, seconds: float, *, tokens: bool = False) -> Sequence[Session]:
        """Live browser sessions of all shares that had neither a request nor anything open for so long, the longest
        idle first, at most a thousand; with `tokens`, those of bearer tokens as well. Use is known to about two
        minutes."""
        ...

    async def end_session(self, session_id: str, reason: str) -> None:
        """End a session for good. Durable, and its streams have ended, on return."""
        ...

    async def sign_out(self, email: str, reason: str, *, tokens: bool = False) -> int:
        """End all browser sessions of an address, over all shares, and make it prove itself anew; with `tokens`, its
        bearer tokens end as well. Returns how many sessions ended, on disk and on the wire."""
        ...

    async def address_of(self, provider: str, subject: str) -> str | None:
        """Whose address the authenticator `provider` has proven for that subject of its own; None when nobody with it
        has signed in within 90 days."""
        ...

    def route(self, path: str, handler: Callable[[Incoming], Answer[Reply]]) -> str:
        """Have POST requests to `/.guestpass/hooks/NAME/PATH` on the main origin answered by `handler`; returns that
        URL. Anybody may call: check who it is. Bodies are at most 64 KiB; the deadline is ten seconds. Not with
        `isolation = "process"`."""
        ...

    def wait(self, promise: Coroutine[Any, Any, T]) -> T:
        """For hooks of a `blocking` plugin, which run in a thread: what a coroutine of this host returns, as in
        `self.host.wait(self.host.storage.get("key"))`. Raises RuntimeError in the event loop."""
        ...


@dataclass(frozen=True, slots=True)
class Client:
    """Where a request comes from."""

    address: str
    user_agent: str = ""

    @property
    def network(self) -> str:
        """What to count as one client: the address, or the /64 of an IPv6 address, which one home or office has."""
        return client_network(self.address)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request from another system to a plugin (`Host.route`). `path` is what follows the plugin's name."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    client: Client

    def header(self, name: str) -> str | None:
        """The only field of that name (case-insensitive); None when absent or repeated."""
        found = [v for k, v in self.headers if k.lower() == name.lower()]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an `Incoming`."""

    status: int = 204
    body: bytes = b""
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """Something to tell one person. `kind`: "invitation" or "code"."""

    kind: str
    to: str
    subject: str
    text: str
    html: str | None = None
    share_id: str | None = None
    recipient_id: str | None = None
    expires: float | None = None  # not worth delivering after this


class Plugin(ABC):
    """Base of all kinds. Do not subclass directly. Hooks may be plain functions where they need not wait."""

    Config: ClassVar[type[PluginConfig]] = PluginConfig
    api_version: ClassVar[int] = API_VERSION
    kind: ClassVar[str]
    blocking: ClassVar[bool] = False
    """Hooks are plain functions that wait without awaiting: each call runs in a thread of this plugin's own, several at
    once. `start`, `stop` and `watch` stay in the event loop."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        self.name = name
        self.config: Any = config

    async def start(self, host: Host) -> None:
        """Before the first hook. Raise to stop the edge from starting, with a message for the operator."""
        self.host = host

    async def stop(self) -> None:  # noqa: B027 - most plugins have nothing to stop
        """After the last hook."""


# ── Authenticator: who is this visitor? ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Field:
    """One input of a `Form`. `type="code"` is a one-time code: digits on a phone, filled in from messages."""

    name: str
    label: str
    type: str = "text"  # "text", "email", "code", "password"
    autocomplete: str = "off"
    value: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """A second button of a `Form`, posted as `action=name`; fields are not required for it."""

    name: str
    label: str


@dataclass(frozen=True, slots=True)
class Passkey:
    """A passkey (WebAuthn) that a `Form` offers besides its fields, where the browser can. `kind` is "create" or "get";
    `options` are those of `navigator.credentials`, binary values in base64url, and the browser's answer arrives as the
    parameter `credential`, JSON that the plugin verifies. "probe" shows nothing: the parameter `passkeys` is then "1"
    where the browser could make one."""

    kind: str
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Form:
    """Ask the visitor. The edge renders it, adds CSRF protection, and calls `complete` with what was typed.
    `state` (JSON, ≤ 4 KiB) is kept on the server until then and arrives as `SignIn.state`."""

    title: str
    intro: str = ""
    fields: Sequence[Field] = ()
    submit: str = "Continue"
    error: str = ""
    actions: Sequence[Action] = ()
    passkey: Passkey | None = None
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Redirect:
    """Send the visitor to a provider, who returns them to `SignIn.callback_url`: then `complete` is
    called."""

    url: str
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unproven:
    """A provider knows the visitor under this address, but does not prove it. The edge has the visitor prove it, by an
    authenticator that can (`Authenticator.prove`); only then they are signed in, as by the one that answered this."""

    email: str
    subject: str = ""  # the provider's own stable id of the person


Step = Form | Redirect | Identity | Unproven


@dataclass(frozen=True, slots=True)
class SignIn:
    """One attempt of one browser to sign in. `flow_id` is bound to that browser by a cookie. `share` is what
    they want to open; None when they want to see the list of what is shared with them."""

    flow_id: str
    share: Share | None
    client: Client
    state: Mapping[str, Any]
    callback_url: str
    is_invited: Callable[[str], Awaitable[bool]]
    """Whether this address may open the share (or has any, where `share` is None). Never let the visitor see
    the difference, nor feel it: do not wait for it before you answer."""
    link: str = ""
    """Which mailed link it began at; empty when it began elsewhere. Whoever has the link was sent it, or was handed it
    on: what is counted for an address may be counted apart for them, so that strangers cannot use it up."""
    headers: Sequence[tuple[str, str]] = ()
    """Of the request that asked, without the edge's own cookies and tokens. Whoever sent it may have written anything:
    see `peer`."""
    peer: str = ""
    """The address that the connection itself comes from, which is a proxy's where there is one; `client` is who that
    proxy speaks for."""


class Authenticator(Plugin):
    """Who is this visitor? `interactive` ones stand on the sign-in page under `label`; others look at a
    request.

    A Form that `begin` returns is shown by a GET, so `begin` must not change anything that costs somebody
    else.
    """

    kind = "authenticator"
    interactive: ClassVar[bool] = True
    label: str = ""
    needs_proof: bool = False
    """Whether all that it answers is Unproven: then another one has to be there that proves addresses."""
    private_headers: Sequence[str] = ()
    """Fields by which somebody in front of the edge tells this authenticator who a visitor is: they are removed from
    all requests before an application sees them. Set when the plugin is constructed, at the latest."""

    def begin(self, sign_in: SignIn) -> Answer[Step]:
        """The visitor chose this way. Raises Denied."""
        raise Denied("This way of signing in is not interactive.")

    def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Answer[Step]:
        """What the visitor typed, or the parameters of the callback. Raises Denied."""
        raise Denied("This way of signing in is not interactive.")

    def prove(self, sign_in: SignIn, email: str) -> Answer[Step]:
        """Have the visitor prove this very address, which another authenticator left Unproven; then as after `begin`.
        Raises Denied. The first authenticator that has this hook is asked."""
        raise Denied("This way of signing in does not prove a given address.")

    def identify(self, request: RequestContext) -> Answer[Identity | None]:
        """Credentials in the request itself; None to abstain. Raises Denied."""
        return None


# ── Revoker: may this session start, and when must it end? ──────────────────────────────────────────────────


class Revoker(Plugin):
    """May this session start, and when must it end?"""

    kind = "revoker"

    @abstractmethod
    def check(self, share: Share, session: Session) -> Answer[Revocation | None]:
        """Asked when a session starts and when its grant is rebuilt. None: it may go on. Raise Denied to
        refuse for now, with words for the visitor."""

    def watch(self) -> AsyncIterator[Revocation] | None:
        """Revocations as they happen; None when this plugin has none of its own."""
        return None


# ── BackendChooser: which gateway serves this session? ──────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Choice:
    """The question: `candidates` is never empty and holds connected gateways that reach the service; when it is down
    behind all of them, those that offer it (`healthy` is False)."""

    share: Share
    session: Session
    candidates: Sequence[Candidate]


class BackendChooser(Plugin):
    """Which gateway serves this session?"""

    kind = "backend-chooser"

    @abstractmethod
    def choose(self, choice: Choice) -> Answer[Candidate | None]:
        """One of the candidates, or None to let the next chooser answer."""


# ── RequestFilter: may this request pass? ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RequestContext:
    """A request, before it is relayed. `path` is what will be forwarded, undecoded, with the query. `headers` are
    without the edge's own cookies and, but for `Authenticator.identify`, without its tokens."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    client: Client
    share: Share
    session: Session | None
    at: float

    def header(self, name: str) -> str | None:
        """The only field of that name (case-insensitive); None when absent or repeated."""
        found = [v for k, v in self.headers if k.lower() == name.lower()]
        return found[0] if len(found) == 1 else None

    def now(self, zone: tzinfo = UTC) -> datetime:
        """When the request came, on the clock of `zone`."""
        return datetime.fromtimestamp(self.at, zone)


@dataclass(frozen=True, slots=True)
class Edits:
    """Header edits towards the application: names to remove, then fields to add."""

    remove: frozenset[str] = frozenset()
    add: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: `burst` requests at once, `per_second` of them on average. `each`: what has a bucket of its own,
    "session", "recipient" or "share". Requests beyond it get 429."""

    per_second: float
    burst: int
    each: str = "session"


@dataclass(frozen=True, slots=True)
class Static:
    """What holds for every request of a session, so that none has to be asked about: the edge compiles it into the
    session's grant.

    None sets no limit; an empty `scope` or `networks` admits nothing. What is refused gets 403 with `message`.
    """

    edits: Edits | None = None
    """At most five fields are added by all filters together, of 4096 bytes. Framing fields and `X-Guestpass-*` are the
    edge's."""
    scope: Sequence[Scope] | None = None
    """Beside the share's own: a request must match a rule of each."""
    networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] | None = None
    """The client's address must be in one of them."""
    rate: Rate | None = None
    message: str = ""


class RequestFilter(Plugin):
    """May this request pass, and with which header edits? Overrides `compile`, `on_request`, or both."""

    kind = "request-filter"

    def compile(self, share: Share, session: Session) -> Answer[Static | None]:
        """What can be said before there is a request; asked once when a session is admitted, and again when its grant
        is rebuilt (a changed configuration, an hour without use). Costs the requests nothing. Raises Denied to refuse
        the session."""
        return None

    def on_request(self, request: RequestContext) -> Answer[Edits | None]:
        """Asked for each request; None to let it pass. Raises Denied to answer 403. An edge with a filter that
        overrides this serves its requests by the slower lane."""
        return None


# ── Notifier: deliver an invitation or a code ───────────────────────────────────────────────────────────────


class Notifier(Plugin):
    """Deliver an invitation or a code."""

    kind = "notifier"

    def accepts(self, message: Message) -> Answer[bool]:
        """Whether this one delivers to that address; the first that does is asked."""
        return True

    @abstractmethod
    def deliver(self, message: Message) -> Answer[str]:
        """Hand the message over; returns a short receipt for the owner. Raises NotDelivered."""


# ── Observer: tell me what happened ─────────────────────────────────────────────────────────────────────────


class Observer(Plugin):
    """Tell me what happened."""

    kind = "observer"

    @abstractmethod
    def on_event(self, event: Event) -> Answer[None]:
        """Errors are logged and isolated."""
