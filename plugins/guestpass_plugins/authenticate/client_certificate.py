"""`client-certificate`: the visitor's TLS client certificate names their address, and a certificate authority that you
name vouches for it.

The proxy in front of the edge ends TLS, asks for the certificate, sees that the visitor has its key, and passes it
on: in `Client-Cert` and `Client-Cert-Chain` (RFC 9440), or as URL-encoded PEM, which is what nginx has in
`$ssl_client_escaped_cert`. The certificate is verified here once more, against `ca`: so a proxy that asks for "any"
certificate opens nothing. It must be good for client authentication, valid now, and have exactly one email address as
a subject alternative name; an address in the subject's name does not count. Revocation lists are the proxy's affair.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import unquote_to_bytes

from cryptography import x509
from cryptography.x509 import verification

from guestpass.plugin import (
    ConfigPath,
    Denied,
    Host,
    Identity,
    PluginConfig,
    SignIn,
    canonical_address,
)
from guestpass_plugins.authenticate.behind_proxy import BehindProxy, BehindProxyConfig, HeaderName, only

__all__ = ["ClientCertificate"]

CERT, CHAIN = "Client-Cert", "Client-Cert-Chain"

# A byte sequence of RFC 8941 §3.3.5.
BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/=]*):")
MAX_CHAIN = 5


class ClientCertificate(BehindProxy):
    class Config(BehindProxyConfig):
        ca: ConfigPath
        format: Literal["rfc9440", "pem"] = "rfc9440"
        header: HeaderName = CERT
        label: str = "Client certificate"

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.private_headers = (self.config.header, CHAIN)

    async def start(self, host: Host) -> None:
        """Raises OSError or ValueError when the certificates of `ca` cannot be read."""
        await super().start(host)
        self._store = verification.Store(x509.load_pem_x509_certificates(self.config.ca.read_bytes()))

    def who(self, sign_in: SignIn) -> Identity:
        value = only(sign_in, self.config.header)
        if not value:
            raise Denied("Your browser has shown no certificate.")
        try:
            leaf = self._read(value)
            chain = self._chain(only(sign_in, CHAIN))
            verifier = (
                verification.PolicyBuilder()
                .store(self._store)
                .time(datetime.fromtimestamp(self.host.now(), UTC))
                .build_client_verifier()
            )
            verifier.verify(leaf, chain)
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (address,) = names.get_values_for_type(x509.RFC822Name)
            email = canonical_address(address)
        except verification.VerificationError as exc:
            self.host.logger.info("a client certificate was refused: %s", exc)
            raise Denied("Your certificate is not accepted here.") from exc
        except (
            Exception
        ) as exc:  # the library raises of many kinds, and it is the visitor who wrote the certificate
            raise Denied("Your certificate does not name one email address.") from exc
        return Identity(email, self.name, subject=format(leaf.serial_number, "x"), proven=self.host.now())

    def _read(self, value: str) -> x509.Certificate:
        """Raises ValueError."""
        if self.config.format == "pem":
            (certificate,) = x509.load_pem_x509_certificates(unquote_to_bytes(value))
            return certificate
        match = BYTE_SEQUENCE.fullmatch(value)
        if match is None:
            raise ValueError("not a byte sequence")
        return x509.load_der_x509_certificate(base64.b64decode(match[1], validate=True))

    def _chain(self, value: str | None) -> list[x509.Certificate]:
        if not value or self.config.format == "pem":
            return []
        return [self._read(part.strip()) for part in value.split(",")[:MAX_CHAIN]]
