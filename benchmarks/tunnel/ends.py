"""The two ends of a tunnel as two processes, for the benchmarks: `Tunnels` behind a socket, and a `GatewayLink`.

Both are told what to do by one JSON object a line on stdin and answer with one on stdout; their first line says that
they are ready. Sockets, event loop, TLS, WebSocket framing, handshake and session are the ones of production
(`guestpass.loop`, `guestpass.mux.link`, `guestpass.edge.tunnels`); only what is done with a stream is made for the
benchmark, in one of two ways:

    "c"         Stream subclasses of lane.pyx, by the session's C interface, as a fast lane works
    "python"    a Python handler for each stream
    "task"      TunnelStream and a task for each stream, which is what code written with asyncio gets

    python ends.py edge FOLDER LANE [--tls] [--host ADDRESS]       {"url": …, "ca": …}
    python ends.py gateway FOLDER LANE --url URL [--ca FILE]       {"ready": true}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent / "tests")]

from support import tunnel  # noqa: E402

from guestpass import loop as loops  # noqa: E402
from guestpass.gateway import dial  # noqa: E402
from guestpass.mux.handshake import Hello  # noqa: E402
from guestpass.mux.link import EdgeLink, GatewayLink  # noqa: E402
from guestpass.mux.stream import TunnelStream  # noqa: E402
from guestpass_speedups.session import Budget, Session, Stream  # noqa: E402

REQUEST = b"GET /x HTTP/1.1\r\nhost: a.b\r\naccept: */*\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n"
BODY = bytes(200)
PIECE = bytes(64 * 1024)
# One gateway, known to both processes.
KEY = bytes(range(32))


def cpu() -> float:
    """Seconds of CPU of this process: user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rss() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── work of the gateway ──────────────────────────────────────────────────────────────────────────────────────────────


class Echo:
    """StreamHandler: sends back what comes."""

    def __init__(self, stream: Stream) -> None:
        stream.send_head(RESPONSE)

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        stream.consume(len(data))
        stream.send(data, fin=fin)

    def stream_reset(self, stream: Stream, code: int) -> None:
        stream.cancelled()

    def ignore(self, *args: Any) -> None:
        pass

    stream_head = stream_trailers = stream_writable = stream_closed = ignore


class Bulk:
    """StreamHandler: `size` bytes, in pieces of 64 KiB, as fast as the session takes them."""

    def __init__(self, stream: Stream, size: int) -> None:
        self.left = size
        stream.send_head(RESPONSE)
        self.stream_writable(stream)

    def stream_writable(self, stream: Stream) -> None:
        while self.left:
            size = min(self.left, len(PIECE))
            self.left -= size
            if not stream.send(PIECE if size == len(PIECE) else PIECE[:size], fin=not self.left):
                return

    def stream_reset(self, stream: Stream, code: int) -> None:
        self.left = 0
        stream.cancelled()

    def ignore(self, *args: Any) -> None:
        pass

    stream_head = stream_trailers = stream_data = stream_closed = ignore


async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
    """`task`: GET /bulk/SIZE is answered with so many bytes, the rest with what it sends."""
    stream.send_head(RESPONSE)
    path = head.split(b" ", 2)[1]
    if path.startswith(b"/bulk/"):
        left = int(path.removeprefix(b"/bulk/"))
        while left > len(PIECE):
            await stream.write(PIECE)
            left -= len(PIECE)
        stream.finish(PIECE[:left])
    while data := await stream.read():
        await stream.write(data)
    stream.finish()


class GatewayEnd(GatewayLink):
    """`lane`: who serves the streams."""

    lane = "task"

    def _new_session(self, handler: Any, budget: Budget, **limits: Any) -> Session:
        if self.lane == "c":
            import lane

            session: Session = lane.WorkSession(False, handler, budget, **limits)
            return session
        return super()._new_session(handler, budget, **limits)

    def stream_opened(self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool) -> Any:
        if self.lane == "task":
            return super().stream_opened(stream, service, interactive, head, fin)
        path = head.split(b" ", 2)[1]
        if path.startswith(b"/bulk/"):
            return Bulk(stream, int(path.removeprefix(b"/bulk/")))
        return Echo(stream)


class Gateway(tunnel.TestGateway):
    """Owner of the link."""

    lane = "task"

    def make(self, host: str = "edge") -> GatewayLink:
        link = GatewayEnd(
            self,
            budget=self.budget,
            hello=Hello(role="gateway", epoch=self.epoch),
            host=host,
            site=self.site,
            name=self.name,
            key=self.key,
            serve=serve,
        )
        link.lane = self.lane
        return link


