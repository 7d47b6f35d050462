"""Certificates by ACME (RFC 8555): ordered, proven, kept, renewed.

Each host has a certificate of its own, so that one that fails holds up no other. What is kept is a folder:

    account.key, account.json     the account, one for the directory
    HOST.pem                      chain and key in one file, replaced whole: they never disagree (`_.` for `*.`)
    attempts.json                 failures, so that a restart does not begin to try again at once
    challenges/TOKEN              what http-01 is to be answered; any process of the edge answers

The loop looks at each host in turn:

    no certificate, or two thirds of its life are over (and a bit, by its serial number) ──▶ attempt
    attempt: order ─▶ authorization ─▶ challenge ─▶ finalize ─▶ check what came ─▶ store ─▶ serve
    failed:  the old certificate stays; the next attempt is later each time, up to RETRY_MOST

The client library blocks, so an attempt runs in a thread of its own; the edge goes on meanwhile, and stopping it does
not wait. One process attempts at a time (a lock in the folder); the others see the new file. What the server returns is
trusted as far as it fits: our key, our host, a time that includes now.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import orjson
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from guestpass import __version__
from guestpass.config import AcmeSection, EdgeConfig
from guestpass.edge.certificates import Source, covers, names_of
from guestpass.edge.signing_keys import write_private
from guestpass.errors import ConfigError, GuestpassError

if TYPE_CHECKING:
    from acme.client import ClientV2
    from acme.messages import ChallengeBody

log = logging.getLogger("guestpass.edge.acme")

T = TypeVar("T")

CHALLENGE_PREFIX = "/.well-known/acme-challenge/"

# RFC 8555 §8.3: base64url, at least 128 bits.
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,256}")

# A certificate is renewed when this much of its life is left, as its issuers advise; of that, up to a tenth is waited
# so that certificates which were issued together are not renewed together.
RENEW_LEFT = 1 / 3
SPREAD = 0.1

# The first retry, and the most that is waited: a fault of the operator's is mended in hours, and Let's Encrypt allows
# five failed validations an hour for a name.
RETRY_FIRST = 60.0
RETRY_MOST = 6 * 3600.0
# Who was told to slow down does.
RETRY_LIMITED = 3600.0

# How often the folder is looked at: another process may have renewed.
LOOK_SECONDS = 60.0

# One request to the server; one order, from its first request to its certificate.
REQUEST_SECONDS = 20
ORDER_SECONDS = 300.0

# Of a hook's output this much is logged.
HOOK_OUTPUT = 500

# Answers to challenges that are as old as this are nobody's any more.
LEFT_BEHIND = 86_400.0

# A certificate may begin a little in the future of a clock that is behind.
SKEW = 300.0


class AcmeFailed(GuestpassError):
    """An attempt failed. The message says at what, in one line."""

    code = "acme_failed"

    def __init__(self, message: str, *, limited: bool = False) -> None:
        super().__init__(" ".join(message.split())[:500])
        self.limited = limited


@dataclass(frozen=True, slots=True)
class Stored:
    """A certificate in the folder that loads and is for its host."""

    path: Path
    begins: float
    expires: float
    serial: int

    @property
    def renew_at(self) -> float:
        left = (self.expires - self.begins) * RENEW_LEFT
        digest = hashlib.sha256(str(self.serial).encode("ascii")).digest()
        return self.expires - left + left * SPREAD * int.from_bytes(digest[:4], "big") / (1 << 32)


class Storage:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._challenges = folder / "challenges"

    def prepare(self) -> None:
        """Raises ConfigError."""
        try:
            for folder in (self.folder, self._challenges):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in self._challenges.iterdir():  # by a process that was killed in the middle
                if left.stat().st_mtime < time.time() - LEFT_BEHIND:
                    left.unlink(missing_ok=True)
        except OSError as exc:
            raise ConfigError(
                f'cannot make the folder {self.folder}: {exc.strerror} (key "acme.storage")'
            ) from exc

    def path(self, host: str) -> Path:
        return self.folder / f"{host.replace('*', '_')}.pem"

    def stored(self, host: str) -> Stored | None:
        """None when there is none, or none that may be served."""
        path = self.path(host)
        try:
            data = path.read_bytes()
            return check(data, host, path)
        except FileNotFoundError:
            return None
        except (OSError, AcmeFailed) as exc:
            log.error("%s is not used: %s", path, exc)
            return None

    def source(self, host: str) -> Source | None:
        found = self.stored(host)
        return Source(found.path, found.path, "acme.hosts", (host,)) if found is not None else None

    # ── challenges ───────────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, token: str) -> str | None:
        """What the challenge with this token is to be answered."""
        if not TOKEN.fullmatch(token):
            return None
        try:
            return (self._challenges / token).read_text("ascii")
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def challenge(self, token: str, answer: str) -> Iterator[None]:
        """Answer it for the length of a `with` block."""
        if not TOKEN.fullmatch(token):
            raise AcmeFailed("the server's token is not one")
        write_private(self._challenges / token, answer.encode("ascii"))
        try:
            yield
        finally:
            (self._challenges / token).unlink(missing_ok=True)

    # ── attempts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def attempts(self) -> dict[str, tuple[int, float]]:
        """Of each host that failed last: how often in a row, and when to try again."""
        try:
            found = orjson.loads((self.folder / "attempts.json").read_bytes())
            return {str(host): (int(number), float(at)) for host, (number, at) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def set_attempts(self, attempts: Mapping[str, tuple[int, float]]) -> None:
        write_private(self.folder / "attempts.json", orjson.dumps(attempts))

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process may attempt now."""
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)


