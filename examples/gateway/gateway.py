"""A Guestpass gateway in 150 lines beside its imports, written from mux/SPEC.md. See README.md."""

# fmt: off
import argparse
import asyncio
import json
import os
import random
import re
import struct
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import websocket
import wire
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from wire import CREDIT, DATA, FIN, FLOW_CONTROL_ERROR, LIMIT_EXCEEDED, OPEN, PROTOCOL_ERROR, RESET, require

WINDOW, MAX_STREAMS, EPOCH = 65_536, 256, str(time.time_ns())


class Stream:
    def __init__(self, number, limit):
        self.number, self.limit, self.sent, self.granted, self.received, self.consumed = number, limit, 0, WINDOW, 0, 0
        self.ended = self.resetting = self.cancelling = False
        self.body, self.grown = asyncio.StreamReader(), asyncio.Event()


class Tunnel:
    def __init__(self, options):
        self.options, self.nonce, self.service = options, os.urandom(32), urlsplit(options.url)
        self.key = load_pem_private_key(Path(options.key).read_bytes(), None)
        self.streams, self.last, self.floor, self.ready, self.replace = {}, 0, 0, False, asyncio.Event()

    async def run(self):
        self.carrier = await websocket.connect(self.options.edge, wire.PATH, wire.SUBPROTOCOL, self.options.ca)
        self.carrier.write(wire.document(wire.HELLO, wire.hello("gateway", self.nonce, EPOCH, WINDOW, MAX_STREAMS)))
        alive = asyncio.create_task(wire.stay_alive(self.carrier))
        try:
            while True:
                kind, flags, number, payload = await wire.read_frame(self.carrier)
                require(self.floor or kind in (wire.HELLO, wire.GOAWAY), PROTOCOL_ERROR, "HELLO comes first")
                if kind <= wire.INFO:  # the others are for later versions
                    (self.stream_frame if number else self.tunnel_frame)(kind, number, payload, flags & FIN)
        except (wire.Wrong, ValueError, KeyError, TypeError) as exc:  # the latter: JSON that is not what it must be
            self.carrier.write(wire.goaway(self.last, getattr(exc, "code", PROTOCOL_ERROR)))
            raise ConnectionError(f"the edge broke the protocol: {exc!r}") from exc
        finally:
            alive.cancel()
            for stream in self.streams.values():
                stream.task.cancel()
            self.carrier.close(websocket.GOING_AWAY)

    def tunnel_frame(self, kind, number, payload, fin):
        fields = json.loads(payload) if kind >= wire.HELLO else {}
        if kind == wire.HELLO:
            require(not self.floor and fields["role"] == "edge", PROTOCOL_ERROR, "not the HELLO of an edge")
            self.floor = fields.get("floor", wire.FLOOR)
            self.carrier.write(wire.document(wire.AUTH, wire.proof(
                self.key, fields, self.nonce, self.options.site, self.options.name, EPOCH, self.carrier.certificate)))
        elif kind == wire.AUTH and fields["step"] == "verdict":
            if not fields["ok"]:
                raise PermissionError(fields.get("message", "refused"))
            self.ready = True
            self.carrier.write(wire.document(wire.INFO, {"services": {self.options.service: {"healthy": True}}}))
            print(f"connected to {self.options.edge}", flush=True)
        elif kind == wire.PING:
            self.carrier.write(wire.frame(wire.PONG, 0, payload))
        elif kind == wire.GOAWAY or fields.get("drain"):
            self.replace.set()

    def stream_frame(self, kind, number, payload, fin):
        stream = self.streams.get(number)
        if self.ready and number == self.last + 1 <= wire.LAST_ID and kind in (OPEN, RESET):
            self.last = number  # used up by RESET, or
            if kind == OPEN:
                self.open(Stream(number, self.floor), *wire.read_open(payload), fin)
        elif number > self.last or kind in (OPEN, wire.HEAD):
            raise wire.Wrong(PROTOCOL_ERROR, "a stream that was never opened, or not a frame of an edge")
        elif stream and kind in (DATA, wire.TRAILERS):
            self.data(stream, payload if kind == DATA else b"", fin or kind == wire.TRAILERS)
        elif stream and kind == CREDIT:
            require(int.from_bytes(payload, "big") > stream.limit, FLOW_CONTROL_ERROR, "credit that does not grow")
            stream.limit = int.from_bytes(payload, "big")
            stream.grown.set()
        elif stream and stream.resetting:  # RESET_ACK, or a RESET that crossed ours
            del self.streams[number]
        elif stream:
            require(kind == RESET and not stream.cancelling, PROTOCOL_ERROR, "RESET twice, or RESET_ACK first")
            stream.cancelling = stream.task.cancel()

    def open(self, stream, service, head, body, fin):
        require(len(self.streams) < MAX_STREAMS, LIMIT_EXCEEDED, "too many streams")
        self.streams[stream.number] = stream
        stream.task = asyncio.create_task(self.serve(stream, service, head))
        stream.task.add_done_callback(lambda task: self.served(stream))
        self.data(stream, body, fin)

    def data(self, stream, piece, fin):
        stream.received += len(piece)
        require(stream.received <= stream.granted, FLOW_CONTROL_ERROR, "more body than credit")
        require(not stream.ended and not stream.cancelling, PROTOCOL_ERROR, "body after FIN or RESET")
        if not stream.resetting:
            stream.body.feed_data(piece)
            if fin:
                stream.ended = True
                stream.body.feed_eof()

    def served(self, stream):  # the work has really ended
        if stream.cancelling:
            self.carrier.write(wire.frame(wire.RESET_ACK, stream.number))
        if not stream.resetting:
            self.streams.pop(stream.number, None)

    def reset(self, stream, code):
        stream.resetting = True
        self.carrier.write(wire.reset(stream.number, code))

    async def serve(self, stream, service, head):
        writer = upload = None
        try:
            first, *lines = wire.read_head(head)
            if service != self.options.service or not re.fullmatch(rb"(GET|HEAD|POST) /[!-~]* HTTP/1\.1", first):
                return self.reset(stream, wire.REFUSED)
            reader, writer = await asyncio.open_connection(self.service.hostname, self.service.port or 80)
            writer.transport.set_write_buffer_limits(0)  # what was drained has left
            # As HTTP/1.0: then the response is not chunked, and ends with the connection.
            writer.write(b"\r\n".join((first[:-1] + b"0", b"Host: " + self.service.netloc.encode(), *lines)))
            upload = asyncio.create_task(self.upload(stream, writer))
            await self.answer(stream, reader)
            await upload  # what is left of a request that was answered early
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            self.reset(stream, wire.BAD_UPSTREAM if writer else wire.UNREACHABLE)
        finally:
            for end in (upload and upload.cancel, writer and writer.close):
                end and end()

    async def upload(self, stream, writer):
        while piece := await stream.body.read(WINDOW):
            with suppress(OSError):  # when the service has heard enough, its answer says so
                writer.write(piece)
                await writer.drain()
            stream.consumed += len(piece)
            if not stream.ended and stream.consumed + WINDOW - stream.granted >= WINDOW // 4:
                stream.granted = stream.consumed + WINDOW
                self.carrier.write(wire.u64(CREDIT, stream.granted, stream.number))

    async def answer(self, stream, reader):
        first, *lines = wire.read_head(await reader.readuntil(b"\r\n\r\n"))
        piece = head = b"\r\n".join((b"HTTP/1.1" + first[8:], *lines))
        self.carrier.write(wire.frame(wire.HEAD, stream.number, struct.pack(">H", len(head)) + head))
        while piece:
            while stream.sent == stream.limit:
                stream.grown.clear()
                await stream.grown.wait()
            piece = await reader.read(min(wire.MAX_DATA, stream.limit - stream.sent))
            stream.sent += len(piece)
            self.carrier.write(wire.frame(DATA, stream.number, piece, 0 if piece else FIN))
            await self.carrier.drain()

    async def drain(self, task):
        for last in (wire.LAST_ID, None):  # after a round trip nothing more is on its way
            self.carrier.write(wire.goaway(last or self.last, wire.DRAINING))
            await asyncio.sleep(1)
        while self.streams and not task.done():
            await asyncio.sleep(0.1)
        task.cancel()


async def main(options):
    wait, draining = 0.0, []
    while True:
        tunnel = Tunnel(options)
        task, replace = asyncio.create_task(tunnel.run()), asyncio.create_task(tunnel.replace.wait())
        await asyncio.wait((task, replace), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            draining = [*draining, asyncio.create_task(tunnel.drain(task))][-16:]
            continue
        print(f"{options.edge}: {task.exception()}", flush=True)
        wait = 0 if tunnel.ready else min(20, 2 * wait or 0.5)
        await asyncio.sleep(random.uniform(0, wait))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("edge", "site", "name", "key", "service", "url", "ca"):
        parser.add_argument(f"--{option}", required=option != "ca")
    asyncio.run(main(parser.parse_args()))
