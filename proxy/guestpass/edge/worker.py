"""A worker's place in an edge of several: what it asks the supervisor, and what it is told.

A worker is a whole edge but for what there can be only one of: the store, the bus, the courier, notifiers and
observers, which are the supervisor's (`guestpass.edge.supervisor`). `Seat` stands for these. The rest of the edge does
not know the difference: the service has the same methods, events are emitted and subscribed to in the same way.

**Fail closed.** The supervisor renews a lease every half second. A worker whose lease has lapsed has heard of no
revocation for as long: it ends every stream and drops every grant, and without the supervisor no grant can be made. The
lease is in seconds of CLOCK_BOOTTIME, which goes on while a process is stopped or the machine sleeps, and it is looked
at before anything is relayed (see `Lane.check`), so a worker that was frozen serves nothing of what it had. One whose
supervisor is gone ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from guestpass.edge.channel import Channel, ChannelClosed
from guestpass.edge.console import OWNERS, Owner
from guestpass.edge.events import EventHub
from guestpass.edge.peers import Held, Holder, Neighbours
from guestpass.errors import GuestpassError
from guestpass.model import Event, Revocation, Revoked, Session, Share
from guestpass.plugin import Message
from guestpass.shares.proofs import Proofs
from guestpass.shares.service import PROOFS, ShareService
from guestpass.shares.storage import PluginStorage
from guestpass_speedups.session import Budget

if TYPE_CHECKING:
    from guestpass.config import EdgeConfig
    from guestpass.edge.acme import Acme
    from guestpass.edge.grants import GrantTable
    from guestpass.edge.metrics import Family, Metrics
    from guestpass.edge.tunnels import Tunnels
    from guestpass_speedups.relay import Lane

log = logging.getLogger("guestpass.edge.worker")

# A lease holds so long from the moment at which the supervisor sends it. With what a stopped machine needs to notice,
# a worker that hears nothing has stopped serving within 3 s.
LEASE_SECONDS = 2.5
# How often it is renewed. Four may be late.
BEAT_SECONDS = 0.5
# How often a worker that nothing wakes looks at its lease.
LOOK_SECONDS = 0.25

# Keys of [edge] that hold for all workers as they were when the supervisor was started: its sockets, its store and its
# links are made of them. What else a worker needs it reads itself.
AS_STARTED = ("listen", "redirect_listen", "public_url", "share_domain", "state", "workers")

# Methods of ShareService that a worker may call: all that return something awaitable.
SERVICE_METHODS = (
    ("create", "get", "update", "delete", "remove_recipient", "resend", "new_link", "resolve_link")
    + ("shared_with", "list", "open_session", "create_token", "find_session", "get_session", "sessions")
    + ("list_sessions", "end_session", "create_join_token", "enroll", "remove_gateway", "find_gateway")
    + ("list_gateways", "record", "audit", "create_flow", "get_flow", "update_flow", "end_flow")
    + ("create_handover", "take_handover", "sweep", "end_signed_in_by", "idle_sessions", "sign_out")
)
STORAGE_METHODS = ("get", "set", "delete", "add", "take")


class RemoteService(ShareService):
    """`ShareService`, carried out by the supervisor."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self.proofs = Proofs(self.storage(PROOFS), time.time)

    def touch(self, session_id: str, at: float) -> None:
        """Told at once: of a session that begins, other workers' checks of how many there are must know."""
        self._seat.channel.tell("touched", {session_id: at})

    def seen(self, site: str, name: str, at: float | None = None) -> None:
        self._seat.channel.tell("seen", site, name, at)

    def storage(self, plugin: str) -> PluginStorage:
        return RemoteStorage(self._seat, plugin)

    async def close(self) -> None:
        """The service is the supervisor's."""


class RemoteStorage(PluginStorage):
    """`PluginStorage`, carried out by the supervisor."""

    def __init__(self, seat: Seat, plugin: str) -> None:
        self._seat = seat
        self._plugin = plugin


def _asked_for(name: str) -> Callable[..., Awaitable[Any]]:
    async def ask(self: RemoteService, *args: Any, **more: Any) -> Any:
        return await self._seat.ask(f"service.{name}", *args, **more)

    ask.__name__ = name
    return ask


def _kept(name: str) -> Callable[..., Awaitable[Any]]:
    async def ask(self: RemoteStorage, *args: Any, **more: Any) -> Any:
        return await self._seat.ask(f"storage.{name}", self._plugin, *args, **more)

    ask.__name__ = name
    return ask


