"""What every route of ours keeps to, whichever it is: taken from the routing tables, so that a new one is looked at
without anybody thinking of it."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web
from support.people import ALICE, API_KEY, MALLORY, Answer, Browser, People, people

from guestpass.edge.pages import Pages

# Forms of pages that may be the first that a browser sees: there is no cookie yet that a token could be made from. They
# begin something and change nothing; their origin is checked all the same.
WITHOUT_TOKEN = {"/s/{secret}", "/me/sign-in", "/console/sign-in"}

COOKIE = re.compile(r"__Host-gp-\w+=[^;]*; Path=/; Max-Age=\d+; Secure; HttpOnly; SameSite=(Lax|Strict)")


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as found:
        yield found


def routes(edge: People) -> dict[str, list[web.RouteDef]]:
    """All that people meet, by origin."""
    from guestpass.edge.console import Console

    console = Console(
        service=edge.service,
        live=edge.grants,
        gateways=edge.gateways,  # type: ignore[arg-type]
        pages=edge.pages,
        api_key=API_KEY,
        origins=edge.origins,
        ways=lambda: edge.plugins.interactive,
    )
    return {
        "main": [*edge.admission.main_routes(), *console.console_routes()],
        "share": list(edge.admission.share_routes()),
    }


class Known:
    """A browser of somebody who is everything: the owner, a recipient who has signed in, one who is about to."""

    def __init__(self, edge: People, browser: Browser, values: dict[str, str], share: str) -> None:
        self.edge = edge
        self.browser = browser
        self.values = values
        self.share = share

    @classmethod
    async def of(cls, edge: People) -> Known:
        share, links = await edge.share()
        browser = edge.browser()
        await browser.post(edge.main + "/console/sign-in", {"key": API_KEY})
        origin = edge.origins.share_origin(share.id)
        await browser.sign_in(origin)
        second, _ = await edge.share()
        begun = await browser.get(edge.origins.share_origin(second.id))
        flow = begun.location.rpartition("/")[2]
        await browser.get(begun.location)  # from here on it is this browser's
        values = {
            "secret": links[ALICE].rpartition("/")[2],
            "flow": flow,
            "authenticator": "email-code",
            "share": share.id,
        }
        return cls(edge, browser, values, share.id)

    def url(self, origin: str, path: str) -> str:
        base = self.edge.main if origin == "main" else self.edge.origins.share_origin(self.share)
        return base + re.sub(r"\{(\w+)\}", lambda m: self.values[m[1]], path)


def keeps_to_the_policy(answer: Answer) -> None:
    fields = answer.headers
    assert fields["Cache-Control"] == "no-store", answer.url
    assert fields["Referrer-Policy"] == "same-origin", answer.url
    for line in fields.getall("Set-Cookie", ()):
        assert COOKIE.fullmatch(line), line
    if 300 <= answer.status < 400:
        return
    policy = fields["Content-Security-Policy"]
    assert "unsafe" not in policy
    for part in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"):
        assert part in policy, answer.url
    assert fields["X-Content-Type-Options"] == "nosniff"
    assert fields["X-Frame-Options"] == "DENY"
    assert fields["Cross-Origin-Opener-Policy"] == "same-origin"
    assert fields["Cross-Origin-Resource-Policy"] == "same-origin"
    assert fields["X-Robots-Tag"] == "noindex, nofollow"


async def test_every_page_has_the_whole_policy(edge: People) -> None:
    """To who is everything, and to who is nobody; asked for a page, and by a script."""
    known, stranger = await Known.of(edge), edge.browser()
    pages = 0
    for origin, table in routes(edge).items():
        for route in table:
            if route.method != "GET":
                continue
            for browser in (known.browser, stranger):
                for accept in ("text/html", "application/json"):
                    answer = await browser.get(known.url(origin, route.path), Accept=accept)
                    keeps_to_the_policy(answer)
                    pages += answer.status == 200
    assert pages > 20


async def test_every_form_of_every_page_has_a_token(edge: People) -> None:
    known = await Known.of(edge)
    forms = set()
    for origin, table in routes(edge).items():
        for route in table:
            if route.method == "GET":
                page = await known.browser.get(known.url(origin, route.path))
                for form in re.findall(r"(?s)<form.*?</form>", page.text):
                    action = re.search(r'action="([^"]+)"', form)
                    assert action, page.url
                    assert 'method="post"' in form
                    bare = any(
                        re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), action[1]) for path in WITHOUT_TOKEN
                    )
                    assert 'name="csrf"' in form or bare, (page.url, action[1])
                    forms.add(action[1])
    assert len(forms) >= 8


def state(folder: Path) -> list[Any]:
    """All rows of all tables."""
    with contextlib.closing(sqlite3.connect(folder / "edge.db")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return [(table, db.execute(f"SELECT * FROM {table}").fetchall()) for table in sorted(tables)]


async def test_every_post_is_refused_unless_it_is_our_form(edge: People, tmp_path: Path) -> None:
    known = await Known.of(edge)
    other, _ = await edge.share()
    sibling = edge.origins.share_origin(other.id)
    fields = {
        "email": ALICE,
        "to": MALLORY,
        "code": "12345678",
        "key": API_KEY,
        "session": "x",
        "action": "resend",
    }
    edge.mail.clear()
    before = state(tmp_path)
    refused = 0
    for origin, table in routes(edge).items():
        for route in table:
            if route.method != "POST":
                continue
            url = known.url(origin, route.path)
            ways: list[tuple[dict[str, str], str | None, dict[str, str]]] = [
                (fields, None, {}),
                (fields, None, {"Sec-Fetch-Site": "same-site"}),
                (fields, None, {"Sec-Fetch-Site": "cross-site"}),
                (fields, "null", {}),
                (fields, sibling, {}),
                (fields, "https://evil.example", {"Sec-Fetch-Site": "same-origin"}),
            ]
            if route.path not in WITHOUT_TOKEN:
                ways += [
                    (fields, "", {}),
                    ({**fields, "csrf": ""}, "", {}),
                    ({**fields, "csrf": "A" * 43}, "", {}),
                    (fields, "", {"Content-Type": "text/plain"}),
                    (fields, "", {"Content-Type": "application/json"}),
                ]
            for sent, origin_field, more in ways:
                answer = await known.browser.post(url, sent, origin=origin_field, **more)
                assert answer.status == 403, (route.path, origin_field, more, answer.status)
                keeps_to_the_policy(answer)
                refused += 1
    assert refused > 100
    assert state(tmp_path) == before
    assert not edge.mail


async def test_a_token_of_another_purpose_is_none(edge: People) -> None:
    """Of the console at the flow, of the flow at what is remembered, and the other way round."""
    known = await Known.of(edge)
    tokens = {}
    for name, origin, path in (
        ("console", "main", "/console"),
        ("flow", "main", "/signin/{flow}/{authenticator}"),
        ("me", "main", "/me"),
        ("sign-out", "share", "/.guestpass/sign-out"),
    ):
        tokens[name] = (await known.browser.get(known.url(origin, path))).csrf
    assert len(set(tokens.values())) == 4
    for name, origin, path in (
        ("console", "main", "/console/sign-out"),
        ("flow", "main", "/signin/{flow}/{authenticator}"),
        ("me", "main", "/me/sign-out"),
        ("sign-out", "share", "/.guestpass/sign-out"),
    ):
        for other, token in tokens.items():
            if other != name:
                answer = await known.browser.post(known.url(origin, path), {"csrf": token, "email": ALICE})
                assert answer.status == 403, (name, other)


# ── the same work for whoever asks ───────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL that runs, from any thread."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


async def test_sign_in_does_the_same_work_for_whoever_asks(
    edge: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: until the answer is there, the same statements run and the same pages are rendered, whether
    the address is invited or not. What differs, looking it up and mailing, waits in the background."""
    share, _ = await edge.share()
    rendered: list[str] = []
    render = Pages.render

    def note(self: Pages, template: str, *args: Any, **more: Any) -> web.Response:
        rendered.append(template)
        return render(self, template, *args, **more)

    later: list[Coroutine[Any, Any, None]] = []
    monkeypatch.setattr(Pages, "render", note)
    host: Any = edge.plugins.authenticators[0].host
    monkeypatch.setattr(type(host), "spawn", lambda self, work, *, name: later.append(work))
    work = []
    for email in (ALICE, MALLORY):
        browser = edge.browser()
        page = await browser.follow(await browser.get(edge.origins.share_origin(share.id)))
        rendered.clear()
        with statements() as asked:
            page = await browser.follow(await browser.submit(page, email=email))
        answered = list(asked)
        assert len(later) == 1
        await later.pop()
        with statements() as typed:
            wrong = await browser.follow(await browser.submit(page, code="0000 0000"))
        lengths = [len(p.text.replace(email, "")) for p in (page, wrong)]
        work.append((answered, list(typed), list(rendered), page.status, wrong.status, lengths))
    assert work[0] == work[1]
    assert work[0][0]
    assert work[0][1]
    assert {message.to for message in edge.mail} == {ALICE}