async def gateway(arguments: argparse.Namespace) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    owner = Gateway(key=Ed25519PrivateKey.from_private_bytes(KEY))
    owner.lane = arguments.lane
    where = dial.edge_at(arguments.url, ca=arguments.ca)
    _, link = await dial.connect(where, lambda: owner.make(where.authority))
    await tunnel.until(lambda: link.ready or link.end is not None, "a verdict")
    assert link.ready, link.end
    answer(ready=True)
    await commands({"usage": usage}, link)


# ── work of the edge ─────────────────────────────────────────────────────────────────────────────────────────────────


class Exchanges:
    """`python`: as lane.Load. StreamHandler of all of its streams."""

    def __init__(self, session: Session, total: int, concurrent: int, done: Callable[[Any], None]) -> None:
        self.session = session
        self.left = total
        self.open = 0
        self.got: dict[int, int] = {}
        self.done = done
        for _ in range(concurrent):
            self.another()

    def another(self) -> None:
        if self.left:
            self.left -= 1
            self.open += 1
            self.session.open("web", REQUEST, self, body=BODY, fin=True)

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        stream.consume(len(data))
        if len(data) != len(BODY) or not fin:
            self.left = 0
            self.done(RuntimeError("a stream ended without its 200 bytes"))

    def stream_closed(self, stream: Stream) -> None:
        self.open -= 1
        if self.left:
            self.another()
        elif not self.open:
            self.done(None)

    def stream_reset(self, stream: Stream, code: int) -> None:
        stream.cancelled()

    def ignore(self, *args: Any) -> None:
        pass

    stream_head = stream_trailers = stream_writable = ignore


class Sink:
    """StreamHandler: counts and consumes."""

    def __init__(self, done: Callable[[Any], None]) -> None:
        self.got = 0
        self.window = 0
        self.done = done

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        self.got += len(data)
        stream.consume(len(data))

    def stream_closed(self, stream: Stream) -> None:
        self.window = stream.window
        self.done(None)

    def stream_reset(self, stream: Stream, code: int) -> None:
        stream.cancelled()

    def ignore(self, *args: Any) -> None:
        pass

    stream_head = stream_trailers = stream_writable = ignore


class Finished:
    """A future as a callback that takes an exception or None."""

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __call__(self, problem: BaseException | None) -> None:
        if self.future.done():
            return
        if problem is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(problem)


async def usage(link: Any, **_: Any) -> dict[str, Any]:
    return {
        "cpu": cpu(),
        "rss": rss(),
        "streams": link.session.streams,
        "promised": link.session.budget.promised,
    }


async def one(link: EdgeLink) -> None:
    stream = link.open("web", REQUEST, fin=True, body=BODY)
    await stream.head()
    got = 0
    while data := await stream.read():
        got += len(data)
    if got != len(BODY):
        raise RuntimeError("a stream ended without its 200 bytes")