for _name in SERVICE_METHODS:
    setattr(RemoteService, _name, _asked_for(_name))
for _name in STORAGE_METHODS:
    setattr(RemoteStorage, _name, _kept(_name))


class RemoteEvents(EventHub):
    """Events go to the supervisor, and come back from it with everybody else's."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, event: Event) -> None:
        self._tell(event)

    def deliver(self, event: Event) -> None:
        super().emit(event)


class LiveEverywhere:
    """What is open, on all workers. As it was when `take` was called last: before each page for an owner."""

    def __init__(self) -> None:
        self._shares: Mapping[str, Mapping[str, int]] = {}
        self._sessions: dict[str, int] = {}

    def take(self, shares: Mapping[str, Mapping[str, int]]) -> None:
        self._shares = shares
        self._sessions = {session: streams for found in shares.values() for session, streams in found.items()}

    def sessions(self, share_id: str) -> int:
        return len(self._shares.get(share_id, ()))

    def streams(self, share_id: str) -> int:
        return sum(self._shares.get(share_id, {}).values())

    def session_streams(self, session_id: str) -> int:
        return self._sessions.get(session_id, 0)


class Parts(Protocol):
    """Of the edge, what the supervisor's words are for."""

    grants: GrantTable
    tunnels: Tunnels
    metrics: Metrics
    acme: Acme | None

    @property
    def lane(self) -> Lane: ...
    def revoke(self, revocation: Revocation) -> Revoked: ...
    def reload(self) -> asyncio.Task[None]: ...
    def ways(self) -> list[str]: ...
    async def faults(self) -> dict[str, str]: ...
    async def drain(self, *, replaced: bool = False) -> None: ...


