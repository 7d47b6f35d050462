"""`oidc` against a provider, and visitors, that do everything wrong that is known to have worked somewhere.

Each case changes one thing of a sign-in that would succeed, which is tried first and last. A case is *accepted* when it
ends in a session, or in a browser that is remembered for an address: none may be. One in which the address is left
unproven ends at the page that asks for a mailed code; that is counted as refused, since the code is not there.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from support.hostile import (
    CLIENT,
    EMAIL,
    SECRET,
    Hostile,
    b64,
    ec_key,
    es,
    hostile,
    hs,
    jwk,
    pem,
    rs,
    rsa_key,
    tiny_rsa,
)
from support.people import Answer, Browser, Clock, People, people, plugin
from support.scoreboard import row

from guestpass.errors import PluginError
from guestpass.model import Share
from guestpass_plugins.authenticate.email_code import EmailCode
from guestpass_plugins.authenticate.oidc import Oidc, documents
from guestpass_plugins.authenticate.oidc.documents import ProviderFault
from guestpass_plugins.authenticate.oidc.provider import FRESH_SECONDS, RETRY_SECONDS, STALE_SECONDS
from guestpass_plugins.choose.random import Random
from guestpass_plugins.revoke.share_state import ShareState

Change = Callable[[Hostile], object]


@dataclass
class SignIn:
    """A visitor who was sent to the provider, and comes back."""

    edge: People
    provider: Hostile
    browser: Browser
    page: str  # /signin/FLOW
    state: str
    way: str = "hostile"

    def answer(self, **changed: str | None) -> str:
        """The URL of an honest return, with these parameters instead; None leaves one out."""
        params = {"code": "c0de", "state": self.state, "iss": self.provider.issuer, **changed}
        query = urlencode({k: v for k, v in params.items() if v is not None})
        return f"{self.edge.main}/callback/{self.way}?{query}"

    async def back(self, **changed: str | None) -> Answer:
        return await self.browser.follow(await self.browser.get(self.answer(**changed)))


Behave = Callable[[SignIn], Awaitable[object]]


def claims(**changed: Any) -> Change:
    return lambda p: p.claims.update(changed)


def without(*names: str) -> Change:
    return lambda p: [p.claims.pop(name, None) for name in names]


def header(**changed: Any) -> Change:
    return lambda p: p.header.update(changed)


def metadata(**changed: Any) -> Change:
    return lambda p: p.metadata.update(changed)


def signed(sign: Callable[[bytes], bytes], **head: Any) -> Change:
    def change(p: Hostile) -> None:
        p.sign = sign
        p.header.update(head)

    return change


def rewritten(rewrite: Callable[[str], object]) -> Change:
    return lambda p: setattr(p, "rewrite", rewrite)


def keys(*found: Any, sign: Callable[[bytes], bytes] | None = None, kid: str = "good") -> Change:
    def change(p: Hostile) -> None:
        p.keys = list(found)
        p.header["kid"] = kid
        if sign is not None:
            p.sign = sign

    return change


def reply(path: str, **kwargs: Any) -> Change:
    kwargs.setdefault("content_type", "application/json")
    return lambda p: p.replies.update({path: lambda: web.Response(**kwargs)})


def answer(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda p: setattr(p, "answer", change)


def raw_claims(edit: Callable[[str], str]) -> Change:
    """`edit` the JSON text of the claims; the nonce is put in place of NONCE."""

    def change(p: Hostile) -> None:
        p.raw_claims = edit(json.dumps({"nonce": p.nonce, **p.claims}))

    return change


def altered(token: str) -> str:
    """Mallory writes her own address into a token that was signed for Alice's; the case signs for Mallory."""
    head, body, signature = token.split(".")
    text = json.dumps({**json.loads(_decode(body)), "email": EMAIL})
    return f"{head}.{b64(text.encode())}.{signature}"


