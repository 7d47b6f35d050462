"""`email-code`: whoever can read a mail to an address owns it. The visitor types their address, is sent eight
digits, and types them into the browser that asked.

What an outsider learns must not depend on who is invited, so:

- the answer to an address is always the same form, given before anybody looks whether the address is invited.
  That is looked up afterwards, in the background; only then a code is made to count and mail is queued. For
  an address that is not invited the same record is written, with a hash that no code has;
- limits count requests, not mails, so that reaching one says nothing either;
- a wrong code, an old code and an address that is not invited are refused in the same words.

Guessing: a code is one of 10⁸, lives ten minutes, belongs to one flow (so that nobody can use up another
person's tries) and allows five tries; an address gets at most three codes an hour. That is 15 tries an hour
for one address however many flows are used: 3.6 in a million a day. Who began with a mailed link has three
codes an hour of that link's own: else anybody who knows an address could ask for its codes and so keep its
owner out. All counters are added to before the comparison, atomically, so parallel guesses gain nothing. Of a
code only a keyed hash is stored, with a key that is not in the store: of 10⁸ a plain hash would be no secret
to who reads a backup.
"""

from __future__ import annotations

import hmac
import re
import secrets
import unicodedata
from collections.abc import Mapping

from pydantic import Field as Setting

from guestpass.plugin import (
    Action,
    Authenticator,
    Denied,
    Event,
    Field,
    Form,
    Host,
    Identity,
    InvalidEmail,
    Message,
    Passkey,
    PluginConfig,
    SignIn,
    Step,
    canonical_address,
)
from guestpass_plugins.authenticate.passkeys import Passkeys

__all__ = ["EmailCode"]

CODE_DIGITS = 8
# NIST SP 800-63B §5.1.3.2: an out-of-band secret is valid for at most ten minutes.
CODE_SECONDS = 600.0
# A person mistypes once or twice; each further try only helps who guesses.
MAX_TRIES = 5
# A flow's tries are remembered for longer than any flow lives.
TRIES_SECONDS = 7200.0
HOUR = 3600.0
# A third mail may be needed when one is slow; more would make this a way to bother somebody.
CODES_PER_ADDRESS = 3
# One network sends this many people to sign in within an hour, an office behind one address included.
REQUESTS_PER_CLIENT = 60

# For how long a remembered device stands for the code. Addresses change hands; accounts of those who left linger for
# about as long.
PASSKEY_DAYS = 90
# A device is remembered right after the code; who comes back to that page later types a new one.
OFFER_SECONDS = 900.0

# What people's mail programs put between digits: any white space, hyphens and dashes.
SEPARATORS = re.compile(r"[\s\u200b\u2060\ufeff\-\u2010-\u2015\u2212.]+")

WRONG_CODE = "That code is not right, or it is too old. Check the newest mail that you have."
TOO_MANY_CODES = (
    "Too many codes were asked for. Use the newest one that you have, begin with the link in your invitation, "
    "or try again in an hour."
)
UNKNOWN_DEVICE = (
    "That device does not prove an address here any more. Get a code; then it can be remembered again."
)
START_AGAIN = "That were too many tries. Start again to get a new code."


