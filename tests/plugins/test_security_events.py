"""`security-events` in a running edge, pushed to as a transmitter does (RFC 8935), and by people who are none."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import orjson
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from support.people import plugin
from support.scoreboard import row
from support.served import serving
from support.stack import EMAIL, Stack, running

from guestpass.model import Identity, SessionKind
from guestpass.plugin import Client
from guestpass_plugins.revoke import security_events as module
from guestpass_plugins.revoke.security_events import SecurityEvents

ISSUER = "https://idp.example.com"
AUDIENCE = "https://share.example.com"
HOOK = "/.guestpass/hooks/security-events"
CAEP = "https://schemas.openid.net/secevent/caep/event-type/"
RISC = "https://schemas.openid.net/secevent/risc/event-type/"
SSF = "https://schemas.openid.net/secevent/ssf/event-type/"

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
STRANGER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
NEXT = ec.generate_private_key(ec.SECP256R1())


def jwk(algorithm: Any, key: Any, key_id: str) -> dict[str, Any]:
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "use": "sig"}


@dataclass
class Transmitter:
    """Its keys, and a running edge that listens to it."""

    keys: list[dict[str, Any]] = field(
        default_factory=lambda: [
            jwk(RSAAlgorithm, RSA, "rsa"),
            jwk(ECAlgorithm, EC, "ec"),
            jwk(OKPAlgorithm, ED, "ed"),
        ]
    )
    up: bool = True
    asked: int = 0
    stack: Stack | None = None

    async def jwks(self, request: web.Request) -> web.Response:
        self.asked += 1
        if not self.up:
            return web.Response(status=500)
        return web.json_response({"keys": self.keys})

    async def push(self, body: str | bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        assert self.stack is not None
        fields = {
            "Host": f"localhost:{self.stack.port}",
            "Content-Type": "application/secevent+jwt",
            **headers,
        }
        async with self.stack.session.post(self.stack.url(HOOK), data=body, headers=fields) as response:
            text = await response.read()
            is_json = response.content_type == "application/json"
            return response.status, orjson.loads(text) if is_json and text else {}


def claims(kind: str = f"{CAEP}session-revoked", **changes: Any) -> dict[str, Any]:
    """`None` removes a claim."""
    found = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": int(time.time()),
        "jti": uuid.uuid4().hex,
        "sub_id": {"format": "email", "email": EMAIL},
        "events": {kind: {}},
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def token(
    payload: Mapping[str, Any] | None = None, key: Any = RSA, algorithm: str = "RS256", **head: Any
) -> str:
    header = {"typ": "secevent+jwt", "kid": "rsa", **head}
    # Not `jwt.encode`: that refuses to sign some of what is tried here.
    return jwt.api_jws.encode(orjson.dumps(payload or claims()), key, algorithm=algorithm, headers=header)


@contextlib.asynccontextmanager
async def receiving(folder: Path, **settings: Any) -> AsyncIterator[Transmitter]:
    transmitter = Transmitter()
    app = web.Application()
    app.router.add_get("/jwks", transmitter.jwks)

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 100)
                await asyncio.sleep(0.05)
        return response

    app.router.add_get("/{tail:.*}", endless)
    async with serving(app) as url:
        section = {
            "use": "security-events",
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "jwks_url": f"{url}/jwks",
            "provider": "google",
            **settings,
        }
        async with running(folder, url, config={"revoke": [section]}) as transmitter.stack:
            yield transmitter


@pytest.fixture
async def transmitter(tmp_path: Path) -> AsyncIterator[Transmitter]:
    async with receiving(tmp_path) as found:
        yield found


async def sign_in(stack: Stack, share: str) -> Mapping[str, str]:
    """A browser's session; the header that it sends."""
    _, secret = await stack.edge.service.open_session(
        share, EMAIL, SessionKind.COOKIE, "email-code", Client("::1")
    )
    return {"Cookie": f"__Host-guestpass={secret}", "Host": f"{share}.localhost:{stack.port}"}