class Seat:
    """See the module. `connect`, `configure`, then the edge starts and calls `settle`, then `serve`."""

    def __init__(self, sockets: Sequence[socket.socket], path: str) -> None:
        """`sockets` listen for visitors, in the order of `edge.listen` and `edge.redirect_listen`; at `path` other
        workers are waited for."""
        self.sockets = sockets
        self._path = path
        self._loop = asyncio.get_running_loop()
        self.budget = Budget()
        self.neighbours = Neighbours(budget=self.budget, guard=self.guard)
        self.service = RemoteService(self)
        self.events = RemoteEvents(self._tell_event)
        self.channel = Channel(self._handlers(), who="the supervisor")
        self.channel.refusal = self._unheard
        self.channel.closed.add_done_callback(lambda done: self._told_to_leave("abandoned"))
        self.live = LiveEverywhere()
        self._touched: dict[str, float] = {}  # when sessions were used last
        self._parts: Parts | None = None
        self._server: asyncio.AbstractServer | None = None
        self._holders: set[Holder] = set()
        self._told: dict[tuple[str, str], Held] = {}
        self._telling = False
        self._withdrawn = False
        self._lease = 0.0
        self._lapsed = False
        self._serving = False
        self._begun: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._look_timer: asyncio.TimerHandle | None = None
        self._leave: asyncio.Future[str] = self._loop.create_future()

    async def connect(self, sock: socket.socket) -> None:
        """Returns when the supervisor has said what holds for all. Raises ChannelClosed."""
        await self.channel.join(sock)
        await asyncio.wait((self._begun, self.channel.closed), return_when=asyncio.FIRST_COMPLETED)
        if not self._begun.done():
            raise ChannelClosed("the supervisor is gone")

    def as_started(self, config: EdgeConfig) -> EdgeConfig:
        """The configuration, but for what holds as it was when the supervisor was started."""
        begun = self._begun.result()
        changed = [f"edge.{key}" for key in AS_STARTED if getattr(config.edge, key) != begun[key]]
        if changed:
            log.warning("a restart, not of workers only, is needed for changes of: %s", ", ".join(changed))
        return config.model_copy(update={"edge": config.edge.model_copy(update=dict(begun))})

    def configure(self, *, memory_budget: int, share_origin: Callable[[str], str]) -> None:
        """What the configuration says, before the edge starts."""
        self.budget.limit = memory_budget
        self.service.share_origin = share_origin

    def settle(self, parts: Parts) -> None:
        """The edge's parts are there; nothing is served yet."""
        self._parts = parts
        parts.lane.lapsed = self.lapse
        parts.tunnels.on_change.add(self._tunnels_changed)

    def admits(self, drain_seconds: float) -> None:
        """Visitors are accepted from now on: revocations wait for this worker, and its end so long for visitors."""
        self.channel.tell("admits", drain_seconds)

    async def serve(self) -> None:
        """Until the supervisor sends this worker away, or is gone."""
        assert self._parts is not None
        self._server = await self._loop.create_unix_server(self._holder, self._path)
        self._serving = True
        self._parts.lane.lease = self._lease
        self._look()
        self._tell_ways()
        self.channel.tell("ready")
        self._started.set_result(None)
        how = await self._leave
        if how == "abandoned":
            log.error("the supervisor is gone: this worker ends")
            self._parts.grants.end_all("supervisor_gone")
            with contextlib.suppress(OSError):  # others' sockets are in the folder, until the last has ended
                os.unlink(self._path)
                os.rmdir(os.path.dirname(self._path))
        elif how != "stop":
            drained = asyncio.ensure_future(self._parts.drain(replaced=how == "replaced"))
            await asyncio.wait((drained, self.channel.closed), return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
            await asyncio.gather(drained, return_exceptions=True)
        self._close()
        if how != "abandoned":
            self._tell_touched()
            self.channel.tell("last", self._parts.metrics.families())

    def _close(self) -> None:
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._server is not None:
            self._server.close()
        self.neighbours.close()
        for holder in list(self._holders):
            holder.finish()

    async def failed(self, exc: GuestpassError) -> None:
        """The start failed."""
        with contextlib.suppress(ChannelClosed):
            await self.channel.call("failed", exc)

    # ── what the edge asks ───────────────────────────────────────────────────────────────────────────────────────

    async def ask(self, name: str, /, *args: Any, **more: Any) -> Any:
        self._tell_touched()
        return await self.channel.call(name, *args, **more)

    async def enqueue(self, message: Message) -> None:
        """As `Courier.enqueue`."""
        await self.ask("enqueue", message)

    async def publish(self, revocation: Revocation) -> Revoked:
        """As `Bus.publish`."""
        revoked: Revoked = await self.ask("publish", revocation)
        return revoked

    async def agree(self, session_id: str, names: Sequence[str], chosen: str | None) -> str | None:
        """The session's gateway: see `admission.Agree`."""
        agreed: str | None = await self.ask("agree", session_id, list(names), chosen)
        return agreed

    async def look_around(self) -> None:
        """Before an answer for an owner: what is open everywhere."""
        self.live.take(await self.ask("live"))

    @contextlib.asynccontextmanager
    async def for_owner(self) -> AsyncIterator[None]:
        """Around a page of the console: what is open everywhere, and who is signed in."""
        await self.look_around()
        owners: dict[bytes, Owner] = await self.ask("owners")
        before = {key: _state(owner) for key, owner in owners.items()}
        token = OWNERS.set(owners)
        try:
            yield
        finally:
            after = OWNERS.get() or {}
            OWNERS.reset(token)
            new = {key: owner for key, owner in after.items() if key not in before}
            changed = {
                key: owner for key, owner in after.items() if key in before and before[key] != _state(owner)
            }
            gone = [key for key in before if key not in after]
            if new or changed or gone:
                await self.ask("keep_owners", new, changed, gone)

    # ── the lease ────────────────────────────────────────────────────────────────────────────────────────────────

    def guard(self) -> None:
        """Called before anything is relayed."""
        if self._parts is not None:
            self._parts.lane.check()

    def lapse(self) -> None:
        """Nothing was heard for too long."""
        if self._lapsed or self._parts is None:
            return
        self._lapsed = True
        ended = self._parts.grants.end_all("supervisor_unheard")
        self.channel.fail_waiting(self._unheard() or ChannelClosed("unheard"))
        log.error("nothing was heard of the supervisor: %d streams were ended", ended)

    def _unheard(self) -> GuestpassError | None:
        self.guard()
        if not self._lapsed:
            return None
        return ChannelClosed("this worker does not hear its supervisor", hint="Try again in a moment.")

    def _look(self) -> None:
        self._look_timer = self._loop.call_later(LOOK_SECONDS, self._look)
        self.guard()

    def _renew_lease(self, until: float) -> None:
        self._lease = until
        if self._parts is not None and self._serving:
            self._parts.lane.lease = until
            if self._lapsed and time.clock_gettime(time.CLOCK_BOOTTIME) < until:
                self._lapsed = False
                log.warning("the supervisor is heard again")
        self._tell_touched()
        self._tell_held()
        self.channel.tell("alive")

    # ── what the supervisor says ─────────────────────────────────────────────────────────────────────────────────

    def _handlers(self) -> dict[str, Callable[..., Any]]:
        return {
            "begin": self._begin,
            "lease": self._renew_lease,
            "revoke": self._revoke,
            "renew": self._renew,
            "event": self.events.deliver,
            "neighbour": self.neighbours.update,
            "neighbour_gone": self.neighbours.remove,
            "moved": self._moved,
            "live": self._live,
            "metrics": self._metrics,
            "faults": self._faults,
            "certificates": self._certificates,
            "sync": lambda: None,
            "reload": self._reload,
            "leave": self._told_to_leave,
        }

    def _begin(self, begun: Mapping[str, Any]) -> None:
        if not self._begun.done():
            self._begun.set_result(begun)

    def _revoke(self, revocation: Revocation) -> tuple[list[str], int]:
        if self._parts is None:
            return [], 0  # no grants yet; whatever is asked later is answered by what holds now
        sessions = self._parts.grants.session_ids(revocation)
        return sessions, self._parts.revoke(revocation).streams

    def _renew(self, share: Share, sessions: Mapping[str, Session]) -> None:
        if self._parts is not None:
            self._parts.grants.renew(share, sessions)

    def _moved(self, session_id: str, gateway: str) -> None:
        if self._parts is not None:
            self._parts.grants.move_session(session_id, gateway)

    def _live(self) -> dict[str, dict[str, int]]:
        return {} if self._parts is None else self._parts.grants.live()

    def _metrics(self) -> list[Family]:
        return [] if self._parts is None else self._parts.metrics.families()

    async def _faults(self) -> dict[str, str]:
        return {} if self._parts is None else await self._parts.faults()

    def _certificates(self) -> object:
        return None if self._parts is None or self._parts.acme is None else self._parts.acme.status()

    async def _reload(self) -> None:
        """A start that is under way may have read the files as they were: it ends first."""
        await asyncio.shield(self._started)
        if self._parts is not None:
            await self._parts.reload()
            self._tell_ways()

    def _tell_ways(self) -> None:
        if self._parts is not None:
            self.channel.tell("ways", self._parts.ways())

    def _told_to_leave(self, how: str) -> None:
        """`how`: "replaced", "drain" or "stop"; "abandoned" when the supervisor is gone."""
        if not self._leave.done():
            self._leave.set_result(how)

    # ── tunnels ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _holder(self) -> Holder:
        assert self._parts is not None
        holder = Holder(
            budget=self.budget,
            guard=self.guard,
            ways=self._parts.tunnels.ways,
            another=self._parts.tunnels.another_way,
            on_end=self._holders.discard,
        )
        self._holders.add(holder)
        return holder

    def _tell_event(self, event: Event) -> None:
        """After what it is about: whether a gateway is gone, the supervisor sees by what is held."""
        if self._telling:
            self._tell_held()
        self.channel.tell("event", event)

    def _tunnels_changed(self) -> None:
        if not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell_held)

    def _tell_held(self) -> None:
        """What has changed in what this worker holds."""
        self._telling = False
        if self._parts is None or self.channel.closed.done():
            return
        held: Iterable[Held] = () if self._withdrawn else self._parts.tunnels.held()
        now = {(one.site, one.name): one for one in held}
        changed = [one for key, one in now.items() if self._told.get(key) != one]
        gone = [key for key in self._told if key not in now]
        if changed or gone:
            self._told = now
            self.channel.tell("held", changed, gone)

    @property
    def busy(self) -> bool:
        """Whether other workers' streams go through this one's tunnels."""
        return any(holder.busy for holder in self._holders)

    async def withdraw(self) -> None:
        """Hold nothing any more, as far as the others know; returns when all of them know."""
        self._withdrawn = True
        self._tell_held()
        with contextlib.suppress(ChannelClosed):
            await self.ask("sync")

    def touch_later(self, session_id: str, at: float) -> None:
        """As `ShareService.touch`, of a session that goes on: told with the next thing that is said."""
        self._touched[session_id] = at

    def _tell_touched(self) -> None:
        if self._touched and not self.channel.closed.done():
            touched, self._touched = self._touched, {}
            self.channel.tell("touched", touched)


def _state(owner: Owner) -> tuple[str, float, tuple[tuple[str, str], ...]]:
    return owner.secret, owner.until, tuple(owner.notices)
