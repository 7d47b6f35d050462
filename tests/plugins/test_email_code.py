"""`email-code` against its promises: guessing, flooding, finding out who is invited."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.people import ALICE, CODE, MALLORY, Clock, People, people
from support.scoreboard import LONG, row

from guestpass.plugin import Client, Denied, Form, Identity, Message, SignIn
from guestpass_plugins.authenticate import email_code
from guestpass_plugins.authenticate.email_code import CODE_DIGITS, CODES_PER_ADDRESS, MAX_TRIES, EmailCode


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def edge(tmp_path: Path, clock: Clock) -> AsyncIterator[People]:
    async with people(tmp_path, now=clock) as found:
        yield found


@pytest.fixture
async def way(edge: People) -> EmailCode:
    found = edge.plugins.authenticators[0]
    assert isinstance(found, EmailCode)
    return found


class Visitor:
    """One flow."""

    def __init__(
        self, edge: People, way: EmailCode, flow: str = "f1", client: str = "192.0.2.1", link: str = ""
    ) -> None:
        self._way = way
        self.asked: list[str] = []
        self.sign_in = SignIn(
            flow, None, Client(client), {}, "http://x/callback/email-code", self.is_invited, link
        )

    async def is_invited(self, email: str) -> bool:
        self.asked.append(email)
        return email == ALICE

    async def send(self, **params: str) -> Form:
        step = await self._way.complete(self.sign_in, params)
        assert isinstance(step, Form), step
        self.sign_in = dataclasses.replace(self.sign_in, state=step.state)
        return step

    async def finish(self, code: str) -> Any:
        return await self._way.complete(self.sign_in, {"code": code})


async def done(way: EmailCode) -> None:
    """Until the work in the background is over."""
    host: Any = way.host
    while host._tasks:
        await asyncio.wait(list(host._tasks))


async def test_from_address_to_identity(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    form = await way.begin(visitor.sign_in)
    assert isinstance(form, Form)
    assert [f.name for f in form.fields] == ["email"]
    form = await visitor.send(email=" Alice@EXAMPLE.org")
    assert form.state == {"email": ALICE}
    assert (form.fields[0].type, form.fields[0].autocomplete) == ("code", "one-time-code")
    code = await edge.code()
    identity = await visitor.finish(code)
    assert isinstance(identity, Identity)
    assert (identity.email, identity.provider) == (ALICE, "email-code")
    # Once.
    assert "not right" in (await visitor.send(code=code)).error


@pytest.mark.parametrize(
    "shape", ["{0}{1}", "{0} {1}", " {0}-{1}\n", "{0}–{1}", "{0}\u00a0{1}", "{0}.{1}", "\ufeff{0}\u200b{1}"]
)
async def test_pasting_is_forgiven(edge: People, way: EmailCode, shape: str) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = await edge.code()
    assert isinstance(await visitor.finish(shape.format(*code.split())), Identity)


async def test_full_width_digits(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = (await edge.code()).translate({ord("0") + n: 0xFF10 + n for n in range(10)})
    assert isinstance(await visitor.finish(code), Identity)


@pytest.mark.parametrize("typed", ["", "1234567", "123456789", "1234567a", "١٢٣٤٥٦٧٨"])
async def test_what_is_no_code_costs_no_try(edge: People, way: EmailCode, typed: str) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    for _ in range(MAX_TRIES + 1):
        assert "has 8 digits" in (await visitor.send(code=typed)).error
    assert isinstance(await visitor.finish(await edge.code()), Identity)


@pytest.mark.parametrize(
    "typed", ["", "alice", "a@b@example.org", "alice@example.org\n, bob@example.org", '"a"@example.org']
)
async def test_what_is_no_address_is_said(edge: People, way: EmailCode, typed: str) -> None:
    visitor = Visitor(edge, way)
    form = await visitor.send(email=typed)
    assert form.error
    assert [f.name for f in form.fields] == ["email"]
    await done(way)
    assert visitor.asked == []


# ── guessing ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_day_of_guessing(
    edge: People, way: EmailCode, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attackers, one of whom has the link, from as many networks and in as many sign-ins as they like. What counts
    is how many guesses are compared with a live code."""
    compared = 0
    is_right = EmailCode._is_right

    async def counted(self: EmailCode, key: str, hashed: str) -> bool:
        nonlocal compared
        compared += await self.host.storage.get(key) is not None
        return await is_right(self, key, hashed)

    monkeypatch.setattr(EmailCode, "_is_right", counted)
    hours = 24 if LONG else 4
    for hour in range(hours):
        for number in range(CODES_PER_ADDRESS + 2):
            for link in ("", "the link"):
                name = f"{hour} {number} {link}"
                visitor = Visitor(edge, way, name, client=f"198.51.{hour}.{number}", link=link)
                if (await visitor.send(email=ALICE)).error:
                    continue
                await done(way)
                for _ in range(MAX_TRIES):
                    guess = visitor.finish("00000000")
                    assert not isinstance((await asyncio.gather(guess, return_exceptions=True))[0], Identity)
                with pytest.raises(Denied):
                    await visitor.finish("00000000")
        clock.at += 3600.0
    edge.mail.clear()
    by_day = compared / hours * 24
    by_limits = 24 * 2 * CODES_PER_ADDRESS * MAX_TRIES
    assert 0 < by_day <= by_limits
    success = by_limits / 10**CODE_DIGITS
    row(
        "guessing a code",
        f"{compared} guesses reached a live code in {hours} h of two attackers, one with the link",
        f"success for an address and day {success:.1e} by the limits, {by_day / 10**CODE_DIGITS:.1e} tried",
        "≤ 1e-4",
        ok=success <= 1e-4 and by_day <= by_limits,
        figure=10,
    )