def _decode(part: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(part + "==")


def _parts(token: str, head: dict[str, Any] | None, signature: str) -> str:
    first, body, _ = token.split(".")
    return f"{first if head is None else b64(json.dumps(head).encode())}.{body}.{signature}"


DISCOVERY = "/.well-known/openid-configuration"
ELSEWHERE = "http://idp.example"
NOW = time.time()
GOOD, OTHER, EVIL = rsa_key("good"), rsa_key("other"), rsa_key("evil")
TINY, TINY_SIGNS = tiny_rsa()
HUGE = json.dumps({"pad": "x" * 400_000})

# What the provider does wrong: before the visitor is sent there.
BEFORE: dict[str, Change] = {
    "discovery: another issuer": metadata(issuer="https://accounts.google.com"),
    "discovery: issuer with a slash": lambda p: p.metadata.update(issuer=p.issuer + "/"),
    "discovery: issuer in capitals": lambda p: p.metadata.update(issuer=p.issuer.upper()),
    "discovery: no issuer": lambda p: p.metadata.pop("issuer"),
    "discovery: issuer as a list": lambda p: p.metadata.update(issuer=[p.issuer]),
    "discovery: token endpoint over http": metadata(token_endpoint=f"{ELSEWHERE}/token"),
    "discovery: keys over http": metadata(jwks_uri=f"{ELSEWHERE}/jwks"),
    "discovery: keys in a file": metadata(jwks_uri="file:///etc/passwd"),
    "discovery: authorization over http": metadata(authorization_endpoint=f"{ELSEWHERE}/authorize"),
    "discovery: authorization is a script": metadata(authorization_endpoint="javascript:alert(1)"),
    "discovery: authorization with a line break": lambda p: p.metadata.update(
        authorization_endpoint=f"{p.issuer}/a\r\nSet-Cookie: x=y"
    ),
    "discovery: token endpoint with a user": metadata(token_endpoint="https://u:p@127.0.0.1/token"),
    "discovery: token endpoint is a number": metadata(token_endpoint=7),
    "discovery: no token endpoint": lambda p: p.metadata.pop("token_endpoint"),
    "discovery: backslash in a host": metadata(token_endpoint="https://good.example\\@evil.example/t"),
    "discovery: PKCE plain only": metadata(code_challenge_methods_supported=["plain"]),
    "discovery: a page": reply(DISCOVERY, text="<html>", content_type="text/html"),
    "discovery: JSON called a page": lambda p: reply(
        DISCOVERY, text=json.dumps(p.metadata), content_type="text/html"
    )(p),
    "discovery: huge": reply(DISCOVERY, text=HUGE),
    "discovery: a key twice": lambda p: reply(
        DISCOVERY, text=json.dumps(p.metadata)[:-1] + f', "issuer": {json.dumps(p.issuer)}}}'
    )(p),
    "discovery: a list": reply(DISCOVERY, text="[]"),
    "discovery: broken JSON": reply(DISCOVERY, text="{"),
    "discovery: nested a thousand times": reply(DISCOVERY, text='{"a":' * 100_000),
    "discovery: a redirect": reply(DISCOVERY, status=302, headers={"Location": "/elsewhere"}),
    "discovery: out of order": reply(DISCOVERY, status=500, text="{}"),
    "discovery: drips for ever": lambda p: setattr(p, "slow", frozenset((DISCOVERY,))),
}

# And afterwards: the token endpoint, the keys, the ID token. `p.nonce` is the one that was asked for.
AFTER: dict[str, Change] = {
    # ── the token endpoint ──
    "token: an error page": reply("/token", status=400, text="<h1>Bad</h1>", content_type="text/html"),
    "token: a page with 200": reply("/token", text="<h1>Hello</h1>", content_type="text/html"),
    "token: code was used already": reply("/token", status=400, text='{"error": "invalid_grant"}'),
    "token: a redirect that repeats the post": reply(
        "/token", status=307, headers={"Location": "/elsewhere"}
    ),
    "token: a redirect": reply("/token", status=303, headers={"Location": "/elsewhere"}),
    "token: empty": reply("/token", text=""),
    "token: a list": reply("/token", text="[]"),
    "token: huge": reply("/token", text=HUGE),
    "token: compressed": reply(
        "/token", body=gzip.compress(HUGE.encode()), headers={"Content-Encoding": "gzip"}
    ),
    "token: not UTF-8": reply("/token", body=b'{"id_token": "\xff"}'),
    "token: NaN": reply("/token", text='{"expires_in": NaN}'),
    "token: drips for ever": lambda p: setattr(p, "slow", frozenset(("/token",))),
    "token: out of order": reply("/token", status=503, text="{}"),
    "token: no ID token": answer(lambda a: {**a, "id_token": None}),
    "token: ID token in a list": answer(lambda a: {**a, "id_token": [a["id_token"]]}),
    "token: ID token as an object": answer(lambda a: {**a, "id_token": {"email": EMAIL}}),
    "token: of another type": answer(lambda a: {**a, "token_type": "mac"}),
    "token: of no type": answer(lambda a: {k: v for k, v in a.items() if k != "token_type"}),
    "token: ID token twice": lambda p: reply(
        "/token", text=f'{{"token_type": "Bearer", "id_token": "x", "id_token": "{p.token()}"}}'
    )(p),
    # ── how it is signed ──
    "alg none": lambda p: (p.header.update(alg="none"), setattr(p, "sign", lambda data: b"")),
    "alg none, no third part": rewritten(
        lambda t: _parts(t, {"alg": "none"}, "")
    ),
    "alg nOnE, with a signature": header(alg="nOnE"),
    "alg missing": lambda p: p.header.pop("alg"),
    "alg as a list": header(alg=["RS256"]),
    "HS256 with the public key": signed(hs(pem(GOOD)), alg="HS256"),
    "HS256 with the modulus": signed(hs(str(jwk(GOOD, "good")["n"]).encode()), alg="HS256"),
    "HS256 with the client's secret": signed(hs(SECRET.encode()), alg="HS256"),
    "HS256 with nothing": signed(hs(b""), alg="HS256"),
    "RS512 with the right key": signed(rs(GOOD, hashes.SHA512), alg="RS512"),
    "RS256 that is RS512": signed(rs(GOOD, hashes.SHA512)),
    "ES256 with a key of its own": signed(es(ec_key("evil")), alg="ES256"),
    "another's key": signed(rs(EVIL)),
    "the other key's signature": signed(rs(OTHER)),
    "no signature": rewritten(lambda t: t.rpartition(".")[0] + "."),
    "half a signature": rewritten(lambda t: t[:-100]),
    "claims changed afterwards": lambda p: (
        p.claims.update(email="mallory@example.org"),
        setattr(p, "rewrite", altered),
    ),
    "four parts": rewritten(lambda t: f"{t}.x"),
    "encrypted": rewritten(lambda t: f"{t}.x.y"),
    "padded base64": rewritten(lambda t: t + "=="),
    "a blank in front": rewritten(lambda t: " " + t),
    "a line break behind": rewritten(lambda t: t + "\n"),
    "base64 in another alphabet": rewritten(lambda t: t.replace("-", "+").replace("_", "/") + "+"),
    "a signature of many bits too many": rewritten(lambda t: t[:-1] + ("A" if t[-1] != "A" else "B")),
    "an ID token of megabytes": claims(pad="x" * 60_000),
    # ── its header ──
    "kid unknown": header(kid="unknown"),
    "kid of another key": header(kid="other"),
    "kid missing where there are two": lambda p: p.header.pop("kid"),
    "kid as a list": header(kid=["good"]),
    "kid empty": header(kid=""),
    "kid as a path": header(kid="../../../dev/null"),
    "jku": header(jku="http://127.0.0.1:1/jwks"),
    "jwk": signed(rs(EVIL), jwk=jwk(EVIL, "good")),
    "x5u": header(x5u="http://127.0.0.1:1/cert"),
    "x5c": signed(rs(EVIL), x5c=["MIIB"]),
    "crit": header(crit=["exp"], exp=0),
    "b64 false": header(b64=False, crit=["b64"]),
    "zip": header(zip="DEF"),
    "nested": header(cty="JWT"),
    "an access token": header(typ="at+jwt"),
    "a logout token": header(typ="logout+jwt"),
    "typ as a number": header(typ=1),
    "alg twice": lambda p: setattr(
        p, "raw_header", '{"alg": "none", "kid": "good", "alg": "RS256"}'
    ),
    "header as a list": lambda p: setattr(p, "raw_header", '["RS256"]'),
    # ── the keys ──
    "keys: with their private parts": keys(
        jwk(GOOD, "good", d="AQAB"),
    ),
    "keys: for encryption": keys(jwk(GOOD, "good", use="enc")),
    "keys: for signing only": keys(jwk(GOOD, "good", key_ops=["sign"])),
    "keys: for another algorithm": keys(jwk(GOOD, "good", alg="RS512")),
    "keys: RSA of 512 bits": keys(TINY, sign=TINY_SIGNS, kid="tiny"),
    "keys: RSA of 1024 bits": keys(jwk(rsa_key("small", 1024), "small"), sign=rs(rsa_key("small", 1024)), kid="small"),
    "keys: exponent 1": keys(jwk(GOOD, "good", e="AQ")),
    "keys: symmetric": lambda p: (
        keys({"kty": "oct", "kid": "good", "k": b64(b"x" * 32)}, sign=hs(b"x" * 32))(p),
        p.header.update(alg="HS256"),
    ),
    "keys: the same name twice": keys(jwk(GOOD, "good"), jwk(EVIL, "good")),
    "keys: none": keys(),
    "keys: a thousand": keys(*(jwk(GOOD, str(i)) for i in range(1000)), kid="7"),
    "keys: no list": reply("/jwks", text='{"keys": {"good": 1}}'),
    "keys: texts": keys("good"),
    "keys: huge": reply("/jwks", text=HUGE),
    "keys: a page": reply("/jwks", text="<html>", content_type="text/html"),
    "keys: a redirect": reply("/jwks", status=302, headers={"Location": "/elsewhere"}),
    "keys: of elliptic curves, named RSA": keys({"kty": "RSA", "kid": "good", "crv": "P-256", "x": "AQ"}),
    # ── whose it is ──
    "iss of another": claims(iss="https://accounts.google.com"),
    "iss with a slash": lambda p: p.claims.update(iss=p.issuer + "/"),
    "iss as a list": lambda p: p.claims.update(iss=[p.issuer]),
    "iss missing": without("iss"),
    "aud of another": claims(aud="another"),
    "aud of two": claims(aud=[CLIENT, "another"]),
    "aud of nobody": claims(aud=[]),
    "aud missing": without("aud"),
    "aud begins like ours": claims(aud=CLIENT + "2"),
    "aud as an object": claims(aud={CLIENT: True}),
    "azp of another": claims(azp="another"),
    "azp empty": claims(azp=None),
    # ── when ──
    "expired": claims(exp=NOW - 3600),
    "exp missing": without("exp"),
    "exp as a text": claims(exp=str(int(NOW + 300))),
    "exp true": claims(exp=True),
    "exp beyond all clocks": claims(exp=1e300),
    "iat in the future": claims(iat=NOW + 3600),
    "iat long ago": claims(iat=NOW - 7200),
    "iat missing": without("iat"),
    "iat as a text": claims(iat="now"),
    "nbf in the future": claims(nbf=NOW + 3600),
    "nbf as a text": claims(nbf="now"),
    # ── for which sign-in ──
    "nonce missing": lambda p: raw_claims(lambda t: json.dumps({**json.loads(t), "nonce": None}))(p),
    "nonce left out": raw_claims(
        lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != "nonce"})
    ),
    "nonce of another sign-in": claims(nonce="AAAA"),
    "nonce empty": claims(nonce=""),
    "nonce in a list": lambda p: p.claims.update(nonce=[p.nonce]),
    "nonce and more": lambda p: p.claims.update(nonce=p.nonce + "A"),
    "nonce that is not ASCII": claims(nonce="é"),
    # ── who ──
    "sub missing": without("sub"),
    "sub empty": claims(sub=""),
    "sub as a number": claims(sub=1),
    "sub too long": claims(sub="x" * 256),
    "sub with a line break": claims(sub="a\nb"),
    # ── which address ──
    "email in userinfo only": without("email", "email_verified"),
    "email as a list": claims(email=[EMAIL]),
    "email as an object": claims(email={"value": EMAIL}),
    "email null": claims(email=None),
    "email with the Kelvin sign": claims(email="alice@example.org".replace("e.", "\u212a.")),
    "email in full width": claims(email="\uff41lice@example.org"),
    "email with a dotless i": claims(email="al\u0131ce@example.org"),
    "email with a Cyrillic a": claims(email="\u0430lice@example.org"),
    "email with a zero-width space": claims(email="alice\u200b@example.org"),
    "email and another": claims(email=f"{EMAIL}, mallory@example.org"),
    "email as a display name": claims(email=f'"{EMAIL}" <mallory@example.org>'),
    "email with a comment": claims(email=f"{EMAIL}(mallory)"),
    "email as parseaddr reads it": claims(email=f"{EMAIL})mallory@evil.example"),
    "email with a quoted part": claims(email='"alice"@example.org'),
    "email with a NUL": claims(email=f"{EMAIL}\0"),
    "email with half a character": claims(email="alice\ud800@example.org"),
    "email twice": raw_claims(lambda t: t[:-1] + f', "email": "{EMAIL}"}}'),
    # ── and whether it is verified ──
    "email_verified as a text": claims(email_verified="true"),
    "email_verified 1": claims(email_verified=1),
    "email_verified null": claims(email_verified=None),
    "email_verified false": claims(email_verified=False),
    "email_verified in a list": claims(email_verified=[True]),
    "email_verified missing": without("email_verified"),
    "email_verified by another name": lambda p: (
        without("email_verified")(p),
        p.claims.update(verified_email=True, xms_edov=True, emailVerified=True),
    ),
    "email_verified twice": raw_claims(lambda t: t[:-1] + ', "email_verified": true}'),
    "email_verified for another address": lambda p: p.claims.update(
        email_verified=False, emails=[{"email": EMAIL, "email_verified": True}]
    ),
}  # fmt: skip