def check(data: bytes, host: str, path: Path, *, now: float | None = None) -> Stored:
    """A chain and its key, which are for `host`. Raises AcmeFailed. With `now`, the time must be right as well."""
    try:
        leaf = x509.load_pem_x509_certificates(data)[0]
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as exc:
        raise AcmeFailed(f"no certificate with its key: {exc}") from exc
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise AcmeFailed("the certificate is for another key")
    if not covers(names_of(leaf), host):
        raise AcmeFailed(f"the certificate is for {', '.join(names_of(leaf)) or 'no host'}, not for {host}")
    begins, expires = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    if now is not None and not begins - SKEW <= now < expires:
        raise AcmeFailed(
            f"the certificate is good from {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc}"
        )
    return Stored(path, begins, expires, leaf.serial_number)


class Acme:
    """`[acme]` at work. `start`, then `stop`."""

    def __init__(
        self,
        config: EdgeConfig,
        section: AcmeSection,
        *,
        changed: Callable[[], bool],
        count: Callable[[str], None] = lambda outcome: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`changed()` is called when there is a new certificate, again and again until it says that it is served;
        `count(outcome)` after each attempt."""
        import_client()
        self.section = section
        self.storage = Storage(config.acme_storage)
        self.storage.prepare()
        self._config = config
        self._changed = changed
        self._count = count
        self._now = now
        self._errors: dict[str, str] = {}
        self._seen: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._look = asyncio.Event()

    def sources(self) -> list[Source]:
        """The certificates that there are, in the order of `hosts`."""
        found = [self.storage.source(host) for host in self.section.hosts]
        return [source for source in found if source is not None]

    def answer(self, host: str, target: str) -> str | None:
        """What a request for `target` at `host` (as in Host) is answered, if it is a challenge of ours."""
        if not target.startswith(CHALLENGE_PREFIX):
            return None
        name = host.lower().rpartition(":")[0] if re.search(r":\d*$", host) else host.lower()
        if name not in self.section.hosts:
            return None
        return self.storage.answer(target[len(CHALLENGE_PREFIX) :])

    def status(self) -> dict[str, str]:
        """What a person wants to know of each host."""
        told = {}
        for host in self.section.hosts:
            stored = self.storage.stored(host)
            if stored is None:
                text = "no certificate yet"
            else:
                text = f"until {datetime.fromtimestamp(stored.expires).astimezone():%Y-%m-%d %H:%M %Z}"
            told[host] = f"{text}; {self._errors[host]}" if host in self._errors else text
        return told

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="acme")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def hurry(self) -> None:
        """Look now (SIGHUP): who was told to wait tries at once."""
        with contextlib.suppress(ConfigError):  # said again, and louder, by the attempt
            self.storage.set_attempts({})
        self._look.set()

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # a loop that ended would let everything expire
                log.exception("certificates were not looked at")
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._look.wait()

    async def look(self) -> None:
        """Once: attempt what is due, and serve what is new."""
        self._serve()
        for host in self.section.hosts:
            if not self.due(host):
                continue
            with self.storage.lock() as free:
                if free and self.due(host):  # another process may have been quicker
                    await self._attempt(host)

    def _serve(self) -> None:
        stamps = self._stamps()
        if stamps != self._seen and self._changed():
            self._seen = stamps

    def due(self, host: str) -> bool:
        now = self._now()
        stored = self.storage.stored(host)
        _, retry_at = self.storage.attempts().get(host, (0, 0.0))
        return now >= retry_at and (stored is None or now >= stored.renew_at)

    async def _attempt(self, host: str) -> None:
        attempts = self.storage.attempts()
        failures, _ = attempts.pop(host, (0, 0.0))
        try:
            data = await in_thread(lambda: Order(self._config, self.section, self.storage, host).run())
            check(data, host, self.storage.path(host), now=self._now())
            write_private(self.storage.path(host), data)
        except GuestpassError as exc:
            limited = isinstance(exc, AcmeFailed) and exc.limited
            # Between half and all of it, so that edges which failed together do not come back together.
            wait = min(RETRY_FIRST * 2**failures, RETRY_MOST) * random.uniform(0.5, 1)
            wait = max(wait, RETRY_LIMITED) if limited else wait
            attempts[host] = (failures + 1, self._now() + wait)
            self._errors[host] = exc.message
            log.error(
                "no certificate for %s: %s; another attempt in %d minutes", host, exc.message, wait / 60 + 1
            )
            self._count("failed")
        else:
            self._errors.pop(host, None)
            log.info("a new certificate for %s", host)
            self._count("issued")
            self._serve()
        self.storage.set_attempts(attempts)

    def _stamps(self) -> dict[str, int]:
        found = {}
        for host in self.section.hosts:
            with contextlib.suppress(OSError):
                found[host] = self.storage.path(host).stat().st_mtime_ns
        return found


class Order:
    """One certificate for one host, from the order to the file's content. Blocks."""

    def __init__(self, config: EdgeConfig, section: AcmeSection, storage: Storage, host: str) -> None:
        self._config = config
        self._section = section
        self._storage = storage
        self._host = host

    def run(self) -> bytes:
        """Chain and key. Raises AcmeFailed, ConfigError."""
        from acme import errors, messages
        from josepy.errors import Error as JoseError
        from requests.exceptions import RequestException

        try:
            return self._run()
        except messages.Error as exc:
            if exc.code == "accountDoesNotExist":  # another server, or one that has forgotten
                (self._storage.folder / "account.json").unlink(missing_ok=True)
            raise AcmeFailed(
                f"the server refused: {exc.detail or exc.code}", limited=exc.code == "rateLimited"
            ) from exc
        except errors.ValidationError as exc:
            raise AcmeFailed(f"the challenge failed: {_problems(exc)}") from exc
        except errors.IssuanceError as exc:
            raise AcmeFailed(f"the server refused the order: {exc.error.detail or exc.error.code}") from exc
        except errors.TimeoutError as exc:
            raise AcmeFailed(f"the server was not done within {ORDER_SECONDS:g} s") from exc
        except RequestException as exc:
            raise AcmeFailed(f"{self._section.directory} cannot be reached: {type(exc).__name__}") from exc
        except errors.ClientError as exc:
            status = getattr(exc.args[0] if exc.args else None, "status_code", None)
            raise AcmeFailed(f"the server answered {status or exc}") from exc
        except (errors.Error, JoseError, ValueError, KeyError, AttributeError, TypeError) as exc:
            # The library takes what the server sends for what it should be, and fails in many ways when it is not.
            raise AcmeFailed(f"the server's answer makes no sense: {exc!r}") from exc

    def _run(self) -> bytes:
        from acme.messages import STATUS_VALID

        client = self._client()
        key, csr = self._request()
        order = client.new_order(csr)
        deadline = datetime.now() + timedelta(seconds=ORDER_SECONDS)
        with contextlib.ExitStack() as proofs:
            for authorization in order.authorizations:
                if authorization.body.status == STATUS_VALID:  # proven not long ago
                    continue
                challenge = self._challenge(authorization.body.challenges)
                response, answer = challenge.response_and_validation(client.net.key)
                proofs.enter_context(self._proof(client, challenge, answer))
                client.answer_challenge(challenge, response)
            order = client.poll_authorizations(order, deadline)
        order = client.finalize_order(order, deadline)
        return order.fullchain_pem.encode("ascii") + key

    def _challenge(self, offered: list[ChallengeBody]) -> ChallengeBody:
        for challenge in offered:
            if challenge.chall.typ == self._section.challenge:
                return challenge
        raise AcmeFailed(f"the server does not offer {self._section.challenge} for {self._host}")

    def _request(self) -> tuple[bytes, bytes]:
        """A new key and a signing request for the host, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(self._host)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        return _key_pem(key), csr.public_bytes(serialization.Encoding.PEM)

    # ── the account ──────────────────────────────────────────────────────────────────────────────────────────────

    def _client(self) -> ClientV2:
        from acme.client import ClientNetwork, ClientV2
        from acme.errors import ConflictError
        from acme.messages import NewRegistration, Registration, RegistrationResource
        from josepy.jwa import ES256
        from josepy.jwk import JWKEC

        section = self._section
        verify: Any = str(self._config.resolve(section.ca)) if section.ca is not None else True
        net = ClientNetwork(
            JWKEC(key=self._account_key()),
            alg=ES256,
            verify_ssl=verify,  # a file is as good for requests
            user_agent=f"guestpass/{__version__}",
            timeout=REQUEST_SECONDS,
        )
        client = ClientV2(ClientV2.get_directory(section.directory, net), net)
        path = self._storage.folder / "account.json"
        try:
            known = orjson.loads(path.read_bytes())
        except (OSError, ValueError):
            known = {}
        if known.get("directory") == section.directory:
            net.account = RegistrationResource(uri=known["uri"], body=Registration())
            return client
        contact = NewRegistration.from_data(email=section.email or None, terms_of_service_agreed=True)
        try:
            uri = client.new_account(contact).uri
        except ConflictError as exc:  # we have been here: the key is the account
            uri = exc.location
            net.account = RegistrationResource(uri=uri, body=Registration())
        write_private(path, orjson.dumps({"directory": section.directory, "uri": uri}))
        return client

    def _account_key(self) -> ec.EllipticCurvePrivateKey:
        path = self._storage.folder / "account.key"
        if not path.exists():
            write_private(path, _key_pem(ec.generate_private_key(ec.SECP256R1())))
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as exc:
            raise ConfigError(
                f"{path} is no private key", hint="Remove it to have a new account made."
            ) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{path} is no EC key", hint="Remove it to have a new account made.")
        return key

    # ── proofs ───────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _proof(self, client: ClientV2, challenge: ChallengeBody, answer: str) -> Iterator[None]:
        """What the server looks for is there, for the length of a `with` block."""
        if self._section.challenge == "http-01":
            with self._storage.challenge(challenge.chall.encode("token"), answer):
                yield
            return
        name = challenge.chall.validation_domain_name(self._host.removeprefix("*."))
        run_hook(self._section, self._config.folder, "add", name, answer)
        try:
            if self._section.dns_seconds:
                time.sleep(self._section.dns_seconds)
            yield
        finally:
            try:
                run_hook(self._section, self._config.folder, "remove", name, answer)
            except AcmeFailed as exc:  # the certificate is as good with the record left behind
                log.warning("%s", exc)


def run_hook(section: AcmeSection, folder: Path, action: str, name: str, value: str) -> None:
    """Have the operator's command add or remove a TXT record; it returns when the record can be seen. No shell: the
    arguments are the configured ones, with {action}, {name} and {value} filled in. Raises AcmeFailed."""
    words = {"action": action, "name": name, "value": value}
    argv = [re.sub(r"\{(action|name|value)\}", lambda m: words[m[1]], part) for part in section.hook]
    env = {key: text for key, text in os.environ.items() if not key.startswith("GUESTPASS_")}
    env |= {f"GUESTPASS_ACME_{key.upper()}": text for key, text in words.items()}
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=env,
                start_new_session=True,
            )
        except OSError as exc:
            raise AcmeFailed(f"the hook {argv[0]} cannot be run: {exc.strerror}") from exc
        try:
            status: int | None = process.wait(section.hook_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        output.seek(0)
        said = output.read(HOOK_OUTPUT).decode("utf-8", "replace").replace(value, "…").strip()
    if said:
        log.info("the hook said on %s %s: %s", action, name, said)
    if status is None:
        raise AcmeFailed(f"the hook ({action} {name}) was not done within {section.hook_seconds:g} s")
    if status != 0:
        raise AcmeFailed(f"the hook ({action} {name}) ended with status {status}")


def import_client() -> None:
    """Raises ConfigError when the library is not installed."""
    try:
        import acme.client  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            "[acme] needs the ACME client, which is not installed", hint="pip install 'guestpass[acme]'"
        ) from exc


async def in_thread(work: Callable[[], T]) -> T:
    """`work()` in a thread that nobody waits for at exit, unlike those of the loop's executor."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast(T, result))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as exc:
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="acme", daemon=True).start()
    return await done


def _problems(exc: Any) -> str:
    """What the server said of each challenge that failed."""
    told = [
        str(challenge.error.detail or challenge.error.code)
        for authorization in exc.failed_authzrs
        for challenge in authorization.body.challenges
        if challenge.error is not None
    ]
    return "; ".join(told) or "no reason was given"


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
