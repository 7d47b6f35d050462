from guestpass.testing import edge_with, use

from pass_phrase import TRIES, PassPhrase

PEOPLE = {"alice@example.org": "correct horse", "mallory@example.org": "battery staple"}


async def test_the_right_phrase_admits() -> None:
    async with edge_with(use(PassPhrase, people=PEOPLE)) as edge:
        form = await edge.visitor().get("/")
        page = await form.submit(email="Alice@Example.org", phrase="correct horse")
        assert page.request["headers"]["x-guestpass-email"] == "alice@example.org"


async def test_a_wrong_phrase_does_not() -> None:
    async with edge_with(use(PassPhrase, people=PEOPLE)) as edge:
        form = await edge.visitor().get("/")
        page = await form.submit(email="alice@example.org", phrase="battery staple")
        assert "do not belong together" in page.words


async def test_who_is_not_invited_stays_outside() -> None:
    async with edge_with(use(PassPhrase, people=PEOPLE)) as edge:
        form = await edge.visitor().get("/")
        page = await form.submit(email="mallory@example.org", phrase="battery staple")
        assert page.status == 403


async def test_nobody_may_guess_for_ever() -> None:
    async with edge_with(use(PassPhrase, people=PEOPLE)) as edge:
        page = await edge.visitor().get("/")
        for _ in range(TRIES):
            page = await page.submit(email="alice@example.org", phrase="a guess")
        page = await page.submit(email="alice@example.org", phrase="correct horse")
        assert "Too many attempts" in page.words
