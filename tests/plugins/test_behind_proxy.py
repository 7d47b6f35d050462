"""`trusted-header` and `client-certificate`: who is believed, and what applications never see."""

from __future__ import annotations

import base64
import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import ValidationError
from support.people import ALICE, people, plugin, usual
from support.served import serving
from support.stack import running

from guestpass.plugin import Authenticator, Client, Denied, Form, Identity, SignIn
from guestpass_plugins.authenticate.client_certificate import ClientCertificate
from guestpass_plugins.authenticate.trusted_header import TrustedHeader

HOST: Any = SimpleNamespace(logger=logging.getLogger("test"), now=time.time)
NETWORKS = ["10.1.0.0/16", "::1"]
Headers = Sequence[tuple[str, str]]


async def nobody(email: str) -> bool:
    return False


def sign_in(headers: Headers, peer: str = "10.1.2.3") -> SignIn:
    return SignIn("f1", None, Client("203.0.113.9"), {}, "", nobody, headers=headers, peer=peer)


async def who(authenticator: Authenticator, headers: Headers, peer: str = "10.1.2.3") -> str | None:
    """The address that it proves; None when it refuses, which both steps must do."""
    found: list[Any] = []
    for step in (lambda s: authenticator.begin(s), lambda s: authenticator.complete(s, {})):
        try:
            found.append(step(sign_in(headers, peer)))
        except Denied:
            found.append(None)
    shown, proven = found
    if proven is None:
        assert shown is None
        return None
    assert isinstance(shown, Form)  # a GET proves nothing yet
    assert isinstance(proven, Identity)
    assert proven.email in shown.intro
    return proven.email


# ── trusted-header ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "peer", "expected"),
    [
        ([("X-Auth-Request-Email", ALICE)], "10.1.2.3", ALICE),
        ([("x-auth-request-email", " Alice@Example.org ")], "::1", ALICE),
        ([("X-Auth-Request-Email", ALICE)], "::ffff:10.1.2.3", ALICE),
        ([("X-Auth-Request-Email", ALICE)], "10.2.0.1", None),
        ([("X-Auth-Request-Email", ALICE)], "", None),
        ([("X-Auth-Request-Email", ALICE)], "unix", None),
        # What a visitor writes beside the proxy's own word must not win, in whatever spelling.
        ([("X-Auth-Request-Email", ALICE), ("X-Auth-Request-Email", "eve@example.org")], "10.1.2.3", None),
        ([("X-Auth-Request-Email", ALICE), ("X_Auth_Request_Email", "eve@example.org")], "10.1.2.3", None),
        # Nor when the proxy says nothing, having removed the field under its own name only.
        ([("X_Auth_Request_Email", ALICE)], "10.1.2.3", None),
        ([("X-Auth_Request-Email", ALICE)], "10.1.2.3", None),
        ([("X-Forwarded-For", "10.1.2.3"), ("X-Auth-Request-Email", ALICE)], "203.0.113.9", None),
        ([("X-Auth-Request-Email", "")], "10.1.2.3", None),
        ([("X-Auth-Request-Email", f"{ALICE},eve@example.org")], "10.1.2.3", None),
        ([("X-Auth-Request-Email", "alice")], "10.1.2.3", None),
        ([], "10.1.2.3", None),
    ],
)
async def test_trusted_header(headers: Headers, peer: str, expected: str | None) -> None:
    chosen = plugin(TrustedHeader, "proxy", networks=NETWORKS)
    assert isinstance(chosen, TrustedHeader)
    await chosen.start(HOST)
    assert await who(chosen, headers, peer) == expected


