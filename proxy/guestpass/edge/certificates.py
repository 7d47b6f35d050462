"""The certificates of the edge: which there are, for which names, and how new ones take their place.

Sources are pairs of PEM files: `tls` of edge.toml, `[[edge.certificate]]`, and what ACME has been issued. `load` reads
all of them into new contexts and only then replaces the old ones at a stroke: a file with a fault changes nothing, and
connections keep the context that they began with. A name is looked up exactly, then as the wildcard of its parent; the
first source is the default for all other names and for clients that give none. The default is served rather than an
alert: a browser shows the visitor what is wrong, and the HTTP behind it answers 421 to names that are not ours.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from guestpass.config import EdgeConfig
from guestpass.edge.tls import server_context
from guestpass.errors import ConfigError
from guestpass.mux.handshake import certificate_hash


@dataclass(frozen=True, slots=True)
class Source:
    """Where a certificate comes from. `key` names the setting in errors; without `hosts` it is for what it names."""

    cert: Path
    private_key: Path
    key: str
    hosts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """One that was loaded."""

    name: str
    """Its first host, for people and metrics."""
    hosts: tuple[str, ...]
    expires: float
    begins: float
    hash: bytes
    """`tls-server-end-point` (RFC 5929), which gateways' proofs are bound to."""
    context: ssl.SSLContext = field(compare=False, repr=False)


def sources(config: EdgeConfig) -> Iterator[Source]:
    """Those that edge.toml names, the default first."""
    edge = config.edge
    if edge.tls is not None:
        yield Source(config.resolve(edge.tls.cert), config.resolve(edge.tls.key), "edge.tls")
    for section in edge.certificate:
        yield Source(
            config.resolve(section.cert), config.resolve(section.key), "edge.certificate", section.hosts
        )


def load(source: Source, file: Path) -> Certificate:
    """Raises ConfigError that names the file and the key."""
    context = server_context()
    load_chain(context, source, file)
    try:
        leaf = x509.load_pem_x509_certificate(source.cert.read_bytes())
        names = names_of(leaf)
        expected = certificate_hash(leaf.public_bytes(Encoding.DER))
    except (OSError, ValueError) as exc:
        raise ConfigError(f'{file}: {source.cert} cannot be read: {exc} (key "{source.key}")') from exc
    absent = [host for host in source.hosts if not covers(names, host)]
    if absent:
        raise ConfigError(
            f'{file}: {source.cert} is not for {absent[0]} (key "{source.key}.hosts")',
            hint=f"It names {', '.join(names) or 'no host'}.",
        )
    hosts = tuple(source.hosts) or names
    return Certificate(
        name=hosts[0] if hosts else source.cert.stem,
        hosts=hosts,
        expires=leaf.not_valid_after_utc.timestamp(),
        begins=leaf.not_valid_before_utc.timestamp(),
        hash=expected,
        context=context,
    )


def load_chain(context: ssl.SSLContext, source: Source, file: Path) -> None:
    """Raises ConfigError that names the file and the key."""
    for path in (source.cert, source.private_key):
        if not path.is_file():
            raise ConfigError(f'{file}: there is no file {path} (key "{source.key}")')
    try:
        # A pass phrase would be asked for at the terminal; an empty one is refused instead.
        context.load_cert_chain(source.cert, source.private_key, password=lambda: b"")
    except (ssl.SSLError, OSError) as exc:
        raise ConfigError(
            f'{file}: {source.cert} and {source.private_key} do not load: {exc} (key "{source.key}")',
            hint="Both are PEM, the key belongs to the first certificate and has no pass phrase.",
        ) from exc


def names_of(leaf: x509.Certificate) -> tuple[str, ...]:
    """The names that a certificate is for, in lower case, wildcards as they are; then its addresses."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    found = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return tuple(dict.fromkeys(found))


def covers(names: Iterable[str], host: str) -> bool:
    """Whether a certificate for `names` is good for `host` (RFC 9525 §6.3: a wildcard stands for one label)."""
    return host in (known := set(names)) or "*." + host.partition(".")[2] in known


class Certificates:
    """What is served now."""

    def __init__(self) -> None:
        self._all: tuple[Certificate, ...] = ()
        self._by_host: dict[str, ssl.SSLContext] = {}
        self._hashes: WeakKeyDictionary[ssl.SSLContext, bytes] = WeakKeyDictionary()

    def load(self, file: Path, wanted: Sequence[Source]) -> None:
        """Replace all. Raises ConfigError, and keeps what there was."""
        found = [load(source, file) for source in wanted]
        by_host: dict[str, ssl.SSLContext] = {}
        named: set[str] = set()
        for source, certificate in zip(wanted, found, strict=True):
            for host in certificate.hosts:
                if source.hosts and host in named:
                    raise ConfigError(f'{file}: {host} has two certificates (key "{source.key}.hosts")')
                if source.hosts:
                    named.add(host)
                    by_host[host] = certificate.context
                by_host.setdefault(host, certificate.context)
        for certificate in found:
            self._hashes[certificate.context] = certificate.hash
        self._all, self._by_host = tuple(found), by_host

    def __iter__(self) -> Iterator[Certificate]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def several(self) -> bool:
        """Whether the client's name decides."""
        return len(self._all) > 1

    def choose(self, name: str | None) -> ssl.SSLContext | None:
        """For a connection that asks for `name`; None when there is no certificate at all."""
        if name is not None and self.several:
            found = self._by_host.get(name) or self._by_host.get("*." + name.partition(".")[2])
            if found is not None:
                return found
        return self._all[0].context if self._all else None

    def hash_of(self, context: object) -> bytes:
        """Of the certificate in a context that `choose` gave; b"" for others."""
        return self._hashes.get(context, b"") if isinstance(context, ssl.SSLContext) else b""

    def expiries(self) -> list[tuple[str, float]]:
        """(name, seconds that are left) of each."""
        now = time.time()
        return [(certificate.name, certificate.expires - now) for certificate in self._all]
