"""The sample dashboard on its own: other tests rely on what it sends."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import orjson
import pytest
from aiohttp import ClientSession, WSServerHandshakeError
from aiohttp.test_utils import TestClient, TestServer

APP = Path(__file__).parent.parent / "examples" / "dashboard" / "app.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard_app", APP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dashboard = load()


@pytest.fixture
async def client() -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(dashboard.make_app())) as found:
        yield found


async def test_page_names_the_visitor_escaped(client: TestClient) -> None:
    page = await (await client.get("/", headers={"X-Guestpass-Email": "alice@example.org"})).text()
    assert "Signed in as alice@example.org" in page
    page = await (await client.get("/", headers={"X-Guestpass-Email": "<b>@example.org"})).text()
    assert "&lt;b&gt;@example.org" in page
    assert "not through Guestpass" in await (await client.get("/")).text()


async def test_page_needs_nothing_from_elsewhere_and_no_absolute_path(client: TestClient) -> None:
    answer = await client.get("/")
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    page = await answer.text()
    for attribute in ("src", "href", "action"):
        assert f'{attribute}="/' not in page
        assert f'{attribute}="http' not in page
    for name in ("app.js", "style.css", "icon.svg"):
        answer = await client.get(f"/static/{name}")
        assert answer.status == 200
        assert "http://" not in (await answer.text()).replace("http://www.w3.org/2000/svg", "")


async def test_chart_brings_the_past_then_samples_in_order(client: TestClient) -> None:
    async with client.ws_connect("/live") as socket:
        history = (await socket.receive_json(timeout=5))["history"]
        assert len(history) == dashboard.HISTORY_SECONDS * dashboard.SAMPLES_PER_SECOND
        samples = [await socket.receive_json(timeout=5) for _ in range(3)]
        times = [round(s["sample"]["at"] * dashboard.SAMPLES_PER_SECOND) for s in samples]
        assert times == list(range(times[0], times[0] + 3))
        assert samples[0]["sample"] == dashboard.sample(times[0])
        assert samples[0]["viewers"] == 1
        await socket.send_str("ping")
        while (message := await socket.receive_str(timeout=5)) != "pong":
            assert "sample" in message


async def test_chart_refuses_pages_of_other_origins(client: TestClient) -> None:
    with pytest.raises(WSServerHandshakeError) as refused:
        await client.ws_connect("/live", headers={"Origin": "https://elsewhere.example"})
    assert refused.value.status == 403
    own = f"http://{client.host}:{client.port}"
    async with client.ws_connect("/live", headers={"Origin": own}) as socket:
        await socket.receive_json(timeout=5)


async def read_events(
    client: TestClient, count: int, headers: dict[str, str] | None = None
) -> list[tuple[int, object]]:
    events = []
    async with client.get("/log", headers=headers) as answer:
        assert answer.content_type == "text/event-stream"
        while len(events) < count:
            number = (await answer.content.readline()).decode().removeprefix("id: ").strip()
            data = (await answer.content.readline()).decode().removeprefix("data: ")
            assert (await answer.content.readline()) == b"\n"
            events.append((int(number), orjson.loads(data)))
    return events


async def test_log_continues_where_a_viewer_left_off(client: TestClient) -> None:
    events = await read_events(client, dashboard.LOG_BACKLOG)
    numbers = [number for number, _ in events]
    assert numbers == list(range(numbers[0], numbers[0] + dashboard.LOG_BACKLOG))
    assert events[0][1] == dashboard.log_entry(numbers[0])
    again = await read_events(client, 2, {"Last-Event-ID": str(numbers[-3])})
    assert [number for number, _ in again] == numbers[-2:]


async def test_form_shows_what_was_posted_and_by_whom(client: TestClient) -> None:
    answer = await client.post(
        "/notes",
        data={"text": " Pump 2, “rough” 🙂 "},
        headers={"Accept": "application/json", "X-Guestpass-Email": "alice@example.org"},
    )
    (note,) = await answer.json()
    assert note["text"] == "Pump 2, “rough” 🙂"
    assert note["by"] == "alice@example.org"
    answer = await client.post("/notes", data={"text": "without a script"}, allow_redirects=False)
    assert answer.status == 303
    assert answer.headers["Location"] == "./"
    assert [n["text"] for n in await (await client.get("/notes")).json()] == [
        "without a script",
        "Pump 2, “rough” 🙂",
    ]


@pytest.mark.parametrize("text", ["", "   ", "x" * 501])
async def test_form_refuses_what_is_not_a_note(client: TestClient, text: str) -> None:
    assert (await client.post("/notes", data={"text": text})).status == 400
    assert await (await client.get("/notes")).json() == []


async def test_notes_do_not_grow_without_bound(client: TestClient) -> None:
    for number in range(dashboard.MAX_NOTES + 3):
        await client.post("/notes", data={"text": str(number)})
    notes = await (await client.get("/notes")).json()
    assert len(notes) == dashboard.MAX_NOTES
    assert notes[0]["text"] == str(dashboard.MAX_NOTES + 2)


async def test_download_is_the_same_bytes_each_time(client: TestClient) -> None:
    answer = await client.get("/download?mb=2")
    body = await answer.read()
    assert answer.headers["Content-Length"] == "2000000"
    assert "measurements-2mb.bin" in answer.headers["Content-Disposition"]
    assert body == b"".join(dashboard.download_blocks(2_000_000))
    # Each block differs from the others, so that one that is lost, doubled or moved is seen.
    blocks = [body[i : i + dashboard.BLOCK] for i in range(0, len(body), dashboard.BLOCK)]
    assert len(set(blocks)) == len(blocks)
    head = await client.head("/download?mb=2")
    assert head.headers["Content-Length"] == "2000000"


@pytest.mark.parametrize("mb", ["0", "-1", "1.5", "x", "10241", "²"])
async def test_download_refuses_other_sizes(client: TestClient, mb: str) -> None:
    assert (await client.get("/download", params={"mb": mb})).status == 400


async def test_upload_counts_and_hashes(client: TestClient) -> None:
    body = b"".join(dashboard.download_blocks(3_000_000))
    answer = await (await client.post("/upload", data=io.BytesIO(body))).json()
    assert answer["bytes"] == len(body)
    assert answer["sha256"] == hashlib.sha256(body).hexdigest()


async def test_program_prints_its_url_and_ends_on_a_signal() -> None:
    process = subprocess.Popen([sys.executable, str(APP), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        async with ClientSession() as session, session.ws_connect(f"{url}/live") as socket:
            await socket.receive_json(timeout=5)
            process.send_signal(signal.SIGINT)  # while somebody watches
            assert process.wait(10) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