async def replayed(sign_in: SignIn) -> None:
    """The answer of a sign-in that succeeded, again, in a new sign-in of the same browser and of another one."""
    first = sign_in.answer()
    await sign_in.browser.get(first, Cookie="")  # somebody else's browser comes first
    sign_in.provider.replies["/token"] = lambda: web.json_response({"error": "invalid_grant"}, status=400)
    await sign_in.back()
    sign_in.provider.replies.clear()
    await sign_in.back()


async def in_another_browser(sign_in: SignIn) -> None:
    stranger = sign_in.edge.browser()
    await stranger.follow(await stranger.get(sign_in.answer()))
    await sign_in.edge.browser().get(sign_in.answer())


async def with_another_state(sign_in: SignIn) -> None:
    """A second sign-in of the same browser: its state does not end the first one with the first's code."""
    flow, _, rest = sign_in.state.partition(".")
    for state in (f"{flow}.", f"{flow}.{'A' * len(rest)}", f"{flow}", f".{rest}", f"{flow}.{rest}x"):
        await sign_in.back(state=state)


async def at_another_path(sign_in: SignIn) -> None:
    """Mix-up: the code of one provider at the callback of another one."""
    sign_in.way = "second"
    await sign_in.back()


async def posted(sign_in: SignIn) -> None:
    await sign_in.browser.post(sign_in.answer(), {"code": "c0de", "state": sign_in.state})


