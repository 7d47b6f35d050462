"""`smtp` against a real server, `outbox` into a real folder, and the mail that both write."""

from __future__ import annotations

import asyncio
import hmac
import logging
import ssl
import stat
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError
from support.programs import free_port
from support.shares import new, world

from guestpass.model import Delivery, Event
from guestpass.plugin import Message, NotDelivered, Notifier
from guestpass.shares.courier import Courier
from guestpass_plugins.notify.letter import letter
from guestpass_plugins.notify.outbox import Outbox
from guestpass_plugins.notify.smtp import Smtp, parse_url

SENDER = "Guestpass <share@example.com>"

HOST: Any = SimpleNamespace(
    logger=logging.getLogger("test"),
    now=lambda: 1785585600.25,
    derive_key=lambda purpose: hmac.digest(b"k", purpose.encode(), "sha256"),
)
KEY = b"k" * 32


def message(**fields: object) -> Message:
    given: dict[str, object] = {
        "kind": "invitation",
        "to": "alice@example.org",
        "subject": "Olga shared “Boiler 3” with you",
        "text": "Open it here:\n\nhttps://share.example.com/s/" + "x" * 43 + "\n",
        "html": "<p>Open it here</p>",
    }
    return Message(**{**given, **fields})  # type: ignore[arg-type]


HEADERS = [
    "from",
    "to",
    "subject",
    "date",
    "message-id",
    "auto-submitted",
    "mime-version",
    "content-type",
]

# ── The mail itself ──────────────────────────────────────────────────────────────────────────────────────────────────


def read(data: bytes) -> EmailMessage:
    parsed = message_from_bytes(data, policy=policy.default)
    assert isinstance(parsed, EmailMessage)
    return parsed


def _text(part: EmailMessage) -> str:
    return str(part.get_content()).replace("\r\n", "\n")


@pytest.mark.parametrize(
    "name",
    [
        "Boiler 3, hall \"A\" & 'B'",
        "👩‍👩‍👧‍👦 家計簿、2026年",
        "é" * 200,
        "x" * 200,
        "a, b; c: <d@e.org>",
        "=?utf-8?q?x?=",
        "a =?utf-8?q?x=0D=0ABcc:_eve@example.com?= b",
        "=?utf-8?q?" + "x" * 190,
    ],
)
def test_subjects_come_back_as_they_were(name: str) -> None:
    for subject in (f"Olga shared “{name}” with you", name, f"{name} {name}"):
        data = letter(message(subject=subject), SENDER, KEY).as_bytes()
        mail = read(data)
        assert mail["Subject"] == subject
        assert [key.lower() for key in mail.keys()] == HEADERS  # noqa: SIM118
        assert data.isascii()
        assert all(len(line) <= 998 for line in data.split(b"\r\n"))


def test_headers_and_parts() -> None:
    mail = read(letter(message(), SENDER, KEY).as_bytes())
    assert mail["From"] == SENDER
    assert mail["To"] == "alice@example.org"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Message-ID"].endswith("@example.com>")
    assert abs(mail["Date"].datetime - datetime.now(UTC)) < timedelta(minutes=1)
    assert len(mail.items()) == len({name for name, _ in mail.items()})
    plain, html = mail.get_body(("plain",)), mail.get_body(("html",))
    assert plain is not None
    assert html is not None
    assert _text(plain) == message().text
    assert _text(html) == "<p>Open it here</p>\n"


def test_a_plain_text_stays_readable_in_the_file() -> None:
    assert (
        b"\r\nhttps://share.example.com/s/" + b"x" * 43 + b"\r\n" in letter(message(), SENDER, KEY).as_bytes()
    )


@pytest.mark.parametrize("text", ["ü" * 3000, "x" * 3000, ".\n..\nFrom here\n", "👍\n" * 100])
def test_texts_come_back_as_they_were(text: str) -> None:
    data = letter(message(text=text, html=None), SENDER, KEY).as_bytes()
    assert data.isascii()
    assert all(len(line) <= 998 for line in data.split(b"\r\n"))
    assert _text(read(data)).rstrip("\n") == text.rstrip("\n")


def test_the_same_message_has_the_same_id() -> None:
    first, again, other = (
        letter(m, SENDER, KEY)["Message-ID"] for m in (message(), message(), message(text="other"))
    )
    assert first == again != other