async def test_five_tries_then_the_flow_is_over(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = await edge.code()
    wrong = f"{(int(code.replace(' ', '')) + 1) % 10**8:08d}"
    for left in ("4 tries", "3 tries", "2 tries", "1 try"):
        assert f"You have {left} left" in (await visitor.send(code=wrong)).error
    with pytest.raises(Denied, match="Start again"):
        await visitor.finish(wrong)
    with pytest.raises(Denied, match="Start again"):
        await visitor.finish(code)
    # A new code in the same flow does not help; another flow does.
    visitor.sign_in = dataclasses.replace(visitor.sign_in, state={"email": ALICE})
    await visitor.send(action="resend")
    with pytest.raises(Denied):
        await visitor.finish(await edge.code())
    other = Visitor(edge, way, "f2")
    await other.send(email=ALICE)
    assert isinstance(await other.finish(await edge.code()), Identity)


async def test_guesses_at_the_same_time_gain_nothing(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = (await edge.code()).replace(" ", "")
    guesses = [f"{(int(code) + n) % 10**8:08d}" for n in range(1, 40)]
    answers = await asyncio.gather(*(visitor.finish(g) for g in guesses), return_exceptions=True)
    assert sum(isinstance(a, Form) for a in answers) == MAX_TRIES - 1
    assert sum(isinstance(a, Denied) for a in answers) == len(guesses) - MAX_TRIES + 1


async def test_the_right_code_twice_at_the_same_time_lets_one_in(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = await edge.code()
    answers = await asyncio.gather(*(visitor.finish(code) for _ in range(MAX_TRIES - 1)))
    assert sum(isinstance(a, Identity) for a in answers) == 1


async def test_codes_of_another_flow_are_wrong(edge: People, way: EmailCode) -> None:
    one, two = Visitor(edge, way, "f1"), Visitor(edge, way, "f2")
    await one.send(email=ALICE)
    first = await edge.code()
    await two.send(email=ALICE)
    await edge.code()
    assert "not right" in (await two.send(code=first)).error
    assert isinstance(await one.finish(first), Identity), "the other flow's mistakes cost this one"


async def test_a_code_lives_ten_minutes(edge: People, way: EmailCode, clock: Clock) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = await edge.code()
    clock.at += 601
    assert "too old" in (await visitor.send(code=code)).error


async def test_a_new_code_replaces_the_old_one(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    old = await edge.code()
    form = await visitor.send(action="resend")
    assert "a new code is on its way" in form.intro
    new = await edge.code()
    assert "not right" in (await visitor.send(code=old)).error
    assert isinstance(await visitor.finish(new), Identity)


async def test_another_address(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    code = await edge.code()
    form = await visitor.send(action="other")
    assert [f.name for f in form.fields] == ["email"]
    await visitor.send(email=MALLORY)
    assert "not right" in (await visitor.send(code=code)).error, "a code for one address proved another"


async def test_what_is_stored_gives_no_code_away(edge: People, way: EmailCode, tmp_path: Path) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=MALLORY)
    await done(way)
    await visitor.send(action="other")
    await visitor.send(email=ALICE)
    code = (await edge.code()).replace(" ", "")
    stored = b"".join(p.read_bytes() for p in tmp_path.glob("edge.db*"))
    assert code.encode() not in stored
    assert MALLORY.encode() not in stored, "an address that was merely typed is kept"
    record = await way.host.storage.get("code:f1")
    import hashlib

    assert record["hash"] != hashlib.sha256(code.encode()).hexdigest()
    assert len(record["hash"]) == 64


async def test_codes_are_eight_digits_and_differ(edge: People, way: EmailCode) -> None:
    found = set()
    for number in range(20):
        visitor = Visitor(edge, way, f"f{number}")
        await way._prepare(visitor.sign_in, ALICE)
        message = edge.mail.pop()
        code = CODE.search(message.text)
        assert code
        found.add(code[1])
    assert len(found) == 20


# ── who is invited ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_answer_comes_before_anybody_looks(edge: People, way: EmailCode) -> None:
    """`is_invited` cannot be felt: the form is there before it is even asked."""
    visitor = Visitor(edge, way)
    asked = asyncio.Event()
    go_on = asyncio.Event()

    async def slow(email: str) -> bool:
        asked.set()
        await go_on.wait()
        return True

    visitor.sign_in = dataclasses.replace(visitor.sign_in, is_invited=slow)
    form = await visitor.send(email=ALICE)
    assert "If this address is invited" in form.intro
    assert not edge.mail
    go_on.set()
    await asked.wait()
    await edge.code()


async def test_the_same_forms_and_the_same_records(edge: People, way: EmailCode) -> None:
    seen = []
    for flow, email in (("f1", ALICE), ("f2", MALLORY)):
        visitor = Visitor(edge, way, flow)
        forms = [await visitor.send(email=email)]
        await done(way)
        record = await way.host.storage.get(f"code:{flow}")
        forms += [await visitor.send(code="00000000"), await visitor.send(action="resend")]
        shown = [re.sub(re.escape(email), "ADDRESS", repr(f)) for f in forms]
        seen.append((shown, sorted(record), len(record["hash"])))
    assert seen[0] == seen[1]
    await done(way)
    assert {m.to for m in edge.mail} == {ALICE}


async def test_no_code_is_right_for_who_is_not_invited(
    edge: People, way: EmailCode, monkeypatch: Any
) -> None:
    monkeypatch.setattr(email_code.secrets, "randbelow", lambda limit: 12345678)
    visitor = Visitor(edge, way)
    await visitor.send(email=MALLORY)
    await done(way)
    assert "not right" in (await visitor.send(code="12345678")).error
    owner = Visitor(edge, way, "f2")
    await owner.send(email=ALICE)
    assert isinstance(await owner.finish(await edge.code()), Identity)


# ── flooding ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("email", [ALICE, MALLORY])
async def test_three_codes_an_hour_for_an_address(
    edge: People, way: EmailCode, clock: Clock, email: str
) -> None:
    for number in range(CODES_PER_ADDRESS):
        form = await Visitor(edge, way, f"f{number}", f"192.0.2.{number}").send(email=email)
        assert not form.error
    form = await Visitor(edge, way, "f9", "198.51.100.1").send(email=email.upper())
    assert "Too many codes were asked for" in form.error
    await done(way)
    assert len(edge.mail) == (CODES_PER_ADDRESS if email == ALICE else 0)
    clock.at += 3601
    assert not (await Visitor(edge, way, "f10").send(email=email)).error


@pytest.mark.parametrize("email", [ALICE, MALLORY])
async def test_strangers_cannot_use_up_the_codes_of_who_has_a_link(
    edge: People, way: EmailCode, email: str
) -> None:
    for number in range(CODES_PER_ADDRESS + 1):
        form = await Visitor(edge, way, f"f{number}", "198.51.100.1").send(email=email)
    assert "begin with the link in your invitation" in form.error
    for number in range(CODES_PER_ADDRESS):
        form = await Visitor(edge, way, f"g{number}", link="d1").send(email=email)
        assert not form.error
    assert (await Visitor(edge, way, "g9", link="d1").send(email=email)).error
    assert not (await Visitor(edge, way, "h1", link="d2").send(email=email)).error


async def test_a_refused_resend_leaves_the_last_code_good(edge: People, way: EmailCode) -> None:
    visitor = Visitor(edge, way)
    await visitor.send(email=ALICE)
    for _ in range(CODES_PER_ADDRESS - 1):
        await visitor.send(action="resend")
        await done(way)
    form = await visitor.send(action="resend")
    assert "Too many codes" in form.error
    message: Message = edge.mail[-1]
    code = CODE.search(message.text)
    assert code
    assert isinstance(await visitor.finish(code[1]), Identity)


async def test_requests_at_the_same_time_are_all_counted(edge: People, way: EmailCode) -> None:
    visitors = [Visitor(edge, way, f"f{n}") for n in range(12)]
    forms = await asyncio.gather(*(v.send(email=ALICE) for v in visitors))
    assert sum(not f.error for f in forms) == CODES_PER_ADDRESS
    await done(way)
    assert len(edge.mail) == CODES_PER_ADDRESS


async def test_a_cap_for_each_client(edge: People, way: EmailCode) -> None:
    way.config = way.config.model_copy(update={"requests_per_client": 4})
    visitors = [Visitor(edge, way, f"f{n}", f"2001:db8:1:2::{n}") for n in range(6)]
    forms = [await v.send(email=f"p{n}@example.org") for n, v in enumerate(visitors)]
    assert [bool(f.error) for f in forms] == [False] * 4 + [True] * 2
    assert not (await Visitor(edge, way, "f9", "2001:db8:1:3::1").send(email=ALICE)).error


async def test_the_mail(edge: People, way: EmailCode) -> None:
    share, _ = await edge.share(name="Sales  and more")
    visitor = Visitor(edge, way)
    visitor.sign_in = dataclasses.replace(visitor.sign_in, share=share)
    await visitor.send(email=ALICE)
    await done(way)
    (message,) = edge.mail
    assert (message.kind, message.to) == ("code", ALICE)
    assert "“Sales and more”" in message.text
    assert not re.search(r"\d{4}", message.subject), "the code shows on a locked phone"
    recipient = share.recipient(ALICE)
    assert recipient is not None
    assert (message.share_id, message.recipient_id) == (share.id, recipient.id)
    assert message.expires is not None
    assert max(map(len, message.text.splitlines())) < 120
