"""What passes leaves no trace at the edge: not in its state, its logs or its access log, whether it was answered,
refused or broken off."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.world import World
from support.scoreboard import row

APP = Path(__file__).parents[1] / "support" / "mirror_app.py"
CANARY = "canary5b1e9c40"
MB = 1 << 20


def malformed(world: World) -> Iterator[bytes]:
    """What the scanner or aiohttp refuses, with the canary wherever a parser may quote from."""
    fields = world.headers()
    first = f"Host: {fields['Host']}\r\nAuthorization: {fields['Authorization']}\r\n"
    yield f"GET /{CANARY} HTTP/1.1\r\n{first}X {CANARY}: 1\r\n\r\n".encode()
    yield f"GET /{CANARY} HTTP/1.1\r\n{first}Content-Length: {CANARY}\r\n\r\n".encode()
    yield f"POST /{CANARY} HTTP/1.1\r\n{first}Transfer-Encoding: chunked\r\n\r\n{CANARY}\r\n".encode()
    yield f"{CANARY} {CANARY} {CANARY}\r\n\r\n".encode()
    yield f"GET /{CANARY} HTTP/1.1\r\n{first}X-Note: {CANARY * 5000}\r\n\r\n".encode()


async def raw(world: World, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(data)
    async with asyncio.timeout(30):
        answer = await reader.read(4096)
    writer.close()
    return answer


def searched(folder: Path, secrets: tuple[bytes, ...]) -> tuple[int, int, list[str]]:
    """Of all that is the edge's: files, bytes, and where something was found. The gateway's and the application's are
    no edge's."""
    count = size = 0
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name.startswith(("gw-", "app-")):
            continue
        data = path.read_bytes()
        count, size = count + 1, size + len(data)
        found += [path.name for secret in secrets if secret in data]
    return count, size, found


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_nothing_that_passes_stays_at_the_edge(tmp_path: Path, lane: str) -> None:
    settings = f'fast_lane = {str(lane == "fast").lower()}\naccess_log = "access.log"\n'
    async with World(tmp_path, names=("gw-1",), visitors=1, app=APP, settings=settings) as world:
        note = {**world.headers(), "X-Note": CANARY, "Referer": f"http://x.example/{CANARY}"}
        note["Cookie"] = f"a={CANARY}"

        async def seen(method: str, body: bytes | None = None, path: str = f"/{CANARY}?q={CANARY}") -> None:
            async with world.session.request(method, world.url(path), headers=note, data=body) as response:
                assert response.status == 200
                assert CANARY.encode() in await response.read(), "it did not pass"

        for _ in range(3):
            await seen("GET")
            await seen("PUT", (CANARY * 100).encode())
        await seen("POST", (CANARY * (MB // len(CANARY))).encode())
        url = world.url("/ws")
        origin = f"http://{world.headers()['Host']}"
        async with world.session.ws_connect(url, headers={**note, "Origin": origin}) as socket:
            await socket.send_str(CANARY)
            assert await socket.receive_str(timeout=30) == CANARY
        for data in malformed(world):
            assert (await raw(world, data))[9:12] in (b"400", b"431", b"501"), data[:60]
        # An upload that breaks off, and what is asked when nobody is there to answer.
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        head = "".join(f"{name}: {value}\r\n" for name, value in note.items())
        writer.write(f"POST / HTTP/1.1\r\n{head}Content-Length: 100000\r\n\r\n{CANARY * 50}".encode())
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.transport.abort()
        world.apps["gw-1"].stop()
        async with world.session.get(world.url(f"/{CANARY}"), headers=note) as response:
            assert response.status == 502
        world.edge.process.send_signal(signal.SIGTERM)  # what it still holds is written now
        await asyncio.to_thread(world.edge.process.wait, 30)
        secrets = (CANARY.encode(), world.tokens[0].encode())
        files, size, found = searched(tmp_path, secrets)
        assert list(tmp_path.rglob("*.db")), "there was no database to look into"
        lines = (tmp_path / "access.log").read_bytes().count(b"\n")
        assert lines >= 9, "there was no access log to look into"
        row(
            f"traces at the edge, {lane}",
            "paths, queries, fields, cookies, bodies, messages; passed, refused, broken off",
            f"{len(found)} found in {files} files of {size:,} bytes, {lines} lines of access log: {found}",
            "0",
            ok=not found,
            figure=22,
        )