class EdgeWork:
    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.idle: list[Any] = []

    async def echo(self, link: EdgeLink, total: int, concurrent: int) -> dict[str, Any]:
        """`total` streams: open, 200 B, the same back, close."""
        used, began = cpu(), time.perf_counter()
        if self.lane == "task":
            left = iter(range(total))

            async def worker() -> None:
                for _ in left:
                    await one(link)

            await asyncio.gather(*(worker() for _ in range(concurrent)))
        else:
            finished = Finished()
            if self.lane == "c":
                import lane

                load: Any = lane.Load(link.session, total, concurrent, finished)
            else:
                load = Exchanges(link.session, total, concurrent, finished)
            await finished.future
            del load
        return {"count": total, "seconds": time.perf_counter() - began, "cpu": cpu() - used}

    async def bulk(self, link: EdgeLink, size: int) -> dict[str, Any]:
        """One stream, `size` bytes from the gateway."""
        used, began = cpu(), time.perf_counter()
        head = b"GET /bulk/%d HTTP/1.1\r\nhost: a.b\r\n\r\n" % size
        if self.lane == "task":
            stream = link.open("web", head, fin=True, interactive=False)
            await stream.head()
            got = 0
            while data := await stream.read():
                got += len(data)
            window = stream._raw.window
        elif self.lane == "c":
            import lane

            finished = Finished()
            fetched: Any = lane.fetch(link.session, head, finished)
            await finished.future
            got, window = fetched.got, fetched.last_window
        else:
            finished = Finished()
            sink = Sink(finished)
            link.session.open("web", head, sink, interactive=False, fin=True)
            await finished.future
            got, window = sink.got, sink.window
        if got != size:
            raise RuntimeError(f"{got} bytes of {size} came")
        seconds = time.perf_counter() - began
        rtt = link.session.rtt
        return {"count": size, "seconds": seconds, "cpu": cpu() - used, "window": window, "rtt": rtt}

    async def timeline(self, link: EdgeLink, seconds: float, step: float = 0.25) -> dict[str, Any]:
        """One stream without an end, for so long: bytes that had come after each step."""
        stream = link.open("web", b"GET /bulk/%d HTTP/1.1\r\n\r\n" % (1 << 40), fin=True, interactive=False)
        await stream.head()
        began = time.perf_counter()
        came: list[tuple[float, int]] = [(0.0, 0)]
        got = 0
        while (at := time.perf_counter() - began) < seconds:
            got += len(await stream.read())
            if at >= came[-1][0] + step:
                came.append((at, got))
        window = stream._raw.window
        stream.reset(5)
        return {"came": came, "rtt": link.session.rtt, "window": window}

    async def beside(
        self, link: EdgeLink, small: int, seconds: float, bulk: float | None, stalled: bool
    ) -> dict[str, Any]:
        """`small` streams at a time, one exchange after the other, each followed by a pause; milliseconds of each.

        `bulk`: bytes a second at which another stream's visitor takes what comes; 0: as fast as he can."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        times: list[float] = []
        others: list[TunnelStream] = []
        moved = [0]
        head = b"GET /bulk/%d HTTP/1.1\r\n\r\n" % (1 << 40)
        promised = [link.session.budget.promised]
        tasks = []

        async def drain(stream: TunnelStream) -> None:
            await stream.head()
            began = loop.time()
            while loop.time() < until:
                moved[0] += len(await stream.read())
                if bulk:
                    await asyncio.sleep(began + moved[0] / bulk - loop.time())

        if stalled:
            others.append(link.open("web", head, fin=True, interactive=False))
            await others[-1].head()
        if bulk is not None:
            others.append(link.open("web", head, fin=True, interactive=False))
            tasks.append(loop.create_task(drain(others[-1])))

        async def visitor(index: int) -> None:
            await asyncio.sleep(index * 0.1 / small)
            while loop.time() < until:
                began = time.perf_counter()
                await one(link)
                times.append((time.perf_counter() - began) * 1000)
                promised.append(link.session.budget.promised)
                await asyncio.sleep(0.1)

        await asyncio.gather(*(visitor(index) for index in range(small)), *tasks)
        buffered = others[0].buffered if stalled else 0
        windows = sum(stream._raw.window for stream in others)
        for stream in others:
            stream.reset(5)
        await asyncio.sleep(0.2)
        times.sort()
        return {
            "exchanges": len(times),
            "p50": times[len(times) // 2],
            "p99": times[len(times) * 99 // 100],
            "bulk_bytes": moved[0],
            "stalled_buffered": buffered,
            "windows": windows,
            "promised_most": max(promised),
        }

    async def hold(self, link: EdgeLink, count: int) -> dict[str, Any]:
        """Opens `count` streams whose request has not ended, each with its response head; they stay, idle."""
        before = rss()
        for begin in range(0, count, 500):
            streams = [link.open("web", REQUEST, fin=False) for _ in range(min(500, count - begin))]
            for stream in streams:
                await stream.head()
            self.idle += streams
        return {"streams": link.session.streams, "bytes_each": (rss() - before) / count}

    async def release(self, link: EdgeLink) -> dict[str, Any]:
        """Each of them still works: 200 B over, and back, then the end."""
        idle, self.idle = self.idle, []
        for stream in idle:
            await stream.write(BODY)
            stream.finish()
        for stream in idle:
            got = b""
            while data := await stream.read():
                got += data
            assert got == BODY, len(got)
        return {"streams": link.session.streams, "worked": len(idle)}

    async def usage(self, link: EdgeLink) -> dict[str, Any]:
        return await usage(link)


async def edge(arguments: argparse.Namespace) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    async with tunnel.edge(arguments.folder, tls=arguments.tls, host=arguments.host) as made:
        made.enrol(Ed25519PrivateKey.from_private_bytes(KEY))
        answer(url=made.url, ca=str(made.ca) if made.ca else None)
        await tunnel.until(
            lambda: made.tunnels.candidates(tunnel.SITE, tunnel.SERVICE), "a gateway", seconds=60
        )
        work = EdgeWork(arguments.lane)
        (link,) = made.tunnels._links
        names = ("echo", "bulk", "timeline", "beside", "hold", "release", "usage")
        await commands({name: getattr(work, name) for name in names}, link)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def commands(known: dict[str, Callable[..., Any]], link: Any) -> None:
    """{"do": name, …} a line, until the end of stdin."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        fields = json.loads(line)
        answer(**await known[fields.pop("do")](link, **fields))
    link.abort()
    await asyncio.wait((link.closed,), timeout=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("end", choices=("edge", "gateway"))
    parser.add_argument("folder", type=Path, help="for certificates; lane.pyx is compiled in its `lane`")
    parser.add_argument("lane", choices=("c", "python", "task"))
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--url")
    parser.add_argument("--ca", type=Path)
    arguments = parser.parse_args()
    sys.path.append(str(arguments.folder / "lane"))
    loops.run(edge(arguments) if arguments.end == "edge" else gateway(arguments))


if __name__ == "__main__":
    main()
