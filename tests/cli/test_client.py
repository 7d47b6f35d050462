"""What can be wrong on the way to an edge is said in words, with the next step."""

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest

from guestpass.cli.client import Client, edge_url
from guestpass.errors import EdgeUnreachable, GuestpassError, Unauthorized
from guestpass.local_ca import write_certificates

KEY = "gpk_test"


class Answer(http.server.BaseHTTPRequestHandler):
    """A web server that is whatever a test says."""

    status = 200
    body = b"{}"
    more: ClassVar[list[bytes]] = []  # bodies that come first
    fields: ClassVar[dict[str, str]] = {}
    requests: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.requests.append((self.path, dict(self.headers), self.rfile.read(length)))
        body = self.more.pop(0) if self.more else self.body
        self.send_response(self.status)
        for name, value in self.fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(tls: ssl.SSLContext | None = None, **about: object) -> Iterator[tuple[int, type[Answer]]]:
    handler = type("Handler", (Answer,), {**about, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda request, client_address: (
        None
    )  # a refused handshake is what the test is about
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1], handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refused(edge: str, **options: object) -> EdgeUnreachable:
    with pytest.raises(EdgeUnreachable) as caught:
        Client(edge, KEY, timeout=5, **options).get("/shares")
    return caught.value


def test_requests_carry_the_key_and_json():
    with serving(body=b'{"id": "x"}') as (port, seen):
        assert Client(f"http://127.0.0.1:{port}", KEY).post("/shares", {"name": "ü"}) == {"id": "x"}
    path, fields, body = seen.requests[0]
    assert path == "/api/v1/shares"
    assert fields["Authorization"] == f"Bearer {KEY}"
    assert fields["Content-Type"] == "application/json"
    assert len(fields["Idempotency-Key"]) >= 32
    assert json.loads(body) == {"name": "ü"}


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("post", "/shares", 2),
        ("post", "/shares/x/resend", 1),
        ("post", "/shares/x/tokens", 1),
        ("get", "/shares", 2),
    ],
)
def test_what_cannot_be_repeated_is_sent_once(method, path, sent):
    """The connection breaks when the request has been read and before the answer."""

    def answer(self: Answer) -> None:
        self.requests.append((self.path, dict(self.headers), b""))
        self.close_connection = True

    with serving(do_GET=answer, do_POST=answer) as (port, handler):
        client = Client(f"http://127.0.0.1:{port}", KEY)
        with pytest.raises(EdgeUnreachable):
            client.get(path) if method == "get" else client.post(path, {})
        assert len(handler.requests) == sent


def test_problem_details_become_errors():
    problem = {
        "type": "about:blank",
        "title": "Gone",
        "status": 410,
        "detail": "it ended",
        "code": "share_ended",
    }
    with serving(status=410, body=json.dumps({**problem, "hint": "Make another."}).encode()) as (port, _):
        with pytest.raises(GuestpassError) as caught:
            Client(f"http://127.0.0.1:{port}", KEY).delete("/shares/x")
    assert caught.value.as_json() == {"code": "share_ended", "message": "it ended", "hint": "Make another."}
    assert caught.value.exit_status == 1


def test_a_wrong_key():
    problem = {"status": 401, "detail": "the API key is not right", "code": "unauthorized"}
    with serving(status=401, body=json.dumps(problem).encode()) as (port, _):
        with pytest.raises(Unauthorized) as caught:
            Client(f"http://127.0.0.1:{port}", KEY).get("/shares")
    assert "GUESTPASS_API_KEY" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (404, b"not here"), (200, b"[]"), (502, b'{"a": 1}')]
)
def test_what_is_no_edge(status, body):
    with serving(status=status, body=body) as (port, _):
        error = refused(f"http://127.0.0.1:{port}")
    assert f"not like the management API of an edge (status {status})" in error.message
    assert error.error_code == "edge_unreachable"


def test_redirects_are_not_followed():
    with serving() as (other, seen):
        elsewhere = {"Location": f"http://127.0.0.1:{other}/api/v1/shares"}
        with serving(status=302, fields=elsewhere) as (port, _):
            error = refused(f"http://127.0.0.1:{port}")
    assert error.message.endswith(f"redirects to http://127.0.0.1:{other}")
    assert seen.requests == []


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving() as (port, _):
        assert Client(f"http://127.0.0.1:{port}", KEY).get("/shares") == {}


def test_nothing_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = refused(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "nothing listens at" in error.message
    assert error.hint


def test_an_unknown_name():
    assert "the name no-such-host.invalid is not known" in refused("http://no-such-host.invalid").message


def test_tls_is_spoken_to_a_plain_server():
    with serving() as (port, _):
        error = refused(f"https://127.0.0.1:{port}")
    assert "does not speak TLS" in error.message


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    ca, cert, key = write_certificates(tmp_path_factory.mktemp("tls"), ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, ca


def test_plain_http_is_spoken_to_a_tls_server(certificates):
    with serving(certificates[0]) as (port, _):
        error = refused(f"http://localhost:{port}")
    assert "closed the connection without an answer" in error.message
    assert "https://" in error.hint


def test_a_ca_of_ones_own(certificates):
    context, ca = certificates
    with serving(context, body=b'{"a": 1}') as (port, _):
        assert Client(f"https://localhost:{port}", KEY, ca=ca).get("/shares") == {"a": 1}


def test_a_wrong_ca(certificates):
    with serving(certificates[0]) as (port, _):
        error = refused(f"https://localhost:{port}")
    assert "certificate of localhost is not accepted" in error.message
    assert "--ca" in error.hint


def test_a_wrong_name(certificates):
    context, ca = certificates
    with serving(context) as (port, _):
        error = refused(f"https://127.0.0.1:{port}", ca=ca)
    assert "not accepted" in error.message
    assert "name that stands in the certificate" in error.hint


def test_every_page_of_a_listing():
    pages = [
        b'{"shares": [{"id": "a"}, {"id": "b"}], "next": "2"}',
        b'{"shares": [{"id": "c"}], "next": null}',
    ]
    with serving(more=pages) as (port, seen):
        found = list(Client(f"http://127.0.0.1:{port}", KEY).pages("/shares", "shares", include_ended="true"))
    assert [item["id"] for item in found] == ["a", "b", "c"]
    assert [path.partition("?")[2] for path, _, _ in seen.requests] == [
        "include_ended=true",
        "cursor=2&include_ended=true",
    ]


def test_the_edge_from_the_environment(monkeypatch):
    monkeypatch.setenv("GUESTPASS_EDGE", "https://share.example.com/")
    assert edge_url(None) == "https://share.example.com"
    assert edge_url("http://localhost:8080") == "http://localhost:8080"