async def to_elsewhere(sign_in: SignIn) -> None:
    """Return paths and hosts in the answer lead nowhere: it is refused for its missing code."""
    page = await sign_in.back(
        code=None, next="https://evil.example/", redirect_uri="//evil.example", return_to="/\\evil.example"
    )
    assert page.url.startswith(sign_in.edge.main + "/")


async def old_page(sign_in: SignIn) -> None:
    """Begun a second time: the first state is over."""
    await sign_in.browser.get(f"{sign_in.page}/hostile")
    await sign_in.back()


async def skips_the_code(sign_in: SignIn) -> None:
    """The address is left unproven; then the visitor tries to leave the page that asks for the code."""
    sign_in.provider.claims["email_verified"] = False
    await sign_in.back()
    flow = sign_in.page
    for url in (flow, f"{flow}/hostile", f"{sign_in.edge.main}/me", f"{flow}/email-code"):
        await sign_in.browser.get(url)
    page = await sign_in.browser.get(f"{flow}/email-code")
    for fields in ({"code": "00000000"}, {"email": EMAIL}, {"action": "other"}, {"credential": "{}"}):
        await sign_in.browser.submit(page, **fields)
    await sign_in.browser.submit(page, state=sign_in.state, code="c0de")


# What a visitor, or somebody who leads one, does wrong on the way back.
RETURNS: dict[str, Behave] = {
    "state missing": lambda s: s.back(state=None),
    "state empty": lambda s: s.back(state=""),
    "state of another sign-in": with_another_state,
    "iss of another provider": lambda s: s.back(iss="https://accounts.google.com"),
    "iss missing, though announced": lambda s: s.back(iss=None),
    "iss empty": lambda s: s.back(iss=""),
    "iss with a slash": lambda s: s.back(iss=s.provider.issuer + "/"),
    "code missing": lambda s: s.back(code=None),
    "code empty": lambda s: s.back(code=""),
    "code of many kilobytes": lambda s: s.back(code="x" * 5000),
    "code with a line break": lambda s: s.back(code="c0de\r\nX: y"),
    "an error and a code": lambda s: s.back(error="server_error"),
    "cancelled, and a code": lambda s: s.back(error="access_denied"),
    "code twice": lambda s: s.browser.get(s.answer() + "&code=second"),
    "state twice": lambda s: s.browser.get(s.answer() + "&state=second"),
    "iss twice": lambda s: s.browser.get(s.answer() + "&iss=https://evil.example"),
    "in another browser": in_another_browser,
    "replayed": replayed,
    "begun twice": old_page,
    "at another provider's path": at_another_path,
    "posted": posted,
    "to elsewhere": to_elsewhere,
    "an ID token in the URL": lambda s: s.back(code=None, id_token=str(s.provider.token())),
    "skips the mailed code": skips_the_code,
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def provider() -> AsyncIterator[Hostile]:
    async with hostile() as found:
        yield found


@pytest.fixture
async def edge(
    tmp_path: Path, provider: Hostile, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[People]:
    monkeypatch.setattr(documents, "ANSWER_SECONDS", 0.4)  # what never comes need not be waited for long
    settings = {"issuer": provider.issuer, "client_id": CLIENT, "client_secret": SECRET}
    plugins: dict[str, Any] = {
        "authenticate": [
            plugin(Oidc, "hostile", **settings),
            plugin(Oidc, "second", **settings),
            plugin(EmailCode, "email-code"),
        ],
        "revoke": [plugin(ShareState, "share-state")],
        "choose": [plugin(Random, "random")],
    }
    async with people(tmp_path, plugins=plugins, now=clock) as found:
        yield found


class Trial:
    """Sign-ins at one edge, and whether one was accepted."""

    def __init__(self, edge: People, provider: Hostile, share: Share) -> None:
        self.edge = edge
        self.provider = provider
        self.share = share
        self.browsers: list[Browser] = []
        found = edge.plugins.authenticators[0]
        assert isinstance(found, Oidc)
        self.oidc = found

    async def begin(self, *, afresh: bool = True) -> SignIn | None:
        """None when the visitor is not even sent there. `afresh`: nothing is known of the provider any more."""
        try:
            if afresh:
                await self.oidc.start(self.oidc.host)
        except ProviderFault:
            return None
        browser = self.edge.browser()
        self.browsers.append(browser)
        page = await browser.follow(await browser.get(self.edge.origins.share_origin(self.share.id) + "/"))
        leaves = await browser.get(f"{page.url}/hostile")
        if leaves.status != 303 or not leaves.location.startswith(self.provider.issuer + "/authorize?"):
            return None
        asked = {k: v[0] for k, v in parse_qs(urlsplit(leaves.location).query).items()}
        self.provider.nonce = asked["nonce"]
        return SignIn(self.edge, self.provider, browser, page.url, asked["state"])

    async def is_accepted(self) -> bool:
        """And forget what was."""
        found = await self.edge.service.sessions(self.share.id)
        for session in found:
            await self.edge.service.end_session(session.id, "test")
        known = [b.cookie(self.edge.main, "__Host-gp-me") for b in self.browsers]
        self.browsers.clear()
        return any(s.ended is None for s in found) or any(known)

    async def honest(self, *, afresh: bool = True) -> bool:
        self.provider.reset()
        return await self.succeeds(afresh=afresh)

    async def succeeds(self, *, afresh: bool = False) -> bool:
        sign_in = await self.begin(afresh=afresh)
        assert sign_in is not None
        page = await sign_in.back()
        return await self.is_accepted() and "application: alice@example.org" in page.text


async def test_nothing_is_accepted(edge: People, provider: Hostile, caplog: pytest.LogCaptureFixture) -> None:
    share, _ = await edge.share(EMAIL)
    trial = Trial(edge, provider, share)
    assert await trial.honest()
    accepted: list[str] = []
    silent: list[str] = []

    async def settle(name: str) -> None:
        if await trial.is_accepted():
            accepted.append(name)
        # A visitor is told in plain words; an exception that nobody expected would have been a 503.
        assert not edge.plugins.health(), name
        assert not [s for s in edge.plugins.states() if s.state != "ok"], name
        if not any("error id" in r.getMessage() for r in caplog.records):
            silent.append(name)
        caplog.clear()
        provider.reset()

    for name, change in BEFORE.items():
        provider.reset()
        change(provider)
        sign_in = await trial.begin()
        if sign_in is not None:
            accepted.append(name)  # sent to a provider like this
        await settle(name)
    for name, change in AFTER.items():
        provider.reset()
        sign_in = await trial.begin()
        assert sign_in is not None
        change(provider)
        await sign_in.back()
        await settle(name)
    for name, behave in RETURNS.items():
        provider.reset()
        sign_in = await trial.begin()
        assert sign_in is not None
        await behave(sign_in)
        await settle(name)
    assert await trial.honest()
    cases = len(BEFORE) + len(AFTER) + len(RETURNS)
    assert cases >= 60
    assert not [name for name in silent if name in AFTER and not name.startswith("email_verified")]
    row(
        "hostile identity provider",
        f"{cases} bad behaviours of a provider or a visitor",
        f"{len(accepted)} accepted{': ' if accepted else ''}{', '.join(accepted)}",
        "0 accepted",
        ok=not accepted,
        figure=8,
    )


@pytest.fixture
async def trial(edge: People, provider: Hostile) -> Trial:
    share, _ = await edge.share(EMAIL)
    return Trial(edge, provider, share)


async def test_keys_are_rotated(trial: Trial, provider: Hostile, clock: Clock) -> None:
    assert await trial.honest()
    provider.keys = [jwk(EVIL, "new")]
    provider.header["kid"] = "new"
    provider.sign = rs(EVIL)
    clock.at += RETRY_SECONDS + 1
    assert await trial.succeeds()
    provider.header["kid"] = "good"
    provider.sign = rs(GOOD)
    clock.at += RETRY_SECONDS + 1
    assert not await trial.succeeds(), "a key that was withdrawn"


async def test_made_up_keys_do_not_become_a_flood(trial: Trial, provider: Hostile) -> None:
    assert await trial.honest()
    provider.asked.clear()
    for number in range(30):
        provider.header["kid"] = f"made-up-{number}"
        assert not await trial.succeeds()
    assert provider.asked.count("/jwks") <= 1
    provider.header["kid"] = "good"
    assert await trial.succeeds()


async def test_an_outage_of_the_keys_does_not_end_sign_in_at_once(
    trial: Trial, provider: Hostile, clock: Clock
) -> None:
    assert await trial.honest()
    provider.replies["/jwks"] = lambda: web.Response(status=503)
    provider.replies[DISCOVERY] = lambda: web.Response(status=503)
    clock.at += FRESH_SECONDS + 1
    provider.claims.update(iat=clock.at, exp=clock.at + 300)
    provider.asked.clear()
    assert await trial.succeeds()
    assert "/jwks" in provider.asked, "the last good set holds on, but a new one was asked for"
    clock.at += STALE_SECONDS
    provider.claims.update(iat=clock.at, exp=clock.at + 300)
    assert await trial.begin(afresh=False) is None


async def test_a_provider_that_was_down_when_the_edge_started_is_found_later(
    trial: Trial, provider: Hostile, clock: Clock
) -> None:
    provider.replies[DISCOVERY] = lambda: web.Response(status=503)
    assert await trial.begin() is None
    provider.replies.clear()
    assert await trial.begin(afresh=False) is None, "it was asked a moment ago"
    clock.at += RETRY_SECONDS + 1
    assert await trial.succeeds()


async def test_two_returns_at_the_same_time_let_one_in(trial: Trial, provider: Hostile) -> None:
    assert await trial.honest()
    sign_in = await trial.begin()
    assert sign_in is not None
    provider.forms.clear()
    pages = await asyncio.gather(*(sign_in.browser.get(sign_in.answer()) for _ in range(8)))
    assert [page.status for page in pages].count(303) == 1
    assert len(provider.forms) == 1, "the code was redeemed once"


async def test_what_is_sent_to_the_provider(trial: Trial, provider: Hostile) -> None:
    """PKCE binds the code to the flow, and the secret does not travel in the form."""
    assert await trial.honest()
    (form,) = provider.forms
    assert form["grant_type"] == "authorization_code"
    assert len(form["code_verifier"]) >= 43
    assert form["redirect_uri"] == f"{trial.edge.main}/callback/hostile"
    assert SECRET not in form.values()


async def test_the_edge_does_not_start_with_another_issuers_document(
    tmp_path: Path, provider: Hostile
) -> None:
    provider.metadata["issuer"] = "https://accounts.google.com"
    way = plugin(Oidc, "hostile", issuer=provider.issuer, client_id=CLIENT, client_secret=SECRET)
    with pytest.raises(PluginError, match=r"is that of 'https://accounts\.google\.com'"):
        async with people(tmp_path, plugins={"authenticate": [way]}):
            pass