async def watching(stack: Stack, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
    response = await stack.session.get(stack.url("/live"), headers=headers)
    assert response.status == 200
    await response.content.readexactly(10)
    return response


async def is_cut(response: aiohttp.ClientResponse) -> bool:
    """Whether it ends; a second is what a stream that lives on gets to show it."""
    try:
        async with asyncio.timeout(1):
            while await response.content.readany():
                pass
    except TimeoutError:
        return False
    except aiohttp.ClientError:
        return True
    return True


async def admitted(stack: Stack, headers: Mapping[str, str]) -> bool:
    async with stack.session.get(stack.url("/live"), headers=headers, allow_redirects=False) as response:
        return response.status == 200


# ── what is carried out ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_session_revoked_ends_browsers_on_all_shares(transmitter: Transmitter) -> None:
    stack = transmitter.stack
    assert stack is not None
    browsers = [await sign_in(stack, share) for share in (stack.share_id, await stack.new_share())]
    open_ones = [await watching(stack, headers) for headers in browsers]
    script = await watching(stack, {"Host": stack.host, **stack.authorization})
    proven = time.time()
    assert await transmitter.push(token()) == (202, {})
    # Answered means done.
    assert not [s for s in await stack.edge.service.sessions() if s.kind is SessionKind.COOKIE]
    assert all([await is_cut(response) for response in open_ones])
    assert not await is_cut(script)  # a token of the owner's making is not the provider's session
    script.close()
    for headers in browsers:
        assert not await admitted(stack, headers)
    assert not await stack.edge.service.proofs.holds(EMAIL, proven)
    assert await admitted(stack, await sign_in(stack, stack.share_id))  # who proves the address anew


async def test_a_disabled_account_is_refused_until_it_is_enabled(transmitter: Transmitter) -> None:
    stack = transmitter.stack
    assert stack is not None
    browser = await sign_in(stack, stack.share_id)
    script = {"Host": stack.host, **stack.authorization}
    open_ones = [await watching(stack, headers) for headers in (browser, script)]
    assert (await transmitter.push(token(claims(f"{RISC}account-disabled"))))[0] == 202
    assert all([await is_cut(response) for response in open_ones])
    fresh = await sign_in(stack, stack.share_id)
    assert not await admitted(stack, fresh)
    assert (await transmitter.push(token(claims(f"{RISC}account-enabled"))))[0] == 202
    assert await admitted(stack, fresh)


async def test_an_older_word_does_not_undo_a_newer_one(transmitter: Transmitter) -> None:
    """A transmitter that got no answer sends again, perhaps after it has sent what came later."""
    stack, now = transmitter.stack, int(time.time())
    assert stack is not None
    browser = await sign_in(stack, stack.share_id)
    for kind, issued, admits in (
        ("account-enabled", now - 60, True),
        ("account-disabled", now - 30, False),
        ("account-enabled", now - 60, False),
        ("account-disabled", now - 90, False),
        ("account-enabled", now - 60, False),
        ("account-enabled", now - 10, True),
        ("account-disabled", now - 30, True),
        ("account-disabled", now - 5, False),
    ):
        assert (await transmitter.push(token(claims(f"{RISC}{kind}", iat=issued))))[0] == 202
        if admits and kind == "account-disabled":
            continue  # its sessions have ended all the same
        browser = await sign_in(stack, stack.share_id)
        assert await admitted(stack, browser) == admits, (kind, now - issued)


SUBJECTS: list[tuple[Any, bool]] = [
    ({"format": "email", "email": "Alice@Example.org"}, True),
    ({"format": "email", "email": "bob@example.org"}, False),
    ({"format": "iss_sub", "iss": ISSUER, "sub": "1234"}, True),
    (
        {"subject_type": "iss-sub", "iss": ISSUER, "sub": "1234"},
        True,
    ),  # before RFC 9493, as Google says it
    ({"format": "iss_sub", "iss": "https://other.example", "sub": "1234"}, False),
    ({"format": "iss_sub", "iss": ISSUER, "sub": "99"}, False),
    (
        {
            "format": "complex",
            "user": {"format": "email", "email": EMAIL},
            "session": {"format": "opaque"},
        },
        True,
    ),
    (
        {"format": "aliases", "identifiers": [{"format": "opaque"}, {"format": "email", "email": EMAIL}]},
        True,
    ),
    ({"format": "phone_number", "phone_number": "+1"}, False),
    ("alice@example.org", False),
    (None, False),
]


async def test_subjects(transmitter: Transmitter) -> None:
    stack = transmitter.stack
    assert stack is not None
    await stack.edge.service.proofs.remember(Identity(EMAIL, "google", "1234", time.time()))
    for subject, ends in SUBJECTS:
        browser = await sign_in(stack, stack.share_id)
        assert (await transmitter.push(token(claims(sub_id=subject))))[0] == 202
        assert await admitted(stack, browser) != ends, subject


@pytest.mark.parametrize("issuer", [ISSUER, ISSUER + "/"])
async def test_a_subject_of_oidc(tmp_path: Path, issuer: str) -> None:
    """That authenticator knows people by issuer and subject; Google's transmitter writes its issuer with a slash."""
    async with receiving(tmp_path, issuer=issuer, provider="google") as transmitter:
        stack = transmitter.stack
        assert stack is not None
        await stack.edge.service.proofs.remember(Identity(EMAIL, "google", f"{ISSUER} 1234", time.time()))
        for subject, ends in (("1234", True), ("99", False)):
            browser = await sign_in(stack, stack.share_id)
            found = {"format": "iss_sub", "iss": issuer, "sub": subject}
            assert (await transmitter.push(token(claims(iss=issuer, sub_id=found))))[0] == 202
            assert await admitted(stack, browser) != ends, subject


HARMLESS: list[dict[str, Any]] = [
    {f"{SSF}verification": {"state": "abc"}},
    {f"{SSF}stream-updated": {"status": "enabled"}},
    {f"{CAEP}credential-change": {"change_type": "create"}},
    {f"{CAEP}token-claims-change": {"claims": {}}},
    {"https://example.com/something-new": {}},
]


async def test_what_ends_nothing_is_acknowledged(transmitter: Transmitter) -> None:
    assert transmitter.stack is not None
    browser = await sign_in(transmitter.stack, transmitter.stack.share_id)
    for event in HARMLESS:
        assert await transmitter.push(token(claims(events=event))) == (202, {})
        assert await admitted(transmitter.stack, browser), event


async def test_a_token_that_comes_again_ends_nothing_again(transmitter: Transmitter) -> None:
    stack = transmitter.stack
    assert stack is not None
    signed = token()
    assert [(await transmitter.push(signed))[0] for _ in range(2)] == [202, 202]
    browser = await sign_in(stack, stack.share_id)
    assert (await transmitter.push(signed))[0] == 202
    assert await admitted(stack, browser)


async def test_keys_of_every_kind(transmitter: Transmitter) -> None:
    for key, algorithm, key_id in ((RSA, "PS256", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")):
        assert (await transmitter.push(token(None, key, algorithm, kid=key_id)))[0] == 202
    assert transmitter.asked == 1


async def test_keys_are_renewed(transmitter: Transmitter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key is looked for, not oftener than now and then; while the transmitter is down the old ones go on."""
    assert (await transmitter.push(token()))[0] == 202
    transmitter.keys.append(jwk(ECAlgorithm, NEXT, "next"))
    signed = token(None, NEXT, "ES256", kid="next")
    assert (await transmitter.push(signed))[0] == 503  # the keys were read a moment ago: to be sent again
    assert transmitter.asked == 1
    monkeypatch.setattr(module, "JWKS_PAUSE", 0.0)
    assert (await transmitter.push(signed))[0] == 202
    transmitter.up = False
    monkeypatch.setattr(module, "JWKS_SECONDS", 0.0)
    assert (await transmitter.push(token()))[0] == 202


async def test_without_keys_it_asks_to_try_again(transmitter: Transmitter) -> None:
    transmitter.up = False
    assert (await transmitter.push(token()))[0] == 503


async def test_an_agreed_token(tmp_path: Path) -> None:
    async with receiving(tmp_path, token="s3cret") as transmitter:
        for given, status in ((None, 401), ("Bearer wrong", 401), ("Bearer s3cret", 202), ("s3cret", 202)):
            headers = {} if given is None else {"Authorization": given}
            assert (await transmitter.push(token(), **headers))[0] == status


# ── what is not ──────────────────────────────────────────────────────────────────────────────────────────────────────


def unsigned() -> str:
    return jwt.encode(claims(), None, algorithm="none", headers={"typ": "secevent+jwt", "kid": "rsa"})


def with_public_key_as_secret() -> str:
    """RS256 verified as HS256: the classic."""
    secret = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    parts = [{"typ": "secevent+jwt", "kid": "rsa", "alg": "HS256"}, claims()]
    signed = b".".join(jwt.utils.base64url_encode(orjson.dumps(part)) for part in parts)
    signature = jwt.utils.base64url_encode(hmac.digest(secret, signed, "sha256"))
    return f"{signed.decode()}.{signature.decode()}"


def changed() -> str:
    head, _, signature = token().split(".")
    body = jwt.utils.base64url_encode(orjson.dumps(claims())).decode()
    return f"{head}.{body}.{signature}"


HOSTILE: list[tuple[str, Callable[[], str | bytes], str]] = [
    ("alg none", unsigned, "invalid_key"),
    ("a public key as a shared secret", with_public_key_as_secret, "invalid_key"),
    ("another body under the signature", changed, "invalid_key"),
    ("a stranger's key under the same id", lambda: token(None, STRANGER), "invalid_key"),
    ("another key's id", lambda: token(None, RSA, kid="ec"), "invalid_key"),
    ("an ID token", lambda: token(typ="JWT"), "invalid_request"),
    ("an access token", lambda: token(typ="at+jwt"), "invalid_request"),
    ("no typ", lambda: token(typ=None), "invalid_request"),
    ("another issuer", lambda: token(claims(iss="https://evil.example")), "invalid_issuer"),
    ("an issuer that begins alike", lambda: token(claims(iss=ISSUER + ".evil.example")), "invalid_issuer"),
    ("a list of issuers", lambda: token(claims(iss=[ISSUER])), "invalid_issuer"),
    ("another audience", lambda: token(claims(aud="https://other.example")), "invalid_audience"),
    ("no audience in the list", lambda: token(claims(aud=[])), "invalid_audience"),
    ("no aud", lambda: token(claims(aud=None)), "invalid_request"),
    ("no iss", lambda: token(claims(iss=None)), "invalid_request"),
    ("no jti", lambda: token(claims(jti=None)), "invalid_request"),
    ("a jti that is none", lambda: token(claims(jti=7)), "invalid_request"),
    ("an endless jti", lambda: token(claims(jti="x" * 2000)), "invalid_request"),
    ("no iat", lambda: token(claims(iat=None)), "invalid_request"),
    ("of last week", lambda: token(claims(iat=int(time.time()) - 7 * 86_400)), "invalid_request"),
    ("of tomorrow", lambda: token(claims(iat=int(time.time()) + 86_400)), "invalid_request"),
    ("iat true", lambda: token(claims(iat=True)), "invalid_request"),
    ("no events", lambda: token(claims(events=None)), "invalid_request"),
    ("empty events", lambda: token(claims(events={})), "invalid_request"),
    ("events as a list", lambda: token(claims(events=[f"{CAEP}session-revoked"])), "invalid_request"),
    ("an event that is no table", lambda: token(claims(events={f"{CAEP}session-revoked": 1})), "invalid_request"),
    ("a subject of two addresses", lambda: token(claims(sub_id={"format": "email", "email": f"{EMAIL},b@c.d"})),
     "invalid_request"),
    ("expired", lambda: token(claims(exp=int(time.time()) - 10)), "invalid_key"),
    ("no JWT", lambda: "hello", "invalid_request"),
    ("nothing", lambda: b"", "invalid_request"),
    ("bytes", lambda: b"\xff\x00\xfe", "invalid_request"),
    ("two signatures", lambda: token() + ".x", "invalid_request"),
]  # fmt: skip


async def test_hostile_tokens(transmitter: Transmitter) -> None:
    assert transmitter.stack is not None
    browser = await sign_in(transmitter.stack, transmitter.stack.share_id)
    assert (await transmitter.push(token(claims(f"{SSF}verification"))))[0] == 202
    accepted = []
    for name, make, code in HOSTILE:
        status, answer = await transmitter.push(make())
        if (status, answer.get("err")) != (400, code) or not await admitted(transmitter.stack, browser):
            accepted.append(f"{name}: {status} {answer}")
    row(
        "hostile security events",
        f"{len(HOSTILE)} tokens of people who are not the transmitter, or not for us",
        f"{len(accepted)} accepted {'; '.join(accepted)}",
        "0",
        ok=not accepted,
    )
    # And a request that is not a push at all.
    assert (await transmitter.push(token(), **{"Content-Type": "application/json"}))[0] == 400
    assert (await transmitter.push("x" * 70_000))[0] == 413
    stack = transmitter.stack
    headers = {"Host": f"localhost:{stack.port}"}
    for path, method, status in (
        (HOOK, "GET", 405),
        (HOOK + "/more", "POST", 404),
        (HOOK + "x", "POST", 404),
    ):
        async with stack.session.request(method, stack.url(path), headers=headers) as response:
            assert response.status == status, path
    async with stack.session.post(stack.url(HOOK), headers={"Host": stack.host}) as response:
        assert response.status == 404  # shares' origins have no hooks


@pytest.mark.parametrize(
    "url", ["http://idp.example.com/jwks", "ftp://x", "idp.example.com", "http://localhost:1@x.example/"]
)
def test_keys_come_over_tls(url: str) -> None:
    with pytest.raises(ValueError, match="https://"):
        plugin(SecurityEvents, "x", issuer="i", audience="a", jwks_url=url)
