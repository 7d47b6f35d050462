"""`oidc`: the visitor signs in with a provider that they have an account with.

The flow is OpenID Connect's authorization code flow, with everything that OAuth 2.0 Security BCP (RFC 9700) asks for:

```
 begin      state, nonce and PKCE verifier are made and kept on the server, in the flow of this browser
            → provider: code_challenge (S256), nonce, state, redirect_uri = /callback/NAME
 complete   state is this flow's, and was not used before; `iss` (RFC 9207) is this provider's
            → token endpoint: code, code_verifier, client authentication
            ← ID token: signature, iss, aud, azp, exp, iat, nbf, nonce, sub
            email, where the same ID token says that it is verified    → Identity
            email, where nothing says so                               → Unproven: a code has to be typed as well
```

Mix-up: each provider has a callback path of its own, and the flow remembers at which one it is; `iss` is compared
besides, and required where the provider announces it. Login CSRF: the flow belongs to the browser that began it.
A stolen code is worth nothing without the verifier, which never leaves the server.

Who somebody is at a provider is (issuer, sub). Which address they own is `email` of the same verified ID token, only
where that token's flag is the JSON value `true`: not "true", not 1. No other document is asked, since what a second one
says need not be about the same person.

What goes wrong is told to the visitor in plain words with an error id, and to the operator in the log, with the id and
what exactly it was. It does not count as a failure of the plugin: anybody can come back with a made-up code, and must
not be able to switch a provider off for all others.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import ssl
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote_plus

from pydantic import Field as Setting
from pydantic import model_validator
from yarl import URL

from guestpass.plugin import (
    Authenticator,
    ConfigPath,
    Denied,
    Host,
    Identity,
    InvalidEmail,
    PluginConfig,
    Redirect,
    Secret,
    SignIn,
    Step,
    Unproven,
    canonical_address,
)
from guestpass_plugins.authenticate.oidc.documents import (
    Misfit,
    ProviderFault,
    Unreachable,
    fetch,
    quoted,
    secure_url,
)
from guestpass_plugins.authenticate.oidc.id_token import Expected, verified
from guestpass_plugins.authenticate.oidc.presets import GUID, MICROSOFT_PERSONAL, PRESETS, Preset
from guestpass_plugins.authenticate.oidc.provider import Metadata, Provider

__all__ = ["Oidc"]

# A used `state` is remembered for longer than any flow lives.
STATE_SECONDS = 7200.0
# Codes of known providers have up to about 2,000 characters (Entra); a request line has room for no more.
MAX_CODE = 4096
# RFC 6749 §4.1.2.1: what the provider says when the visitor pressed "Cancel".
CANCELLED = "access_denied"

AuthMethod = Literal["client_secret_basic", "client_secret_post", "none"]
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class Oidc(Authenticator):
    """Proves an address by the word of an OpenID provider."""

    class Config(PluginConfig):
        preset: Literal["google", "microsoft", "linkedin", "amazon", "keycloak", "authentik", "generic"] = (
            "generic"
        )
        issuer: str | None = None
        client_id: str = Setting(min_length=1)
        client_secret: Secret | None = None
        label: str | None = Setting(default=None, min_length=1, max_length=80)
        tenant: str | None = None
        tenants: frozenset[str] = frozenset()
        scopes: tuple[str, ...] | None = None
        algorithm: Algorithm | None = None
        token_auth: AuthMethod | None = None
        pkce: bool | None = None
        ask_code: bool = True
        ca: ConfigPath | None = None

        @model_validator(mode="after")
        def _fits(self) -> Oidc.Config:
            preset = PRESETS[self.preset]
            if preset.profile is not None or preset.tenants:
                if self.issuer is not None:
                    raise ValueError(f'`issuer` is given by preset = "{self.preset}"; leave it out')
            elif not (self.issuer or preset.issuer):
                raise ValueError(
                    f'preset = "{self.preset}" needs `issuer`, the URL before /.well-known/openid-configuration'
                )
            if self.issuer is not None:
                try:
                    secure_url(self.issuer, "`issuer`", plain=True)
                except ProviderFault as exc:
                    raise ValueError(f"{exc}; http is for loopback only") from exc
                if "?" in self.issuer:
                    raise ValueError("`issuer` has no query")
            if not preset.tenants and (self.tenant is not None or self.tenants):
                raise ValueError('`tenant` and `tenants` are for preset = "microsoft"')
            if preset.tenants:
                _check_tenants(self.tenant, self.tenants)
            if self.client_secret is None and (
                self.token_auth not in (None, "none") or not _uses_pkce(self, preset)
            ):
                raise ValueError('without `client_secret` PKCE has to be on and `token_auth` "none"')
            if self.token_auth == "none" and self.client_secret is not None:
                raise ValueError('`client_secret` is not used with token_auth = "none"')
            if preset.profile is None and self.scopes is not None and "openid" not in self.scopes:
                raise ValueError('`scopes` need "openid"')
            if not preset.proof and not self.ask_code:
                raise ValueError(
                    f'preset = "{self.preset}" proves no address by itself: `ask_code` has to be on'
                )
            return self

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._preset = PRESETS[self.config.preset]
        self.label = self.config.label or self._preset.label
        self._who = self.label.removeprefix("Continue with ")
        self.needs_proof = not self._preset.proof
        self._pkce = _uses_pkce(self.config, self._preset)

    async def start(self, host: Host) -> None:
        await super().start(host)
        ca = self.config.ca
        self._tls = None if ca is None else ssl.create_default_context(cafile=str(ca))
        issuer, advertised = self._issuers()
        self._advertised = advertised
        self._provider = Provider(
            http=lambda: self.host.http,
            issuer=issuer,
            advertised=advertised,
            algorithm=self.config.algorithm or self._preset.algorithm,
            tls=self._tls,
            now=host.now,
        )
        if self._preset.profile is not None:
            return
        try:
            await self._provider.metadata()
        except Misfit:
            raise
        except ProviderFault as exc:
            # It may be down while we start, and be back when somebody comes.
            host.logger.warning("%s; it is asked again when somebody signs in", exc)

    def _issuers(self) -> tuple[str, str]:
        """The issuer whose discovery document is read, and what that document has to call itself."""
        issuer: str = self.config.issuer or self._preset.issuer
        if not self._preset.tenants:
            return issuer, issuer
        tenant = self.config.tenant
        advertised = {
            "common": "{tenantid}",
            "organizations": "{tenantid}",
            "consumers": MICROSOFT_PERSONAL,
        }.get(tenant, tenant)
        return issuer.replace("{tenant}", tenant), issuer.replace("{tenant}", advertised)

    # ── to the provider ─────────────────────────────────────────────────────────────────────────────────────────

    async def begin(self, sign_in: SignIn) -> Step:
        try:
            endpoint = (await self._endpoints()).authorization_endpoint
        except ProviderFault as exc:
            raise self._refused(exc) from exc
        state = f"{sign_in.flow_id}.{secrets.token_urlsafe(24)}"
        nonce, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(48)
        asked = {
            **dict(self._preset.parameters),
            "response_type": "code",
            "client_id": self.config.client_id,
            "redirect_uri": sign_in.callback_url,
            "scope": " ".join(self.config.scopes or self._preset.scopes),
            "state": state,
        }
        if self._preset.profile is None:
            asked["nonce"] = nonce
        if self._pkce:
            digest = hashlib.sha256(verifier.encode("ascii")).digest()
            asked["code_challenge"] = base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
            asked["code_challenge_method"] = "S256"
        return Redirect(
            str(URL(endpoint, encoded=True).extend_query(asked)),
            state={"state": state, "nonce": nonce, "verifier": verifier},
        )

    # ── and back ────────────────────────────────────────────────────────────────────────────────────────────────

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        try:
            return await self._complete(sign_in, params)
        except ProviderFault as exc:
            raise self._refused(exc) from exc

    async def _complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        state = sign_in.state.get("state")
        given = params.get("state", "")
        if not isinstance(state, str) or not hmac.compare_digest(
            given.encode("utf-8", "replace"), state.encode("ascii")
        ):
            raise ProviderFault("the answer carries the state of another sign-in")
        used = hashlib.sha256(state.encode("ascii")).hexdigest()
        if await self.host.storage.add(f"state:{used}", ttl=STATE_SECONDS) > 1:
            raise ProviderFault("the answer came a second time")
        endpoints = await self._endpoints()
        self._check_issuer(endpoints, params.get("iss"))
        if "error" in params:
            if params["error"] == CANCELLED:
                raise Denied(f"You did not sign in with {self._who}.")
            raise ProviderFault(f"the provider answered with the error {quoted(params['error'])}")
        code = params.get("code", "")
        if not 0 < len(code) <= MAX_CODE or not code.isascii() or not code.isprintable():
            raise ProviderFault("the answer carries no code")
        answer = await self._redeem(endpoints, sign_in, code)
        if self._preset.profile is not None:
            return await self._from_profile(answer)
        return await self._from_id_token(answer, sign_in)

    def _check_issuer(self, endpoints: Metadata, given: str | None) -> None:
        """RFC 9207 §2.4. Where the issuer depends on the tenant, any tenant's will do: the ID token names it again."""
        if given is None:
            if endpoints.names_itself:
                raise ProviderFault("the answer does not say which provider it is from (iss)")
        elif not re.fullmatch(re.escape(endpoints.issuer).replace(r"\{tenantid\}", GUID.pattern), given):
            raise ProviderFault(f"the answer is from another provider: iss is {quoted(given)}")

    async def _redeem(self, endpoints: Metadata, sign_in: SignIn, code: str) -> Mapping[str, Any]:
        """Exchange the code for tokens."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": sign_in.callback_url,
        }
        headers: dict[str, str] = {}
        if self._pkce:
            form["code_verifier"] = str(sign_in.state["verifier"])
        method = self._auth_method(endpoints)
        secret = "" if self.config.client_secret is None else self.config.client_secret.get_secret_value()
        if method == "client_secret_basic":
            # RFC 6749 §2.3.1: each part is form-encoded first.
            pair = f"{quote_plus(self.config.client_id)}:{quote_plus(secret)}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode("ascii")).decode("ascii")
        else:
            form["client_id"] = self.config.client_id
            if method == "client_secret_post":
                form["client_secret"] = secret
        status, answer = await fetch(
            self.host.http,
            "POST",
            endpoints.token_endpoint,
            "the token endpoint",
            tls=self._tls,
            data=form,
            headers=headers,
        )
        if status != 200:
            raise ProviderFault(
                f"the token endpoint answers {status}, {quoted(answer.get('error'))}: "
                f"{quoted(answer.get('error_description', ''))}"
            )
        kind = answer.get("token_type")
        if not isinstance(kind, str) or kind.lower() != "bearer":
            raise ProviderFault(f"the token endpoint gives tokens of type {quoted(kind)}")
        return answer

    def _auth_method(self, endpoints: Metadata) -> str:
        if self.config.token_auth is not None:
            return str(self.config.token_auth)
        if self.config.client_secret is None:
            return "none"
        if self._preset.token_auth is not None:
            return self._preset.token_auth
        for method in ("client_secret_basic", "client_secret_post"):
            if method in endpoints.token_auth:
                return method
        raise ProviderFault(
            f"the token endpoint takes none of our ways to present a secret: {quoted(endpoints.token_auth)}"
        )

    async def _from_id_token(self, answer: Mapping[str, Any], sign_in: SignIn) -> Step:
        expected = Expected(
            issuer=self._advertised,
            client_id=self.config.client_id,
            algorithm=self.config.algorithm or self._preset.algorithm,
            nonce=str(sign_in.state["nonce"]),
            nonce_required=self._preset.nonce,
            tenants=self.config.tenants,
            foreign_tenants=frozenset((MICROSOFT_PERSONAL,) if self.config.tenant == "organizations" else ()),
        )
        claims = await verified(answer.get("id_token"), self._provider, expected, self.host.now())
        subject = f"{claims['iss']} {claims['sub']}"
        return self._person(claims.get("email"), subject, is_proven=claims.get(self._preset.proof) is True)

    async def _from_profile(self, answer: Mapping[str, Any]) -> Step:
        profile = self._preset.profile
        token = answer.get("access_token")
        if profile is None or not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise ProviderFault("the token endpoint gives no access token")
        status, found = await fetch(
            self.host.http,
            "GET",
            profile.profile_endpoint,
            "the profile",
            tls=self._tls,
            headers={"Authorization": f"Bearer {token}"},
        )
        subject = found.get(profile.subject)
        if status != 200 or not isinstance(subject, str) or not subject:
            raise ProviderFault(f"the profile answers {status} without {profile.subject}")
        return self._person(found.get(profile.email), f"{self.config.preset} {subject}", is_proven=False)

    def _person(self, email: object, subject: str, *, is_proven: bool) -> Step:
        if not isinstance(email, str):
            raise ProviderFault(
                f"there is no email address in what the provider says, only {quoted(email)}; does it put `email` "
                "into ID tokens, and is the scope granted?"
            )
        try:
            address = canonical_address(email)
        except InvalidEmail as exc:
            raise ProviderFault(f"the provider names no plain address: {quoted(exc.message)}") from exc
        if is_proven:
            return Identity(address, self.name, subject=subject, proven=self.host.now())
        if not self.config.ask_code:
            raise Denied(f"{self._who} does not say that {address} was verified. Sign in in another way.")
        return Unproven(address, subject=subject)

    # ── what both need ──────────────────────────────────────────────────────────────────────────────────────────

    async def _endpoints(self) -> Metadata:
        profile = self._preset.profile
        if profile is None:
            return await self._provider.metadata()
        return Metadata(
            issuer="",
            authorization_endpoint=profile.authorization_endpoint,
            token_endpoint=profile.token_endpoint,
            jwks_uri="",
            names_itself=False,
            token_auth=("client_secret_post",),
        )

    def _refused(self, fault: ProviderFault) -> Denied:
        error_id = secrets.token_hex(4)
        self.host.logger.warning("a sign-in was refused (error id %s): %s", error_id, fault)
        if isinstance(fault, Unreachable):
            return Denied(f"{self._who} cannot be reached at present. Error id: {error_id}.")
        return Denied(f"Signing in with {self._who} did not work. Error id: {error_id}.")


def _uses_pkce(config: Any, preset: Preset) -> bool:
    return preset.pkce if config.pkce is None else bool(config.pkce)


def _check_tenants(tenant: str | None, tenants: frozenset[str]) -> None:
    """Raises ValueError."""
    if tenant is None or not (tenant in ("common", "organizations", "consumers") or GUID.fullmatch(tenant)):
        raise ValueError(
            'preset = "microsoft" needs `tenant`: the directory\'s id, or "organizations", "consumers" or "common"'
        )
    for name in tenants:
        if not GUID.fullmatch(name):
            raise ValueError(f"`tenants` are ids of directories, in lower case; {name!r} is none")
    if tenants and tenant not in ("common", "organizations"):
        raise ValueError('`tenants` limits "common" and "organizations"; with one `tenant` it says nothing')
