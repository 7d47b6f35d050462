"""pass-phrase: an Authenticator for Guestpass."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from guestpass.plugin import (
    Authenticator,
    Denied,
    Field,
    Form,
    Identity,
    InvalidEmail,
    PluginConfig,
    Secret,
    SignIn,
    Step,
    canonical_address,
)

# A phrase that people can remember can be guessed: so often from one network, in so many seconds.
TRIES = 10
TRIES_SECONDS = 600.0


class PassPhrase(Authenticator):
    """Sign in with a pass phrase that you were told."""

    label = "Sign in with a pass phrase"

    class Config(PluginConfig):
        people: dict[str, Secret] = {}
        """The phrase of each address."""

    async def begin(self, sign_in: SignIn) -> Step:
        return self._form()

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        tries = await self.host.storage.add(f"tries/{sign_in.client.network}", ttl=TRIES_SECONDS)
        if tries > TRIES:
            raise Denied("Too many attempts. Try again in ten minutes.")
        try:
            email = canonical_address(params.get("email", ""))
        except InvalidEmail:
            return self._form("That is not an email address.")
        expected = self.config.people.get(email)
        given = params.get("phrase", "").encode()
        if expected is None or not hmac.compare_digest(expected.get_secret_value().encode(), given):
            return self._form("Address and phrase do not belong together.")
        return Identity(email, self.name)

    def _form(self, error: str = "") -> Form:
        email = Field("email", "Your email address", type="email", autocomplete="email")
        phrase = Field("phrase", "Your pass phrase", type="password")
        return Form("Who are you?", fields=[email, phrase], error=error)