async def test_a_prefix() -> None:
    settings = {"header": "X-Goog-Authenticated-User-Email", "prefix": "accounts.google.com:"}
    chosen = plugin(TrustedHeader, "iap", networks=NETWORKS, **settings)
    assert isinstance(chosen, TrustedHeader)
    await chosen.start(HOST)
    name = settings["header"]
    assert await who(chosen, [(name, f"accounts.google.com:{ALICE}")]) == ALICE
    assert await who(chosen, [(name, ALICE)]) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "networks"),
        ({"networks": []}, "at least 1"),
        ({"networks": ["everywhere"]}, "write it like"),
        ({"networks": NETWORKS, "header": "X Y"}, "is not a name"),
        ({"networks": NETWORKS, "header": "X_Y"}, "is not a name"),
        ({"networks": NETWORKS, "header": "From"}, "for other reasons"),
    ],
)
def test_settings_that_are_refused(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        plugin(TrustedHeader, "proxy", **settings)


async def test_signing_in_by_the_proxy(tmp_path: Path) -> None:
    chosen = plugin(TrustedHeader, "company", networks=["127.0.0.0/8"], header="X-Company-User")
    async with people(tmp_path, plugins={**usual(), "authenticate": [chosen]}) as edge:
        share, _ = await edge.share()
        start = f"{edge.origins.share_origin(share.id)}/"
        inside = edge.browser(**{"X-Company-User": ALICE})
        page = await inside.follow(await inside.get(start, **{"Sec-Fetch-Mode": "navigate"}))
        assert f"You are {ALICE}." in page.text
        assert not await edge.service.sessions()
        await inside.follow(await inside.submit(page))
        (session,) = await edge.service.sessions()
        assert (session.email, session.provider) == (ALICE, "company")
        outside = edge.browser()
        page = await outside.follow(await outside.get(start, **{"Sec-Fetch-Mode": "navigate"}))
        assert page.status == 403
        assert len(await edge.service.sessions()) == 1


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_applications_do_not_see_the_field(tmp_path: Path, lane: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(
            text=" ".join(sorted(k.lower() for k in request.headers if "company" in k.lower()))
        )

    app = web.Application()
    app.router.add_get("/", answer)
    section = {"use": "trusted-header", "networks": ["192.0.2.0/24"], "header": "X-Company-User"}
    config = {"authenticate": [section, {"use": "bearer-token"}]}
    async with serving(app) as url, running(tmp_path, url, config=config, lane=lane) as stack:
        sent = {"X-Company-User": "a", "x_company_user": "b", "X-Company_User": "c", "X-Company-Users": "d"}
        response = await stack.get("/", headers=sent)
        assert response.body == b"x-company-users"
        assert stack.answered(lane) >= 1


# ── client-certificate ───────────────────────────────────────────────────────────────────────────────────────────────


class Authority:
    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(*(False,) * 5, True, True, False, False)
        self.certificate = (
            self._builder(self.name, self.key.public_key(), days=30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(
        self, subject: x509.Name, key: Any, *, days: float, since: float = -1
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=since))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    def leaf(
        self,
        *names: x509.GeneralName,
        days: float = 10,
        since: float = -1,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    ) -> x509.Certificate:
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        subject = x509.Name([x509.NameAttribute(NameOID.EMAIL_ADDRESS, ALICE)])
        builder = self._builder(subject, key, days=days, since=since)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


OURS, THEIRS = Authority("Ours"), Authority("Ours")
MAIL, OTHER_MAIL, DNS = x509.RFC822Name(ALICE), x509.RFC822Name("eve@example.org"), x509.DNSName("a.example")


def rfc9440(certificate: x509.Certificate) -> str:
    return f":{base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()}:"


def pem(certificate: x509.Certificate) -> str:
    return quote(certificate.public_bytes(Encoding.PEM).decode(), safe="")


CERTIFICATES = {
    "good": (OURS.leaf(MAIL), ALICE),
    "with a name besides": (OURS.leaf(MAIL, DNS), ALICE),
    "another authority of that name": (THEIRS.leaf(MAIL), None),
    "expired": (OURS.leaf(MAIL, days=-0.5), None),
    "not yet valid": (OURS.leaf(MAIL, since=1), None),
    "of a server": (OURS.leaf(MAIL, usage=ExtendedKeyUsageOID.SERVER_AUTH), None),
    "two addresses": (OURS.leaf(MAIL, OTHER_MAIL), None),
    "no address": (OURS.leaf(DNS), None),
    "an address in the subject only": (OURS.leaf(), None),
    "the authority's own": (OURS.certificate, None),
}


class Odd:
    """A certificate that cannot be made, only written: the library raises of several kinds when it reads it."""

    def __init__(self, old: bytes, new: bytes) -> None:
        self._old, self._new = old, new

    def public_bytes(self, encoding: Encoding) -> bytes:
        der = CERTIFICATES["good"][0].public_bytes(Encoding.DER)
        assert self._old in der
        der = der.replace(self._old, self._new, 1)
        if encoding is Encoding.DER:
            return der
        text = base64.encodebytes(der)
        return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"


ODD: tuple[Any, ...] = (
    Odd(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x63"),  # a version that there is not
    Odd(b"\x06\x03\x55\x1d\x25", b"\x06\x03\x55\x1d\x11"),  # two extensions of a kind
)


@pytest.mark.parametrize("form", ["rfc9440", "pem"])
async def test_client_certificates(tmp_path: Path, form: str) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(OURS.certificate.public_bytes(Encoding.PEM))
    chosen = plugin(ClientCertificate, "badge", networks=NETWORKS, ca=ca, format=form)
    assert isinstance(chosen, ClientCertificate)
    await chosen.start(HOST)
    written = rfc9440 if form == "rfc9440" else pem
    for what, (certificate, expected) in CERTIFICATES.items():
        assert await who(chosen, [("Client-Cert", written(certificate))]) == expected, what
    good = written(CERTIFICATES["good"][0])
    for value in (
        "",
        "::",
        ":AAAA:",
        ":!:",
        "-----BEGIN CERTIFICATE-----",
        good + good,
        good[:-9] + "AAAAAAAA:",
        *(written(c) for c in ODD),
    ):
        assert await who(chosen, [("Client-Cert", value)]) is None, value
    # A certificate is no secret: only the proxy's own field says that the visitor has its key.
    assert await who(chosen, [("Client_Cert", good)]) is None
    assert await who(chosen, [("Client-Cert", good), ("Client_Cert", good)]) is None
    assert await who(chosen, [("Client-Cert", good)], "203.0.113.9") is None
    assert tuple(chosen.private_headers) == ("Client-Cert", "Client-Cert-Chain")


async def test_an_intermediate_authority(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(OURS.certificate.public_bytes(Encoding.PEM))
    middle = Authority("Middle")
    signed = (
        OURS._builder(middle.name, middle.key.public_key(), days=20)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(*(False,) * 5, True, True, False, False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(OURS.key.public_key()), critical=False
        )
        .sign(OURS.key, hashes.SHA256())
    )
    chosen = plugin(ClientCertificate, "badge", networks=NETWORKS, ca=ca)
    assert isinstance(chosen, ClientCertificate)
    await chosen.start(HOST)
    leaf = ("Client-Cert", rfc9440(middle.leaf(MAIL)))
    assert await who(chosen, [leaf]) is None
    assert await who(chosen, [leaf, ("Client-Cert-Chain", rfc9440(signed))]) == ALICE
