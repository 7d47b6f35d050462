"""Sign in with the account of an LDAP directory.

A visitor types an address and a password. The directory is searched for the one entry whose mail attribute is that
address, and asked whether the password is that entry's (a bind). So the password is checked by the directory alone, and
nothing of it is kept here.

`ldap3` waits without awaiting, so the plugin is `blocking`: its hooks run in threads.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import ldap3
from ldap3.core.exceptions import LDAPInvalidCredentialsResult
from ldap3.utils.conv import escape_filter_chars

from guestpass.plugin import (
    Authenticator,
    ConfigPath,
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

# Of the directory, in seconds; the edge gives up a sign-in after 15.
TIMEOUT = 5
# Guesses of one network's visitors for one address, in so many seconds. Directories lock accounts after a few wrong
# passwords, and a stranger must not be able to bring that about.
TRIES = 5
TRIES_SECONDS = 900.0

WRONG = "Address and password do not belong together."


class LdapAuthenticator(Authenticator):
    """Sign in with the account of an LDAP directory."""

    blocking = True
    label = "Sign in with your account"

    class Config(PluginConfig):
        url: str
        base: str
        bind_dn: str = ""
        bind_password: Secret | None = None
        mail: str = "mail"
        filter: str = "(objectClass=person)"
        ca: ConfigPath | None = None
        insecure: bool = False

    def begin(self, sign_in: SignIn) -> Step:
        return self._form()

    def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        try:
            email = canonical_address(params.get("email", ""))
        except InvalidEmail:
            return self._form("That is not an email address.")
        password = params.get("password", "")
        if not password:  # a bind without a password succeeds for everybody (RFC 4513, 5.1.2)
            return self._form("Type your password.")
        storage = self.host.storage
        counter = f"tries/{email}/{sign_in.client.network}"
        if self.host.wait(storage.add(counter, ttl=TRIES_SECONDS)) > TRIES:
            raise Denied("Too many attempts. Try again in a quarter of an hour.")
        entry = self._find(email)
        if entry is None or not self._proves(entry, password):
            return self._form(WRONG)
        self.host.wait(storage.delete(counter))
        return Identity(email, self.name, subject=entry)

    def _form(self, error: str = "") -> Form:
        email = Field("email", "Your email address", type="email", autocomplete="username")
        password = Field("password", "Your password", type="password", autocomplete="current-password")
        return Form("Sign in with your account", fields=[email, password], error=error)

    def _server(self) -> ldap3.Server:
        tls = None
        if not self.config.insecure:
            tls = ldap3.Tls(
                validate=ssl.CERT_REQUIRED,
                ca_certs_file=None if self.config.ca is None else str(self.config.ca),
            )
        return ldap3.Server(self.config.url, tls=tls, connect_timeout=TIMEOUT, get_info=ldap3.NONE)

    def _connected(self, user: str, password: str) -> Any:
        """A bound connection. Raises LDAPException."""
        connection = ldap3.Connection(
            self._server(),
            user=user or None,
            password=password or None,
            receive_timeout=TIMEOUT,
            read_only=True,
            raise_exceptions=True,
        )
        connection.open()
        if not self.config.insecure and self.config.url.startswith("ldap:"):
            connection.start_tls()
        connection.bind()
        return connection

    def _find(self, email: str) -> str | None:
        """The name of the one entry with this address. Raises LDAPException, which denies."""
        secret = self.config.bind_password
        connection = self._connected(self.config.bind_dn, secret.get_secret_value() if secret else "")
        try:
            wanted = f"(&{self.config.filter}({self.config.mail}={escape_filter_chars(email)}))"
            connection.search(self.config.base, wanted, attributes=[self.config.mail], size_limit=2)
            found = [e["dn"] for e in connection.response if e.get("type") == "searchResEntry"]
        finally:
            connection.unbind()
        return str(found[0]) if len(found) == 1 else None

    def _proves(self, entry: str, password: str) -> bool:
        try:
            self._connected(entry, password).unbind()
        except LDAPInvalidCredentialsResult:
            return False
        return True
