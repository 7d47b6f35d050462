"""The webhooks (notifier, observer, revoker) and `json-lines`, against receivers that others wrote the verification of:
the library of Standard Webhooks, and the listing of docs/webhooks.md as it stands there."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from pydantic import ValidationError
from standardwebhooks import Webhook as Standard
from standardwebhooks import WebhookVerificationError
from support.people import plugin
from support.programs import Program, free_port
from support.served import serving
from support.stack import EMAIL, running

from guestpass.model import Event, SessionKind
from guestpass.plugin import Client, Incoming, Message, NotDelivered
from guestpass_plugins import webhook as sending
from guestpass_plugins.notify.webhook import Webhook as WebhookNotifier
from guestpass_plugins.observe import webhook as observing
from guestpass_plugins.observe.json_lines import JsonLines
from guestpass_plugins.observe.webhook import Webhook as WebhookObserver
from guestpass_plugins.webhook import Signer, pauses

ROOT = Path(__file__).parents[2]
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(32)).decode()


@dataclass
class Receiver:
    """Verifies with the library; answers with the statuses in turn, then with the last one."""

    url: str = ""
    statuses: list[int] = field(default_factory=lambda: [200])
    answer: Any = field(default_factory=dict)
    delay: float = 0.0
    taken: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        message = Standard(SECRET).verify(body, dict(request.headers))
        self.taken.append((request.headers["webhook-id"], message))
        await asyncio.sleep(self.delay)
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status in (301, 307):
            raise web.HTTPTemporaryRedirect("/elsewhere")
        return web.json_response(self.answer, status=status)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_post("/hook", found.take)
    async with serving(app) as url:
        found.url = f"{url}/hook"
        yield found


class Host:
    """What webhooks ask of the edge."""

    logger = logging.getLogger("test.webhook")

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.http = session
        self.tasks: list[asyncio.Task[None]] = []
        self.key = b"k" * 32

    def derive_key(self, purpose: str) -> bytes:
        return self.key

    def now(self) -> float:
        return time.time()

    def spawn(self, work: Any, *, name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))


@pytest.fixture
async def host() -> AsyncIterator[Any]:
    async with aiohttp.ClientSession() as session:
        found = Host(session)
        yield found
        for task in found.tasks:
            task.cancel()
        await asyncio.gather(*found.tasks, return_exceptions=True)


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


# ── the signature ────────────────────────────────────────────────────────────────────────────────────────────────────


def call(body: bytes, headers: dict[str, str]) -> Incoming:
    return Incoming("POST", "", list(headers.items()), body, Client("::1"))


def test_what_the_library_signs_is_verified() -> None:
    signer = Signer(SimpleNamespace(get_secret_value=lambda: SECRET))  # type: ignore[arg-type]
    now, body = time.time(), b'{"a": 1}'
    good = signer.headers("msg_1", now, body)
    Standard(SECRET).verify(body, good)
    assert signer.verify(call(body, good), now) == "msg_1"
    both = {**good, "webhook-signature": f"v1,AAAA {good['webhook-signature']}"}
    assert signer.verify(call(body, both), now) == "msg_1"
    for changes, what in (
        ({"webhook-id": "msg_2"}, "another id"),
        ({"webhook-timestamp": str(int(now) + 1)}, "another time"),
        ({"webhook-timestamp": "1e9"}, "no number"),
        ({"webhook-timestamp": ""}, "no time"),
        ({"webhook-signature": "v1,"}, "no signature"),
        ({"webhook-signature": good["webhook-signature"].replace("v1,", "v2,")}, "another version"),
    ):
        assert signer.verify(call(body, {**good, **changes}), now) is None, what
    assert signer.verify(call(body + b" ", good), now) is None
    assert signer.verify(call(body, good), now + 301) is None
    assert signer.verify(call(body, {k: v for k, v in good.items() if k != "webhook-id"}), now) is None
    with pytest.raises(WebhookVerificationError):
        Standard(OTHER).verify(body, good)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "http://example.com/"}, "https://"),
        ({"url": "http://127.0.0.1.example.com:80/"}, "https://"),
        ({"url": "http://127.0.0.1:80@example.com/"}, "https://"),
        ({"url": "https://"}, "https://"),
        ({"secret": "short"}, "24 to 64 bytes"),
        ({"secret": "whsec_" + base64.b64encode(bytes(65)).decode()}, "24 to 64 bytes"),
        ({"secret": "no base64 at all, but long enough to be one"}, "24 to 64 bytes"),
        ({"timeout": 0}, "greater than 0"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        plugin(WebhookNotifier, "webhook", **{"url": "https://example.com/", "secret": SECRET, **changes})


def test_pauses_grow_and_end() -> None:
    found = list(pauses(3600))
    assert all(0.5 <= pause <= sending.LONGEST_PAUSE for pause in found)
    assert found[0] <= 1
    assert 3600 <= sum(found) < 3600 + sending.LONGEST_PAUSE
    assert len(found) < 25
    assert list(pauses(0)) == []


# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def letter(**changes: Any) -> Message:
    return Message(
        **{"kind": "code", "to": EMAIL, "subject": "s", "text": "12345678", "expires": 2e9, **changes}
    )


async def test_a_message_is_delivered(receiver: Receiver, host: Any) -> None:
    notifier = plugin(WebhookNotifier, "webhook", url=receiver.url, secret=SECRET, domains=["example.org"])
    assert isinstance(notifier, WebhookNotifier)
    await notifier.start(host)
    assert notifier.accepts(letter())
    assert not notifier.accepts(letter(to="bob@example.com"))
    receiver.statuses = [503, 200, 200, 200]
    with pytest.raises(NotDelivered) as found:
        await notifier.deliver(letter())
    assert not found.value.permanent
    assert "200" in await notifier.deliver(letter())
    await notifier.deliver(letter(text="another"))
    (first, message), (second, _), (third, _) = receiver.taken
    assert first == second != third
    assert message["type"] == "message.code"
    assert (message["data"]["to"], message["data"]["text"]) == (EMAIL, "12345678")
    # Others may log it, so nobody can find the code by trying all of them.
    host.key = b"other"
    await notifier.start(host)
    await notifier.deliver(letter())
    assert receiver.taken[-1][0] != first


@pytest.mark.parametrize(("status", "permanent"), [(422, True), (400, False), (500, False), (307, False)])
async def test_a_message_that_is_not_taken(
    receiver: Receiver, host: Any, status: int, permanent: bool
) -> None:
    notifier = plugin(WebhookNotifier, "webhook", url=receiver.url, secret=SECRET)
    assert isinstance(notifier, WebhookNotifier)
    await notifier.start(host)
    receiver.statuses = [status]
    with pytest.raises(NotDelivered) as found:
        await notifier.deliver(letter())
    assert found.value.permanent == permanent
    assert str(status) in found.value.detail
    assert SECRET not in found.value.detail


async def test_a_receiver_that_does_not_answer(receiver: Receiver, host: Any) -> None:
    notifier = plugin(WebhookNotifier, "webhook", url=receiver.url, secret=SECRET, timeout=0.1)
    assert isinstance(notifier, WebhookNotifier)
    await notifier.start(host)
    receiver.delay = 5
    with pytest.raises(NotDelivered, match="no answer within"):
        await notifier.deliver(letter())


# ── observers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def event(number: int, kind: str = "share.created") -> Event:
    return Event(kind, 1785585600.0 + number, "olga@example.org", "s1", None, {"number": number})


async def test_events_come_in_order_and_again_until_they_are_heard(
    receiver: Receiver, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "FIRST_PAUSE", 0.01)
    observer = plugin(WebhookObserver, "webhook", url=receiver.url, secret=SECRET, types=["share.*", "x"])
    assert isinstance(observer, WebhookObserver)
    await observer.start(host)
    receiver.statuses = [500, 500, 200]
    for number in range(5):
        observer.on_event(event(number))
        observer.on_event(event(number, "gateway.connected"))  # nobody asked for those
    await until(lambda: len(receiver.taken) == 7, "all came")
    await observer.stop()
    assert [message["data"]["detail"]["number"] for _, message in receiver.taken] == [0, 0, 0, 1, 2, 3, 4]
    assert len({message_id for message_id, _ in receiver.taken}) == 5
    assert receiver.taken[-1][1]["timestamp"] == "2026-08-01T12:00:04.000Z"


async def test_events_that_nobody_hears_are_bounded(
    receiver: Receiver, host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sending, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(observing, "STOP_SECONDS", 0.05)
    observer = plugin(WebhookObserver, "webhook", url=receiver.url, secret=SECRET)
    assert isinstance(observer, WebhookObserver)
    await observer.start(host)
    receiver.statuses = [500]
    for number in range(3 * observing.MAX_WAITING):
        observer.on_event(event(number))
    assert len(observer._waiting) == observing.MAX_WAITING
    await observer.stop()
    assert "were not sent" in caplog.text
    receiver.statuses = [200]
    await until(lambda: "were lost" in caplog.text, "the log says that events were lost")


async def test_an_event_is_given_up(
    receiver: Receiver, host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sending, "FIRST_PAUSE", 0.01)
    observer = plugin(WebhookObserver, "webhook", url=receiver.url, secret=SECRET, give_up_seconds=0)
    assert isinstance(observer, WebhookObserver)
    await observer.start(host)
    receiver.statuses = [500, 200]
    observer.on_event(event(1))
    observer.on_event(event(2))
    await until(lambda: len(receiver.taken) == 2, "the next one is sent")
    await observer.stop()
    assert "was given up" in caplog.text


def lines(path: Path) -> list[int]:
    return [orjson.loads(line)["detail"]["number"] for line in path.read_bytes().splitlines()]


async def test_json_lines_outlives_rotation(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    observer = plugin(JsonLines, "json-lines", path=path, types=["share.*"])
    assert isinstance(observer, JsonLines)
    await observer.start(SimpleNamespace(logger=logging.getLogger("test")))  # type: ignore[arg-type]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await observer.on_event(event(1))
    await observer.on_event(event(2, "gateway.connected"))
    path.rename(tmp_path / "events.1")
    await observer.on_event(event(3))
    path.unlink()
    await observer.on_event(event(4))
    os.truncate(path, 0)
    await observer.on_event(event(5))
    path.rename(tmp_path / "events.2")
    path.touch(mode=0o640)
    await observer.on_event(event(6))
    assert (lines(tmp_path / "events.1"), lines(tmp_path / "events.2"), lines(path)) == ([1], [5], [6])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert orjson.loads(path.read_bytes()) == {
        "type": "share.created",
        "at": "2026-08-01T12:00:06.000Z",
        "actor": "olga@example.org",
        "share": "s1",
        "session": None,
        "detail": {"number": 6},
    }
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        await observer.on_event(event(7))
    await observer.stop()
    assert not (tmp_path / "elsewhere").exists()


# ── revoker ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def inside(request: web.Request) -> web.Response:
    return web.Response(text="in")


ANSWERS: list[tuple[Any, int, float, int]] = [
    ({"admit": True}, 200, 0, 200),
    ({"admit": False, "message": "Ask Olga."}, 200, 0, 403),
    ({"admit": "yes"}, 200, 0, 503),
    ({}, 200, 0, 503),
    (["admit"], 200, 0, 503),
    ({"admit": True}, 500, 0, 503),
    ({"admit": True}, 307, 0, 503),
    ({"admit": True}, 200, 5, 503),
]


async def test_a_session_is_admitted_by_a_clear_yes_only(tmp_path: Path, receiver: Receiver) -> None:
    section = {"use": "webhook", "url": receiver.url, "secret": SECRET, "timeout": 0.5}
    app = web.Application()
    app.router.add_get("/", inside)
    async with serving(app) as url, running(tmp_path, url, config={"revoke": [section]}) as stack:
        for answer, status, delay, expected in ANSWERS:
            # A yes in between, or after five failures it would not be asked at all.
            for way, wanted in (((answer, [status], delay), expected), (({"admit": True}, [200], 0), 200)):
                receiver.answer, receiver.statuses, receiver.delay = way
                receiver.taken.clear()
                token = {"Authorization": f"Bearer {await stack.new_token(stack.share_id)}"}
                response = await stack.get("/", headers=token)
                assert response.status == wanted, answer
                assert (b"Ask Olga." in response.body) == (wanted == 403)
                asked = receiver.taken[0][1]
                assert (asked["type"], asked["data"]["session"]["email"]) == ("session.check", EMAIL)
                assert asked["data"]["share"]["id"] == stack.share_id
            assert (await stack.get("/", headers=token)).status == 200
            assert len(receiver.taken) == 1  # once, not on each request


async def test_sessions_are_ended_from_outside(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answer = {"admit": True}
    section = {"use": "webhook", "name": "hr", "url": receiver.url, "secret": SECRET, "push": True}
    app = web.Application()
    app.router.add_get("/", inside)
    async with serving(app) as url, running(tmp_path, url, config={"revoke": [section]}) as stack:

        async def tell(kind: str, data: Any, secret: str = SECRET, message_id: str = "") -> int:
            body = json.dumps({"type": kind, "data": data})
            message_id = message_id or f"msg_{os.urandom(8).hex()}"
            now = datetime.now(UTC)
            headers = {
                "Host": f"localhost:{stack.port}",
                "webhook-id": message_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": Standard(secret).sign(message_id, now, body),
            }
            where = stack.url("/.guestpass/hooks/hr")
            async with stack.session.post(where, data=body, headers=headers) as response:
                return response.status

        assert (await stack.get("/")).status == 200
        (session,) = await stack.edge.service.sessions()
        assert await tell("session.end", {"session": session.id}, OTHER) == 401
        for kind, data in (
            ("session.end", {}),
            ("x", {}),
            ("address.sign-out", {"email": 7}),
            ("session.end", 1),
        ):
            assert await tell(kind, data) == 400
        assert (await stack.get("/")).status == 200
        assert await tell("session.end", {"session": session.id}) == 204
        assert (await stack.get("/")).status == 401
        assert await tell("session.end", {"session": "nobody"}) == 204

        stack.token = await stack.new_token(stack.share_id)
        await stack.edge.service.open_session(
            stack.share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("::1")
        )
        assert (await stack.get("/")).status == 200
        assert await tell("address.sign-out", {"email": "Alice@example.org"}, message_id="once") == 204
        assert (await stack.get("/")).status == 401
        assert not await stack.edge.service.sessions()
        stack.token = await stack.new_token(stack.share_id)
        assert await tell("address.sign-out", {"email": EMAIL}, message_id="once") == 204  # heard already
        assert (await stack.get("/")).status == 200


# ── the listing ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_listing_of_the_documentation(tmp_path: Path, host: Any) -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
    found = re.search(r"<!-- listing: receiver\.py -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    (tmp_path / "receiver.py").write_text(found[1], "utf-8")
    port = free_port()
    environment = {"WEBHOOK_SECRET": SECRET, "PORT": str(port)}
    with Program(
        [sys.executable, tmp_path / "receiver.py"], log=tmp_path / "receiver.log", env=environment
    ) as program:
        url = f"http://127.0.0.1:{port}/"
        await asyncio.to_thread(wait_for, port)
        notifier = plugin(WebhookNotifier, "webhook", url=url, secret=SECRET)
        stranger = plugin(WebhookNotifier, "webhook", url=url, secret=OTHER)
        assert isinstance(notifier, WebhookNotifier)
        assert isinstance(stranger, WebhookNotifier)
        await notifier.start(host)
        await stranger.start(host)
        for _ in range(2):
            assert "200" in await notifier.deliver(letter())
        with pytest.raises(NotDelivered, match="401"):
            await stranger.deliver(letter())
        await asyncio.to_thread(program.wait_for_line, "message.code", seconds=10)
        assert program.output().count("message.code") == 1
        signer, sent = Signer(notifier.config.secret), {}
        for email in (EMAIL, "bob@example.com"):
            body = orjson.dumps({"type": "session.check", "data": {"session": {"email": email}}})
            headers = signer.headers("msg_9", time.time(), body)
            async with host.http.post(url, data=body, headers=headers) as response:
                sent[email] = (await response.json(content_type=None))["admit"]
        assert sent == {EMAIL: True, "bob@example.com": False}


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the listing does not listen"
            time.sleep(0.05)