class EmailCode(Authenticator):
    """Proves an address with a typed code."""

    label = "Get a code by email"

    class Config(PluginConfig):
        requests_per_client: int = Setting(default=REQUESTS_PER_CLIENT, ge=1)
        passkeys: bool = True
        passkey_days: int = Setting(default=PASSKEY_DAYS, ge=1, le=400)

    async def start(self, host: Host) -> None:
        await super().start(host)
        self._code_key = host.derive_key("code")
        self._counter_key = host.derive_key("counter")
        self._passkeys = Passkeys(host, self.config.passkey_days) if self.config.passkeys else None

    async def begin(self, sign_in: SignIn) -> Step:
        return self._ask_address(sign_in)

    async def prove(self, sign_in: SignIn, email: str) -> Step:
        if not await self._may_ask(sign_in, email):
            return self._ask_code(email, TOO_MANY_CODES, given=True)
        self._send_code(sign_in, email)
        return self._ask_code(email, given=True)

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        email = sign_in.state.get("email")
        given = sign_in.state.get("given") is True
        action = params.get("action", "")
        if not isinstance(email, str):
            if params.get("credential"):
                return await self._take_passkey(sign_in, params["credential"])
            return await self._take_address(sign_in, params.get("email", ""))
        if "proven" in sign_in.state:
            return await self._take_answer(sign_in, email, params)
        if action == "other" and not given:
            await self.host.storage.delete(f"code:{sign_in.flow_id}")
            return self._ask_address(sign_in)
        if action == "resend":
            return await self._send_again(sign_in, email, given)
        return await self._take_code(sign_in, email, params, given)

    # ── the address ─────────────────────────────────────────────────────────────────────────────────────────

    async def _take_address(self, sign_in: SignIn, typed: str) -> Step:
        try:
            email = canonical_address(typed.strip())
        except InvalidEmail as exc:
            return self._ask_address(sign_in, typed[:320], f"{exc.message.rstrip('.')}. {exc.hint}".strip())
        if not await self._may_ask(sign_in, email):
            return self._ask_address(sign_in, email, TOO_MANY_CODES)
        self._send_code(sign_in, email)
        return self._ask_code(email)

    async def _send_again(self, sign_in: SignIn, email: str, given: bool) -> Step:
        if not await self._may_ask(sign_in, email):
            return self._ask_code(email, TOO_MANY_CODES, given=given)  # the code that is out stays good
        self._send_code(sign_in, email)
        return self._ask_code(email, again=True, given=given)

    async def _may_ask(self, sign_in: SignIn, email: str) -> bool:
        """Count a request for a code; the same for every address."""
        network = self._count_as(sign_in.client.network)
        by_client = await self.host.storage.add(f"client:{network}", ttl=HOUR)
        if by_client > self.config.requests_per_client:
            return False
        # By link *and* address, whichever is typed: what is left does not tell whose link it is.
        whose = self._count_as(f"{sign_in.link}\0{email}" if sign_in.link else email)
        by_address = await self.host.storage.add(f"address:{whose}", ttl=HOUR)
        return by_address <= CODES_PER_ADDRESS

    def _count_as(self, what: str) -> str:
        """Addresses that were merely typed are not stored."""
        return hmac.digest(self._counter_key, what.encode(), "sha256").hex()

    # ── the code ────────────────────────────────────────────────────────────────────────────────────────────

    def _send_code(self, sign_in: SignIn, email: str) -> None:
        self.host.spawn(self._prepare(sign_in, email), name="send a code")

    async def _prepare(self, sign_in: SignIn, email: str) -> None:
        """Make this flow's live code and mail it, if the address is invited."""
        code = f"{secrets.randbelow(10**CODE_DIGITS):0{CODE_DIGITS}d}"
        invited = await sign_in.is_invited(email)
        hashed = self._hash(sign_in.flow_id, email, code) if invited else secrets.token_hex(32)
        expires = self.host.now() + CODE_SECONDS
        await self.host.storage.set(
            f"code:{sign_in.flow_id}", {"hash": hashed, "expires": expires}, ttl=CODE_SECONDS
        )
        if not invited:
            share_id = sign_in.share.id if sign_in.share is not None else None
            detail = {"reason": "not_invited", "client": sign_in.client.address}
            self.host.emit(Event("signin.denied", self.host.now(), share_id=share_id, detail=detail))
            return
        await self.host.notify(_mail(email, code, sign_in, expires))

    async def _take_code(self, sign_in: SignIn, email: str, params: Mapping[str, str], given: bool) -> Step:
        code = SEPARATORS.sub("", unicodedata.normalize("NFKC", params.get("code", "")))
        if not (len(code) == CODE_DIGITS and code.isascii() and code.isdigit()):
            error = f"The code has {CODE_DIGITS} digits. Type or paste all of them."
            return self._ask_code(email, error, given=given)
        key = f"code:{sign_in.flow_id}"
        tries = await self.host.storage.add(f"tries:{sign_in.flow_id}", ttl=TRIES_SECONDS)
        if tries > MAX_TRIES:
            await self.host.storage.delete(key)
            raise Denied(START_AGAIN)
        if await self._is_right(key, self._hash(sign_in.flow_id, email, code)):
            return await self._proven(sign_in, email, can_remember=params.get("passkeys") == "1")
        if tries == MAX_TRIES:
            await self.host.storage.delete(key)
            raise Denied(START_AGAIN)
        left = MAX_TRIES - tries
        error = f"{WRONG_CODE} You have {left} {'try' if left == 1 else 'tries'} left."
        return self._ask_code(email, error, given=given)

    async def _is_right(self, key: str, hashed: str) -> bool:
        live = await self.host.storage.get(key)
        wanted = (
            live["hash"] if live is not None and live["expires"] > self.host.now() else secrets.token_hex(32)
        )
        if not hmac.compare_digest(wanted, hashed):
            return False
        taken = await self.host.storage.take(key)  # of two browsers' tabs with the right code one gets in
        return taken is not None and hmac.compare_digest(taken["hash"], hashed)

    def _hash(self, flow_id: str, email: str, code: str) -> str:
        return hmac.digest(self._code_key, f"{flow_id}\0{email}\0{code}".encode(), "sha256").hex()

    # ── a remembered device ─────────────────────────────────────────────────────────────────────────────────────

    async def _proven(self, sign_in: SignIn, email: str, *, can_remember: bool) -> Step:
        """The code was right. Where the browser has passkeys, it may be remembered; where the address has some, they
        can be forgotten: who lost a device signs in with another one."""
        now = self.host.now()
        if self._passkeys is None:
            return Identity(email, self.name, proven=now)
        exist = await self._passkeys.exist(email)
        offer = self._passkeys.to_make(sign_in, email) if can_remember else None
        if offer is None and not exist:
            return Identity(email, self.name, proven=now)
        intro = (
            "With a passkey this device proves your address the next time, without a code. Do this only on a device "
            "of your own."
            if offer is not None
            else "There are devices that prove your address without a code."
        )
        return Form(
            title="Your devices" if offer is None else "Remember this device?",
            intro=intro,
            submit="Continue without" if offer is not None else "Continue",
            actions=(Action("forget", "Forget the devices that were remembered"),) if exist else (),
            passkey=offer,
            state={"email": email, "proven": now},
        )

    async def _take_answer(self, sign_in: SignIn, email: str, params: Mapping[str, str]) -> Step:
        proven = float(sign_in.state["proven"])
        if self._passkeys is None or self.host.now() - proven > OFFER_SECONDS:
            raise Denied("That took too long. Start again to get a new code.")
        if params.get("action") == "forget":
            await self._passkeys.forget(email)
        elif params.get("credential"):
            await self._passkeys.make(sign_in, email, params["credential"], proven)
        return Identity(email, self.name, proven=proven)

    async def _take_passkey(self, sign_in: SignIn, credential: str) -> Step:
        network = self._count_as(sign_in.client.network)
        # An allowance of its own: who has no device to show must not keep those out who have.
        asked = await self.host.storage.add(f"devices-of-client:{network}", ttl=HOUR)
        email = None
        if self._passkeys is not None and asked <= self.config.requests_per_client:
            email = await self._passkeys.use(sign_in, credential)
        if email is None:
            return self._ask_address(sign_in, "", UNKNOWN_DEVICE)
        return Identity(email, self.name, proven=self.host.now())

    # ── the forms ───────────────────────────────────────────────────────────────────────────────────────────

    def _ask_address(self, sign_in: SignIn, typed: str = "", error: str = "") -> Form:
        return Form(
            title="Prove your email address",
            intro="Type the address at which you were invited. We will send it a code.",
            fields=(Field("email", "Your email address", type="email", autocomplete="email", value=typed),),
            submit="Send me a code",
            error=error,
            passkey=self._passkeys.to_use(sign_in) if self._passkeys is not None else None,
        )

    def _ask_code(self, email: str, error: str = "", *, again: bool = False, given: bool = False) -> Form:
        """`given`: the address comes from a provider and cannot be exchanged for another one."""
        other = () if given else (Action("other", "Use another address"),)
        why = "That account does not prove that its address is yours, so one more step. " if given else ""
        intro = f"{why}If this address is invited, a {'new ' if again else ''}code is on its way to {email}."
        return Form(
            title="Enter the code",
            intro=f"{intro} It can take a minute; look in the spam folder too.",
            fields=(
                Field(
                    "code",
                    f"{CODE_DIGITS}-digit code",
                    type="code",
                    autocomplete="one-time-code",
                    hint="Keep this window open: the code works only here.",
                ),
            ),
            submit="Continue",
            error=error,
            passkey=Passkey("probe") if self._passkeys is not None else None,
            actions=(Action("resend", "Send a new code"), *other),
            state={"email": email, "given": True} if given else {"email": email},
        )


def _mail(email: str, code: str, sign_in: SignIn, expires: float) -> Message:
    share = sign_in.share
    what = f"“{_one_line(share.name)}”" if share is not None else "what is shared with you"
    recipient = share.recipient(email) if share is not None else None
    text = (
        f"Your code to open {what}:\n"
        "\n"
        f"    {code[:4]} {code[4:]}\n"
        "\n"
        "Type it into the browser window where you asked for it. It works once, for the next 10 minutes.\n"
        "\n"
        "You did not ask for a code? Then ignore this mail: nobody gets in without it. Do not pass the code on;\n"
        "nobody has a reason to ask you for it.\n"
    )
    return Message(
        kind="code",
        to=email,
        subject="Your sign-in code",
        text=text,
        share_id=share.id if share is not None else None,
        recipient_id=recipient.id if recipient is not None else None,
        expires=expires,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
