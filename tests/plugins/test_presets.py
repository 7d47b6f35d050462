"""The presets: what each provider does differently, played by a provider that does the same on loopback."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from pydantic import ValidationError
from support.hostile import CLIENT, EMAIL, SECRET, Hostile, hostile, jwk, rsa_key
from support.people import Answer, People, people, plugin

from guestpass.config import load_edge
from guestpass.edge.plugins import PluginSet
from guestpass.errors import ConfigError
from guestpass.model import Session
from guestpass_plugins.authenticate.email_code import EmailCode
from guestpass_plugins.authenticate.oidc import Oidc
from guestpass_plugins.authenticate.oidc.presets import MICROSOFT_PERSONAL, PRESETS
from guestpass_plugins.choose.random import Random
from guestpass_plugins.revoke.share_state import ShareState

TENANT = "11111111-2222-3333-4444-555555555555"
FOREIGN = "99999999-2222-3333-4444-555555555555"


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hostile]:
    async with hostile() as found:
        for name, preset in PRESETS.items():
            changed: dict[str, Any] = {"issuer": found.issuer if preset.issuer else ""}
            if preset.tenants:
                changed["issuer"] = found.issuer + "/{tenant}/v2.0"
            if preset.profile is not None:
                changed["profile"] = dataclasses.replace(
                    preset.profile,
                    authorization_endpoint=f"{found.issuer}/authorize",
                    token_endpoint=f"{found.issuer}/token",
                    profile_endpoint=f"{found.issuer}/profile",
                )
            monkeypatch.setitem(PRESETS, name, dataclasses.replace(preset, **changed))
        yield found


@asynccontextmanager
async def edge_with(folder: Path, **settings: Any) -> AsyncIterator[People]:
    plugins: dict[str, Any] = {
        "authenticate": [
            plugin(Oidc, "idp", client_id=CLIENT, client_secret=SECRET, **settings),
            plugin(EmailCode, "email-code"),
        ],
        "revoke": [plugin(ShareState, "share-state")],
        "choose": [plugin(Random, "random")],
    }
    async with people(folder, plugins=plugins) as found:
        yield found


async def sign_in(
    edge: People, provider: Hostile, *, iss: bool | str = True, code: bool = False
) -> tuple[Mapping[str, str], Answer, list[Session]]:
    """What the provider was asked, the page that the visitor ends at, the sessions that there are."""
    share, _ = await edge.share(EMAIL)
    browser = edge.browser()
    page = await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))
    leaves = await browser.get(f"{page.url}/idp")
    asked = {k: v[0] for k, v in parse_qs(urlsplit(leaves.location).query).items()}
    provider.nonce = asked.get("nonce", "")
    params = {
        "code": "c0de",
        "state": asked["state"],
        **({"iss": provider.issuer if iss is True else iss} if iss else {}),
    }
    page = await browser.follow(await browser.get(f"{edge.main}/callback/idp?{urlencode(params)}"))
    if code:
        assert "Enter the code" in page.words, page.words
        page = await browser.follow(await browser.submit(page, code=await edge.code(EMAIL)))
    return asked, page, list(await edge.service.sessions(share.id, live=True))


def microsoft(provider: Hostile, tenant: str, advertised: str = "{tenantid}") -> None:
    provider.metadata["issuer"] = f"{provider.issuer}/{advertised}/v2.0"
    provider.metadata["authorization_response_iss_parameter_supported"] = False
    provider.claims |= {"iss": f"{provider.issuer}/{tenant}/v2.0", "tid": tenant, "xms_edov": True}
    provider.claims.pop("email_verified")


async def test_google(tmp_path: Path, provider: Hostile) -> None:
    async with edge_with(tmp_path, preset="google") as edge:
        asked, _, sessions = await sign_in(edge, provider)
        assert asked["scope"] == "openid email"
        assert asked["code_challenge_method"] == "S256"
        assert [s.email for s in sessions] == [EMAIL]


async def test_microsoft_with_a_verified_domain(tmp_path: Path, provider: Hostile) -> None:
    microsoft(provider, TENANT, TENANT)
    async with edge_with(tmp_path, preset="microsoft", tenant=TENANT) as edge:
        _, _, sessions = await sign_in(edge, provider, iss=False)
        assert len(sessions) == 1


@pytest.mark.parametrize(
    ("iss", "is_in"), [(f"{TENANT}/v2.0", True), (f"{FOREIGN}/../x", False), ("x", False)]
)
async def test_microsoft_names_itself(tmp_path: Path, provider: Hostile, iss: str, is_in: bool) -> None:
    microsoft(provider, TENANT)
    async with edge_with(tmp_path, preset="microsoft", tenant="common") as edge:
        _, _, sessions = await sign_in(edge, provider, iss=f"{provider.issuer}/{iss}")
        assert bool(sessions) is is_in


@pytest.mark.parametrize("edov", [None, False, "1", 1, "true"])
async def test_microsoft_without_one_needs_a_code(tmp_path: Path, provider: Hostile, edov: object) -> None:
    """nOAuth: the administrator of any tenant can write any address there."""
    microsoft(provider, TENANT, TENANT)
    provider.claims |= {"xms_edov": edov, "email_verified": True}
    async with edge_with(tmp_path, preset="microsoft", tenant=TENANT) as edge:
        _, _, sessions = await sign_in(edge, provider, iss=False, code=True)
        assert [s.provider for s in sessions] == ["idp"]


@pytest.mark.parametrize(
    ("tenant", "tenants", "token_tenant", "is_in"),
    [
        ("common", (), TENANT, True),
        ("organizations", (TENANT,), TENANT, True),
        ("organizations", (TENANT,), FOREIGN, False),
        ("organizations", (), MICROSOFT_PERSONAL, False),
        ("common", (), MICROSOFT_PERSONAL, True),
        (TENANT, (), FOREIGN, False),
        ("consumers", (), TENANT, False),
        ("consumers", (), MICROSOFT_PERSONAL, True),
    ],
)
async def test_microsoft_tenants(
    tmp_path: Path, provider: Hostile, tenant: str, tenants: tuple[str, ...], token_tenant: str, is_in: bool
) -> None:
    advertised = {"consumers": MICROSOFT_PERSONAL, TENANT: TENANT}.get(tenant, "{tenantid}")
    microsoft(provider, token_tenant, advertised)
    settings: dict[str, Any] = {"preset": "microsoft", "tenant": tenant, "tenants": frozenset(tenants)}
    async with edge_with(tmp_path, **settings) as edge:
        _, page, sessions = await sign_in(edge, provider, iss=False)
        assert bool(sessions) is is_in, page.words


@pytest.mark.parametrize("tid", [None, "", "..", f"{TENANT}/../{FOREIGN}", [TENANT]])
async def test_microsoft_tenant_is_an_id(tmp_path: Path, provider: Hostile, tid: object) -> None:
    microsoft(provider, TENANT)
    provider.claims["tid"] = tid
    async with edge_with(tmp_path, preset="microsoft", tenant="common") as edge:
        _, _, sessions = await sign_in(edge, provider, iss=False)
        assert not sessions


@pytest.mark.parametrize(("whose", "is_in"), [("{tenantid}", True), (TENANT, True), (FOREIGN, False)])
async def test_microsoft_keys_belong_to_tenants(
    tmp_path: Path, provider: Hostile, whose: str, is_in: bool
) -> None:
    microsoft(provider, TENANT)
    provider.keys = [jwk(rsa_key("good"), "good", issuer=f"{provider.issuer}/{whose}/v2.0")]
    async with edge_with(tmp_path, preset="microsoft", tenant="common") as edge:
        _, _, sessions = await sign_in(edge, provider, iss=False)
        assert bool(sessions) is is_in


async def test_linkedin_returns_no_nonce(tmp_path: Path, provider: Hostile) -> None:
    provider.raw_claims = json.dumps(provider.claims)
    async with edge_with(tmp_path, preset="linkedin") as edge:
        asked, page, sessions = await sign_in(edge, provider)
        assert provider.forms[0]["client_secret"] == SECRET
        assert "code_challenge" not in asked
        assert sessions, page.words


async def test_linkedin_with_pkce_and_a_foreign_nonce(tmp_path: Path, provider: Hostile) -> None:
    provider.claims["nonce"] = "of another sign-in"
    async with edge_with(tmp_path, preset="linkedin", pkce=True) as edge:
        asked, _, sessions = await sign_in(edge, provider)
        assert asked["code_challenge_method"] == "S256"
        assert not sessions


async def test_amazon_has_a_profile_that_proves_nothing(tmp_path: Path, provider: Hostile) -> None:
    async with edge_with(tmp_path, preset="amazon") as edge:
        asked, _, sessions = await sign_in(edge, provider, iss=False, code=True)
        assert asked["scope"] == "profile"
        assert "nonce" not in asked
        assert [(s.email, s.provider) for s in sessions] == [(EMAIL, "idp")]


@pytest.mark.parametrize(
    "profile", [{}, {"email": EMAIL}, {"user_id": "1", "email": [EMAIL]}, {"user_id": 1}]
)
async def test_amazon_without_what_is_needed(
    tmp_path: Path, provider: Hostile, profile: dict[str, Any]
) -> None:
    provider.profile = profile
    async with edge_with(tmp_path, preset="amazon") as edge:
        _, page, sessions = await sign_in(edge, provider, iss=False)
        assert "Error id" in page.words
        assert not sessions


@pytest.mark.parametrize("preset", ["keycloak", "authentik", "generic"])
async def test_those_that_people_run_themselves(tmp_path: Path, provider: Hostile, preset: str) -> None:
    async with edge_with(tmp_path, preset=preset, issuer=provider.issuer) as edge:
        _, _, sessions = await sign_in(edge, provider)
        assert len(sessions) == 1


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────

WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "needs `issuer`"),
    ({"preset": "keycloak"}, "needs `issuer`"),
    ({"preset": "amazon", "issuer": "https://a.example"}, "is given by preset"),
    ({"preset": "amazon", "ask_code": False}, "proves no address by itself"),
    ({"preset": "microsoft"}, "needs `tenant`"),
    ({"preset": "microsoft", "tenant": "contoso.com"}, "needs `tenant`"),
    ({"preset": "microsoft", "tenant": TENANT, "tenants": frozenset((TENANT,))}, "it says nothing"),
    ({"preset": "microsoft", "tenant": "common", "tenants": frozenset(("contoso",))}, "ids of directories"),
    ({"preset": "google", "tenant": TENANT}, "are for preset"),
    ({"issuer": "http://idp.example"}, "http is for loopback only"),
    ({"issuer": "https://idp.example/?x"}, "has no query"),
    ({"issuer": "https://idp.example", "client_secret": None, "token_auth": "client_secret_post"}, "without"),
    ({"issuer": "https://idp.example", "client_secret": None, "pkce": False}, "without"),
    ({"issuer": "https://idp.example", "token_auth": "none"}, "is not used"),
    ({"issuer": "https://idp.example", "scopes": ("email",)}, "need"),
    ({"issuer": "https://idp.example", "algorithm": "HS256"}, "algorithm"),
    ({"issuer": "https://idp.example", "algorithm": "none"}, "algorithm"),
    ({"issuer": "https://idp.example", "client_id": ""}, "client_id"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Oidc.Config(**{"client_id": CLIENT, "client_secret": SECRET, **settings})


def test_a_provider_that_proves_nothing_needs_one_that_does(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    text = """
[edge]
public_url = "http://localhost:8080"
share_domain = "localhost:8080"
[[authenticate]]
use = "oidc"
name = "amazon"
preset = "amazon"
client_id = "c"
client_secret = "s"
"""
    file.write_text(text)
    with pytest.raises(ConfigError, match='"amazon" proves no address'):
        PluginSet.load(load_edge(file))
    file.write_text(text + '[[authenticate]]\nuse = "email-code"\n')
    assert [a.label for a in PluginSet.load(load_edge(file)).interactive] == [
        "Continue with Amazon",
        "Get a code by email",
    ]
