"""A small ACME server of our own (RFC 8555): accounts, orders, authorizations, http-01 and dns-01 that are really
looked up, certificates by a CA that nobody trusts. `faults` make it misbehave.

Signatures, nonces and URLs of what clients send are checked here with `cryptography` alone, so that the client's
library is not judged by itself."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import json
import secrets
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

KEY = web.RequestKey("key", ec.EllipticCurvePublicKey)


def unpad(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Problem(Exception):
    """RFC 7807, as the client gets it."""

    def __init__(self, kind: str, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.status = status

    def as_json(self) -> dict[str, Any]:
        return {
            "type": f"urn:ietf:params:acme:error:{self.kind}",
            "detail": self.detail,
            "status": self.status,
        }


@dataclass
class Account:
    key: ec.EllipticCurvePublicKey
    thumbprint: str
    contact: list[str]


@dataclass
class Order:
    id: str
    host: str
    account: str
    token: str = field(default_factory=lambda: base64url(secrets.token_bytes(24)))
    status: str = "pending"
    authorization: str = "pending"
    problem: Problem | None = None
    chain: str = ""


class AcmeServer:
    """`async with AcmeServer(plain=PORT)`: http-01 is looked up at 127.0.0.1:PORT, dns-01 in the file `zone`."""

    def __init__(
        self, *, plain: int = 0, zone: Path | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.plain = plain
        self.zone = zone
        self.tls = tls
        self.lifetime = datetime.timedelta(days=90)
        self.faults: set[str] = set()
        self.accounts: dict[str, Account] = {}
        self.orders: dict[str, Order] = {}
        self.seen: Counter[str] = Counter()
        """Requests by what they were for."""
        self.looked_up: list[str] = []
        self.now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)
        self.url = ""
        self._nonces: set[str] = set()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._runner: web.AppRunner | None = None

    @property
    def directory(self) -> str:
        return f"{self.url}/directory"

    async def __aenter__(self) -> AcmeServer:
        app = web.Application()
        app.router.add_get("/directory", self._directory)
        app.router.add_route("HEAD", "/nonce", self._nonce)
        for name in ("account", "order", "order-state", "authorization", "challenge", "finalize", "chain"):
            handler = getattr(self, f"_{name.replace('-', '_')}")
            app.router.add_post(f"/{name}", self._signed(name, handler))
            app.router.add_post(f"/{name}/{{id}}", self._signed(name, handler))
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self.tls)
        await site.start()
        scheme = "http" if self.tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_nonce(self) -> dict[str, str]:
        nonce = base64url(secrets.token_bytes(16))
        self._nonces.add(nonce)
        return {"Replay-Nonce": nonce, "Cache-Control": "no-store"}

    async def _directory(self, request: web.Request) -> web.Response:
        self.seen["directory"] += 1
        if "down" in self.faults:
            return web.Response(status=503, text="down")
        if "nonsense" in self.faults:
            return web.json_response({"newNonce": 3})
        names = {"newNonce": "nonce", "newAccount": "account", "newOrder": "order"}
        return web.json_response({name: f"{self.url}/{path}" for name, path in names.items()})

    async def _nonce(self, request: web.Request) -> web.Response:
        return web.Response(headers=self._new_nonce())

    def _signed(
        self, name: str, handler: Callable[[web.Request, str, Any], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            self.seen[name] += 1
            try:
                if name == "order" and "rate limited" in self.faults:
                    raise Problem("rateLimited", "too many certificates", 429)
                account, payload = self._verified(request, await request.json())
                response = await handler(request, account, payload)
            except Problem as problem:
                response = web.json_response(
                    problem.as_json(), status=problem.status, content_type="application/problem+json"
                )
            response.headers.update(self._new_nonce())
            return response

        return answer

    def _verified(self, request: web.Request, body: Any) -> tuple[str, Any]:
        """(the account's id, the payload). Raises Problem."""
        head = json.loads(unpad(body["protected"]))
        if "bad nonce" in self.faults:
            self.faults.discard("bad nonce")
            raise Problem("badNonce", "once")
        if head["nonce"] not in self._nonces:
            raise Problem("badNonce", "unknown or used")
        self._nonces.discard(head["nonce"])
        if head["url"] != f"{self.url}{request.path}":
            raise Problem("unauthorized", "another URL was signed", 401)
        if head["alg"] != "ES256" or ("jwk" in head) == ("kid" in head):
            raise Problem("malformed", "the header")
        if "jwk" in head:
            jwk = head["jwk"]
            x, y = (int.from_bytes(unpad(jwk[name]), "big") for name in ("x", "y"))
            key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
            canonical = json.dumps({n: jwk[n] for n in ("crv", "kty", "x", "y")}, separators=(",", ":"))
            account = base64url(hashlib.sha256(canonical.encode()).digest())
        else:
            account = head["kid"].rpartition("/")[2]
            if account not in self.accounts:
                raise Problem("accountDoesNotExist", "never heard of it")
            key = self.accounts[account].key
        raw = unpad(body["signature"])
        r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
        try:
            key.verify(
                encode_dss_signature(r, s),
                f"{body['protected']}.{body['payload']}".encode(),
                ec.ECDSA(hashes.SHA256()),
            )
        except InvalidSignature as exc:
            raise Problem("unauthorized", "the signature", 401) from exc
        request[KEY] = key
        return account, json.loads(unpad(body["payload"])) if body["payload"] else None

    # ── resources ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _account(self, request: web.Request, account: str, payload: Any) -> web.Response:
        headers = {"Location": f"{self.url}/account/{account}"}
        if account in self.accounts:
            return web.json_response({"status": "valid"}, headers=headers)
        if not payload.get("termsOfServiceAgreed"):
            raise Problem("userActionRequired", "agree to the terms", 403)
        self.accounts[account] = Account(request[KEY], account, payload.get("contact", []))
        return web.json_response({"status": "valid"}, status=201, headers=headers)

    async def _order(self, request: web.Request, account: str, payload: Any) -> web.Response:
        (identifier,) = payload["identifiers"]
        order = Order(secrets.token_hex(8), identifier["value"], account)
        self.orders[order.id] = order
        headers = {"Location": f"{self.url}/order-state/{order.id}"}
        return web.json_response(self._shown(order), status=201, headers=headers)

    async def _order_state(self, request: web.Request, account: str, payload: Any) -> web.Response:
        return web.json_response(self._shown(self._found(request, account)))

    def _found(self, request: web.Request, account: str) -> Order:
        order = self.orders.get(request.match_info["id"])
        if order is None or order.account != account:
            raise Problem("unauthorized", "not yours", 403)
        return order

    def _shown(self, order: Order) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "status": order.status,
            "identifiers": [{"type": "dns", "value": order.host}],
            "authorizations": [f"{self.url}/authorization/{order.id}"],
            "finalize": f"{self.url}/finalize/{order.id}",
        }
        if order.status == "valid":
            shown["certificate"] = f"{self.url}/chain/{order.id}"
        if order.problem is not None:
            shown["error"] = order.problem.as_json()
        return shown

    async def _authorization(self, request: web.Request, account: str, payload: Any) -> web.Response:
        order = self._found(request, account)
        challenges = [self._challenge_shown(order, typ) for typ in ("http-01", "dns-01")]
        if order.host.startswith("*."):
            del challenges[0]
        shown = {
            "status": order.authorization,
            "identifier": {"type": "dns", "value": order.host.removeprefix("*.")},
            "challenges": challenges,
        }
        return web.json_response(shown)

    def _challenge_shown(self, order: Order, typ: str) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "type": typ,
            "url": f"{self.url}/challenge/{order.id}:{typ}",
            "token": order.token,
            "status": order.authorization,
        }
        if order.problem is not None:
            shown["error"] = order.problem.as_json()
        return shown

    async def _challenge(self, request: web.Request, account: str, payload: Any) -> web.Response:
        name, _, typ = request.match_info["id"].partition(":")
        order = self.orders[name]
        expected = f"{order.token}.{self.accounts[account].thumbprint}"
        look = self._look_http if typ == "http-01" else self._look_dns
        try:
            await look(order, expected)
            order.authorization, order.status = "valid", "ready"
        except Problem as problem:
            order.authorization, order.status, order.problem = "invalid", "invalid", problem
        headers = {"Link": f'<{self.url}/authorization/{order.id}>;rel="up"'}
        return web.json_response(self._challenge_shown(order, typ), headers=headers)

    async def _look_http(self, order: Order, expected: str) -> None:
        path = f"/.well-known/acme-challenge/{order.token}"
        if "changed token" in self.faults:
            expected = "x" + expected
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session:
                url = f"http://127.0.0.1:{self.plain}{path}"
                async with session.get(url, headers={"Host": order.host}, allow_redirects=False) as found:
                    self.looked_up.append(f"{order.host}{path}")
                    text = await found.text()
        except aiohttp.ClientError as exc:
            raise Problem("connection", f"{order.host} cannot be reached") from exc
        if found.status != 200 or text.strip() != expected:
            raise Problem("unauthorized", f"{order.host} answered {found.status}")

    async def _look_dns(self, order: Order, expected: str) -> None:
        name = f"_acme-challenge.{order.host.removeprefix('*.')}"
        self.looked_up.append(name)
        assert self.zone is not None
        zone = json.loads(await asyncio.to_thread(self.zone.read_text)) if self.zone.exists() else {}
        if base64url(hashlib.sha256(expected.encode()).digest()) not in zone.get(name, []):
            raise Problem("dns", f"no TXT record at {name}")

    async def _finalize(self, request: web.Request, account: str, payload: Any) -> web.Response:
        order = self._found(request, account)
        if order.status != "ready":
            raise Problem("orderNotReady", order.status, 403)
        csr = x509.load_der_x509_csr(unpad(payload["csr"]))
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if not csr.is_signature_valid or names.get_values_for_type(x509.DNSName) != [order.host]:
            raise Problem("badCSR", "the names")
        if "refused order" in self.faults:
            order.status, order.problem = "invalid", Problem("rejectedIdentifier", "not this one")
        else:
            order.status, order.chain = "valid", self._issue(csr, order.host)
        return web.json_response(self._shown(order))

    async def _chain(self, request: web.Request, account: str, payload: Any) -> web.Response:
        order = self._found(request, account)
        return web.Response(text=order.chain, content_type="application/pem-certificate-chain")

    def _issue(self, csr: x509.CertificateSigningRequest, host: str) -> str:
        if "garbage" in self.faults:
            return "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        key: Any = csr.public_key()
        if "another key" in self.faults:
            key = ec.generate_private_key(ec.SECP256R1()).public_key()
        if "another host" in self.faults:
            host = "evil.example"
        begins = self.now() - datetime.timedelta(minutes=5)
        if "expired" in self.faults:
            begins -= self.lifetime + datetime.timedelta(days=1)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A small CA")])
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + self.lifetime)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return leaf.public_bytes(serialization.Encoding.PEM).decode()