async def test_an_id_does_not_tell_the_code(tmp_path: Path) -> None:
    """Every mail server on the way logs it, and of a code there are 10⁸: whoever knows the words of the mail could
    try all of them, were the id made of the mail alone."""
    found = []
    for number, key in enumerate((b"one", b"one", b"two")):
        outbox = Outbox("outbox", Outbox.Config(folder=tmp_path / str(number), sender=SENDER))
        host = SimpleNamespace(**{**vars(HOST), "derive_key": lambda purpose, key=key: key})
        await outbox.start(host)  # type: ignore[arg-type]
        await outbox.deliver(message(kind="code"))
        (file,) = (tmp_path / str(number)).iterdir()
        found.append(read(file.read_bytes())["Message-ID"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "fields",
    [
        {"subject": "x\r\nBcc: eve@example.com"},
        {"subject": "x\nBcc: eve@example.com"},
        {"subject": "x\rBcc: eve@example.com"},
        {"subject": "x\u2028Bcc: eve@example.com"},
        {"subject": "x\0"},
        {"to": "alice@example.org\r\nBcc: eve@example.com"},
        {"to": "alice@example.org, eve@example.com"},
        {"to": "alice@example.org\r\nDATA"},
        {"to": ""},
        {"to": "alice"},
    ],
    ids=repr,
)
def test_no_header_carries_another(fields: dict[str, object]) -> None:
    with pytest.raises(NotDelivered) as caught:
        letter(message(**fields), SENDER, KEY)
    assert caught.value.permanent


# ── smtp ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Server:
    """Keeps what it takes; refuses some addresses, and takes some only the second time."""

    def __init__(self) -> None:
        self.taken: list[tuple[list[str], EmailMessage]] = []
        self.mail_from: list[str] = []
        self.hellos: set[str] = set()
        self.tried: dict[str, int] = {}
        self.logged_in: list[str] = []
        self.data_answer = "250 2.0.0 kept as 4F2A"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        self.hellos.add(session.host_name)
        self.tried[address] = self.tried.get(address, 0) + 1
        if address.startswith("gone"):
            return "550 5.1.1 no such user here"
        if address.startswith("greylisted") and self.tried[address] == 1:
            return "451 4.7.1 greylisted, come back"
        envelope.rcpt_tos.append(address)
        return "250 ok"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.data_answer.startswith("250"):
            self.taken.append((list(envelope.rcpt_tos), read(envelope.content)))
            self.mail_from.append(envelope.mail_from)
        return self.data_answer

    def authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        ok = isinstance(data, LoginPassword) and (data.login, data.password) == (b"us@er", b"pass/word")
        if ok:
            self.logged_in.append(mechanism)
        return AuthResult(success=ok, handled=ok)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert, private


def run(server: Server, **options: Any) -> Iterator[int]:
    port = free_port()
    controller = Controller(server, hostname="127.0.0.1", port=port, **options)
    controller.start()
    try:
        yield port
    finally:
        controller.stop()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def port(server: Server) -> Iterator[int]:
    yield from run(server)


async def started(url: str, **settings: Any) -> Smtp:
    notifier = Smtp("smtp", Smtp.Config.model_validate({"url": url, "sender": SENDER, **settings}))
    await notifier.start(HOST)
    return notifier


async def test_delivers(server: Server, port: int) -> None:
    notifier = await started(f"smtp://127.0.0.1:{port}")
    assert await notifier.deliver(message()) == "2.0.0 kept as 4F2A"
    [(recipients, mail)] = server.taken
    assert recipients == ["alice@example.org"]
    assert server.mail_from == ["share@example.com"]
    assert mail["Subject"] == message().subject
    assert "https://share.example.com/s/" in mail.get_body(("plain",)).get_content()  # type: ignore[union-attr]
    assert server.hellos == {"example.com"}  # not this machine's name


async def test_a_refused_address_is_final(server: Server, port: int) -> None:
    notifier = await started(f"smtp://127.0.0.1:{port}")
    with pytest.raises(NotDelivered) as caught:
        await notifier.deliver(message(to="gone@example.org"))
    assert caught.value.permanent
    assert caught.value.detail == "550 5.1.1 no such user here"
    assert server.taken == []


async def test_a_busy_server_is_not(server: Server, port: int) -> None:
    notifier = await started(f"smtp://127.0.0.1:{port}")
    with pytest.raises(NotDelivered) as caught:
        await notifier.deliver(message(to="greylisted@example.org"))
    assert not caught.value.permanent
    assert caught.value.detail == "451 4.7.1 greylisted, come back"
    await notifier.deliver(message(to="greylisted@example.org"))


@pytest.mark.parametrize(
    ("answer", "permanent"), [("554 5.7.1 looks like spam", True), ("452 4.3.1 disk full", False)]
)
async def test_a_refused_message(server: Server, port: int, answer: str, permanent: bool) -> None:
    server.data_answer = answer
    notifier = await started(f"smtp://127.0.0.1:{port}")
    with pytest.raises(NotDelivered) as caught:
        await notifier.deliver(message())
    assert (caught.value.detail, caught.value.permanent) == (answer, permanent)


async def test_no_server_there() -> None:
    port = free_port()
    notifier = await started(f"smtp://127.0.0.1:{port}")
    with pytest.raises(NotDelivered, match=f"127.0.0.1:{port}") as caught:
        await notifier.deliver(message())
    assert not caught.value.permanent


async def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestpass_plugins.notify.smtp.TIMEOUT_SECONDS", 0.1)
    closed = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        closed.set()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with listener:
        notifier = await started(f"smtp://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        with pytest.raises(NotDelivered) as caught:
            await notifier.deliver(message())
        assert not caught.value.permanent
        async with asyncio.timeout(5):
            await closed.wait()


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
@pytest.mark.parametrize("tls", ["starttls", "tls"])
@pytest.mark.parametrize("password", ["in the URL", "beside it"])
async def test_tls_and_password(
    server: Server, certificate: tuple[Path, Path], tls: str, password: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    options: dict[str, Any] = {"authenticator": server.authenticate, "auth_required": True}
    options |= (
        {"tls_context": context, "require_starttls": True}
        if tls == "starttls"
        else {"ssl_context": context, "auth_require_tls": False}
    )
    # aiosmtpd does not know that the connection is TLS already.
    for port in run_tls(server, **options):
        user = "us%40er:pass%2Fword" if password == "in the URL" else "us%40er"
        settings: dict[str, Any] = {} if password == "in the URL" else {"password": "pass/word"}
        url = f"smtp://{user}@localhost:{port}?tls={tls}"
        notifier = await started(url, ca=str(certificate[0]), **settings)
        await notifier.deliver(message())
        assert len(server.taken) == len(server.logged_in) == 1

        wrong = await started(f"smtp://us%40er:wrong@localhost:{port}?tls={tls}", ca=str(certificate[0]))
        with pytest.raises(NotDelivered, match="refused the user or password") as caught:
            await wrong.deliver(message())
        assert not caught.value.permanent
        assert "wrong" not in caught.value.detail

        distrusting = await started(url, **settings)
        with pytest.raises(NotDelivered, match="certificate") as caught:
            await distrusting.deliver(message())
        assert not caught.value.permanent
    assert len(server.taken) == 1


def run_tls(server: Server, **options: Any) -> Iterator[int]:
    """`Controller` looks whether it runs by connecting to itself, in TLS without checks."""
    port = free_port()
    controller = Controller(server, hostname="localhost", port=port, **options)
    controller.start()
    try:
        yield port
    finally:
        controller.stop()


async def test_no_mail_without_the_starttls_that_was_asked_for(server: Server, port: int) -> None:
    notifier = await started(f"smtp://127.0.0.1:{port}?tls=starttls")
    with pytest.raises(NotDelivered) as caught:
        await notifier.deliver(message())
    assert not caught.value.permanent
    assert server.taken == []


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "user", "password"),
    [
        ("smtp://mail.example.com", "mail.example.com", 587, "starttls", None, None),
        ("smtp://mail.example.com:25?tls=none", "mail.example.com", 25, "none", None, None),
        ("smtp://u:p@mail.example.com:2525", "mail.example.com", 2525, "starttls", "u", "p"),
        ("smtps://u%40x:p%3A%2F%40@mail.example.com", "mail.example.com", 465, "tls", "u@x", "p:/@"),
        ("smtp://mail.example.com?tls=tls", "mail.example.com", 465, "tls", None, None),
        ("smtp://localhost:1025", "localhost", 1025, "none", None, None),
        ("smtp://[::1]:1025", "::1", 1025, "none", None, None),
    ],
)
def test_urls(url: str, host: str, port: int, tls: str, user: str | None, password: str | None) -> None:
    found = parse_url(url)
    assert (found.host, found.port, found.tls, found.user, found.password) == (
        host,
        port,
        tls,
        user,
        password,
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"url": "http://mail.example.com"}, "not of the form smtp://"),
        ({"url": "smtp://"}, "not of the form smtp://"),
        ({"url": "smtp://u:s3cret/x@mail.example.com"}, "encode '/'"),
        ({"url": "smtp://mail.example.com?tls=maybe"}, "tls=maybe is unknown"),
        ({"url": "smtp://mail.example.com?tsl=none"}, "unknown option 'tsl'"),
        ({"url": "smtps://mail.example.com?tls=none"}, "TLS from the first byte"),
        ({"url": "smtp://mail.example.com:99999"}, "port"),
        ({"url": "smtp://u:s3cret@mail.example.com?tls=none"}, "in the clear"),
        ({"url": "smtp://mail.example.com", "password": "s3cret"}, "no user"),
        ({"url": "smtp://mail.example.com", "sender": "nobody"}, "is not a sender"),
        ({"url": "smtp://mail.example.com", "sender": "a@example.com, b@example.com"}, "is not a sender"),
        ({"url": "smtp://mail.example.com", "sender": "A\r\nBcc: x <a@example.com>"}, "control character"),
        ({"url": "smtp://mail.example.com", "sender": "ä@example.com"}, "ASCII"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Smtp.Config.model_validate({"sender": SENDER, **settings})
    faults = caught.value.errors(include_url=False, include_input=False)
    assert why in faults[0]["msg"]
    assert "s3cret" not in str(faults[0]["msg"])


# ── outbox ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    config = Outbox.Config.model_validate({"folder": "mail/out"}, context={"folder": tmp_path})
    notifier = Outbox("outbox", config)
    await notifier.start(HOST)
    yield notifier
    await notifier.stop()


async def test_outbox(outbox: Outbox, tmp_path: Path) -> None:
    receipt = await outbox.deliver(message())
    folder = tmp_path / "mail" / "out"
    [file] = folder.iterdir()
    assert receipt == f"written to {file.name}"
    assert file.name.startswith("20260801T120000.250000Z-invitation-")
    assert file.name.endswith(".eml")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert read(file.read_bytes())["To"] == "alice@example.org"
    await asyncio.gather(*(outbox.deliver(message(kind="../code")) for _ in range(10)))
    assert len(list(folder.iterdir())) == 11
    assert all(f.suffix == ".eml" for f in folder.iterdir())


async def test_an_outbox_that_cannot_be_written(outbox: Outbox, tmp_path: Path) -> None:
    folder = tmp_path / "mail" / "out"
    folder.rmdir()
    with pytest.raises(NotDelivered, match="No such file") as caught:
        await outbox.deliver(message())
    assert not caught.value.permanent
    folder.write_text("in the way")
    with pytest.raises(OSError, match="exists"):
        await outbox.start(HOST)


# ── All of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_from_the_share_to_the_mailbox(server: Server, port: int, tmp_path: Path) -> None:
    """The recipient gets their link, the greylisted one a little later, and the owner sees who bounced."""
    over: asyncio.Queue[Event] = asyncio.Queue()
    notifiers: list[Notifier] = [await started(f"smtp://127.0.0.1:{port}")]
    async with world(tmp_path) as w:
        courier = Courier(w.store, notifiers, emit=over.put_nowait, first_retry=0.01)
        w.clock.at = datetime.now(UTC).timestamp()
        await courier.start()
        made = await w.service.create(
            new("alice@example.org", "gone@example.org", "greylisted@example.org", name="Boiler 3, “hall” 🏭")
        )
        async with asyncio.timeout(20):
            outcomes = {(e.actor, e.type) for e in [await over.get() for _ in range(3)]}
        await courier.stop()
        assert outcomes == {
            ("alice@example.org", "mail.sent"),
            ("gone@example.org", "mail.bounced"),
            ("greylisted@example.org", "mail.sent"),
        }
        shown = {
            r.email: (r.delivery, r.delivery_detail) for r in (await w.service.get(made.share.id)).recipients
        }
        assert shown["gone@example.org"] == (Delivery.BOUNCED, "550 5.1.1 no such user here")
        assert shown["alice@example.org"] == (Delivery.SENT, "2.0.0 kept as 4F2A")
        for recipients, mail in server.taken:
            assert mail["Subject"] == "Olga Owner shared “Boiler 3, “hall” 🏭” with you"
            assert made.links[recipients[0]] in mail.get_body(("plain",)).get_content()  # type: ignore[union-attr]
