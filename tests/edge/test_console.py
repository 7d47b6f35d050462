"""The owner's console: who gets in, what it shows, what it does."""

from __future__ import annotations

import html
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from support.people import ALICE, API_KEY, BOB, Answer, Browser, People, people, plugin, usual

from guestpass.edge.tunnels import GatewayStatus
from guestpass.model import Delivery, ShareState
from guestpass.plugin import Authenticator, Field, Form, Identity, SignIn, Step
from guestpass.scope import parse_scope
from guestpass.shares.store import shares as statements


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as found:
        yield found


class Works(Authenticator):
    """A second way of signing in, beside the mailed code."""

    label = "Continue with Works"

    async def begin(self, sign_in: SignIn) -> Step:
        return Form("Who are you?", fields=(Field("email", "Address", type="email"),))

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        return Identity(params["email"], "somebody")


@pytest.fixture
async def edge_of_two_ways(tmp_path: Path) -> AsyncIterator[People]:
    plugins = usual()
    plugins["authenticate"].append(plugin(Works, "works"))
    async with people(tmp_path, plugins=plugins) as found:
        yield found


async def owner(edge: People) -> Browser:
    browser = edge.browser()
    page = await browser.get(edge.main + "/console/sign-in")
    answer = await browser.submit(page, key=API_KEY)
    assert (answer.status, answer.location) == (303, "/console")
    return browser


def form_with(page: Answer, action: str) -> dict[str, str]:
    """The hidden fields of the form that posts to `action`."""
    for form in re.findall(r"(?s)<form .*?</form>", page.text):
        if f'"{action}"' in form:
            return dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', form))
    raise AssertionError(f"no form posts to {action}")


# ── sign-in ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_the_key_opens_it(edge: People) -> None:
    browser = edge.browser()
    share, _ = await edge.share()
    one = f"/shares/{share.id}"
    for path in ("", "/shares/new", one, f"{one}/change", f"{one}/delete", "/gateways"):
        answer = await browser.get(f"{edge.main}/console{path}")
        assert (answer.status, answer.location) == (303, "/console/sign-in")
    for key in ("", "wrong", API_KEY[:-1], API_KEY + "x"):
        page = await browser.post(edge.main + "/console/sign-in", {"key": key})
        assert page.status == 403
        assert "That is not the API key" in page.words
    assert browser.cookie(edge.main, "__Host-gp-console") is None
    page = await browser.post(edge.main + "/console/sign-in", {"key": f" {API_KEY}\n"})
    assert page.status == 303
    cookie = page.headers["Set-Cookie"]
    assert cookie.startswith("__Host-gp-console=")
    for part in ("Secure", "HttpOnly", "SameSite=Strict", "Path=/"):
        assert part in cookie
    assert (await browser.get(edge.main + "/console")).status == 200


async def test_another_site_signs_nobody_in(edge: People) -> None:
    share, _ = await edge.share()
    for origin in ("http://evil.example", edge.origins.share_origin(share.id), None):
        page = await edge.browser().post(edge.main + "/console/sign-in", {"key": API_KEY}, origin=origin)
        assert page.status == 403
        assert "Set-Cookie" not in page.headers


async def test_trying_keys_is_slowed_down(edge: People) -> None:
    answers = [
        (await edge.browser().post(edge.main + "/console/sign-in", {"key": "x"})).status for _ in range(32)
    ]
    assert answers == [403] * 30 + [429] * 2


async def test_signing_out_and_time(edge: People, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = await owner(edge)
    old = dict(browser.cookies)
    page = await browser.get(edge.main + "/console")
    answer = await browser.post(edge.main + "/console/sign-out", form_with(page, "/console/sign-out"))
    assert answer.location == "/console/sign-in"
    browser.cookies = old
    assert (await browser.get(edge.main + "/console")).location == "/console/sign-in"
    browser = await owner(edge)
    later = time.time() + 12 * 3600 + 1
    monkeypatch.setattr("guestpass.edge.console.time.time", lambda: later)
    assert (await browser.get(edge.main + "/console")).location == "/console/sign-in"


async def test_every_form_needs_its_token_and_its_origin(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share(ALICE, BOB)
    page = await browser.get(f"{edge.main}/console/shares/{share.id}")
    csrf = form_with(page, "/console/sign-out")["csrf"]
    base = f"/console/shares/{share.id}"
    for path in (
        *("/recipients", "/resend", "/link", "/remove", "/end-session", "/delete"),
        *("/change", "/token"),
    ):
        for fields, origin in (
            ({}, ""),
            ({"csrf": "x"}, ""),
            ({"csrf": csrf}, edge.origins.share_origin(share.id)),
        ):
            answer = await browser.post(
                edge.main + base + path, {"email": ALICE, "to": ALICE, **fields}, origin=origin
            )
            assert answer.status == 403, path
    assert (await browser.post(edge.main + "/console/shares", {"to": ALICE})).status == 403
    unchanged = await edge.service.get(share.id)
    assert unchanged.state(time.time()) is ShareState.ACTIVE
    assert unchanged.recipient(ALICE) is not None


# ── what it shows ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_empty_list_says_what_to_do(edge: People) -> None:
    page = await (await owner(edge)).get(edge.main + "/console")
    assert "There is no active share" in page.words


async def test_the_list(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share(ALICE, BOB, name="Sales, Q3", expires=time.time() + 3 * 86400 + 60)
    gone, _ = await edge.share(name="Gone")
    await edge.service.delete(gone.id)
    bob = share.recipient(BOB)
    assert bob is not None
    await edge.service._store.write(
        lambda db: statements.set_delivery(db, bob.id, Delivery.BOUNCED, "550 no such user")
    )
    visitor = edge.browser()
    await visitor.sign_in(edge.origins.share_origin(share.id))
    page = await browser.get(edge.main + "/console")
    for words in (
        "Sales, Q3",
        f"{ALICE} and 1 other",
        "active",
        "3 days left",
        "1 viewer",
        "1 mail not delivered",
    ):
        assert words in page.words
    assert "Gone" not in page.words
    assert "Gone" in (await browser.get(edge.main + "/console?show=all")).words
    page = await browser.get(f"{edge.main}/console/shares/{share.id}")
    for words in ("refused 550 no such user", "the whole service is shared", "Signed in", "192.0.2.1"):
        assert words in page.words


async def test_pages_of_the_list(edge: People) -> None:
    browser = await owner(edge)
    for number in range(52):
        await edge.share(name=f"share-{number:02}")
    page = await browser.get(edge.main + "/console")
    more = re.search(r'href="(/console\?cursor=[^"]+)"', page.text)
    assert more
    second = await browser.get(edge.main + more[1])
    names = re.findall(r"share-\d\d", page.words + second.words)
    assert sorted(names) == [f"share-{n:02}" for n in range(52)]
    assert (await browser.get(edge.main + "/console?cursor=nonsense")).status == 422


async def test_gateways_and_their_states(edge: People) -> None:
    browser = await owner(edge)
    assert "No gateway is enrolled yet" in (await browser.get(edge.main + "/console/gateways")).words
    for name in ("up", "half", "down"):
        await edge.service.enroll(
            await edge.service.create_join_token("plant"), name, name.encode().ljust(32)
        )
    edge.service.seen("plant", "down", time.time() - 7300)
    edge.gateways.statuses = [
        GatewayStatus("plant", "up", 2, 0.012, {"dash": True}, 0.0, 3, "x", "r"),
        GatewayStatus("plant", "half", 1, None, {"dash": True, "wiki": False}, 0.0, 0, "x", "r"),
    ]
    page = await browser.get(edge.main + "/console/gateways")
    assert "plant/down not connected – 2 hours ago –" in page.words
    assert (
        "plant/half connected, service down not reached: wiki dash, wiki now 1 tunnel, 0 streams"
        in page.words
    )
    assert "plant/up connected dash now 2 tunnels, 3 streams 12 ms there and back" in page.words


async def test_what_is_not_there(edge: People) -> None:
    browser = await owner(edge)
    assert (await browser.get(edge.main + "/console/shares/snowhere")).status == 404


# ── what it does ─────────────────────────────────────────────────────────────────────────────────────────────────


async def create(edge: People, browser: Browser, **fields: str) -> Answer:
    page = await browser.get(edge.main + "/console/shares/new")
    token = form_with(page, "/console/shares")
    return await browser.post(
        edge.main + "/console/shares", {**token, "service": "plant/dash", "path": "/", "to": ALICE, **fields}
    )


async def test_creating_a_share(edge: People) -> None:
    browser = await owner(edge)
    page = await create(
        edge,
        browser,
        name="Sales, “Q3”",
        path="/d/sales",
        only="1",
        to=f"{ALICE}, {BOB}",
        expires="7d",
        max_sessions="3",
        message="Hi\r\nthere",
    )
    assert page.status == 200
    assert "“Sales, “Q3”” is shared" in page.words
    links = re.findall(rf"{re.escape(edge.main)}/s/[\w-]+", page.text)
    assert len(links) == 2
    (share,) = (await edge.service.list()).items
    assert (share.name, share.path, share.max_sessions) == ("Sales, “Q3”", "/d/sales", 3)
    assert [str(rule) for rule in share.scope] == ["* /d/sales/**"]
    assert share.message == "Hi\nthere"
    assert [r.email for r in share.recipients] == [ALICE, BOB]
    assert share.expires is not None
    assert abs(share.expires - time.time() - 7 * 86400) < 60
    # Shown once.
    again = await browser.get(f"{edge.main}/console/shares/{share.id}")
    assert links[0] not in again.text


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"to": ""}, "to", "Name at least one email address."),
        ({"to": "a@@b"}, "to", "is not an email address"),
        ({"service": "dash"}, "service", "SITE/SERVICE"),
        ({"service": "a/b/c"}, "service", "SITE/SERVICE"),
        ({"path": "x"}, "path", "A path begins with /."),
        ({"path": "/", "only": "1"}, "path", "the whole service"),
        ({"path": "/a/../b", "only": "1"}, "path", "ambiguous"),
        ({"expires": "soon"}, "expires", "is not a time"),
        ({"max_sessions": "many"}, "max_sessions", "whole number"),
        ({"scope": "GET /a/**\nGET x"}, "scope", "GET x"),
    ],
)
async def test_faults_stand_next_to_their_fields(
    edge: People, fields: dict[str, str], field: str, says: str
) -> None:
    browser = await owner(edge)
    page = await create(edge, browser, **{"name": "Kept <b>", **fields})
    assert page.status == 422
    assert f'<a href="#f-{field}">' in page.text
    fault = re.search(rf'(?s)<span class="fault" id="e-{field}">(.*?)</span>', page.text)
    assert fault
    assert says in fault[1].replace("&#39;", "'")
    assert re.search(rf'(?s)id="f-{field}"[^>]*aria-invalid="true"', page.text)
    assert 'value="Kept &lt;b&gt;"' in page.text, "what was typed is lost"
    assert (await edge.service.list()).items == []


async def test_further_rules_and_no_mail(edge: People) -> None:
    browser = await owner(edge)
    page = await create(
        edge,
        browser,
        path="/d",
        only="1",
        scope="GET /assets/**\r\n\r\n * /api/** ",
        owner="Ada",
        no_mail="1",
    )
    assert "No mail is sent." in page.words
    (share,) = (await edge.service.list()).items
    assert [str(rule) for rule in share.scope] == ["GET /assets/**", "* /api/**", "* /d/**"]
    assert share.owner == "Ada"
    assert [r.delivery for r in share.recipients] == [None]


async def test_where_there_is_one_way_of_signing_in_there_is_no_choice(edge: People) -> None:
    page = await (await owner(edge)).get(edge.main + "/console/shares/new")
    assert "Ways of signing in" not in page.words


async def test_a_share_that_takes_some_ways_of_signing_in(edge_of_two_ways: People) -> None:
    edge = edge_of_two_ways
    browser = await owner(edge)
    page = await browser.get(edge.main + "/console/shares/new")
    boxes = re.findall(r'<input type="checkbox" name="way-([^"]+)" value="1" (checked)?>', page.text)
    assert boxes == [("email-code", ""), ("works", "")], "bearer tokens are no way of a visitor's"
    assert "Continue with Works (works)" in page.words
    page = await create(edge, browser, expires="soon", **{"way-works": "1"})
    assert re.search(r'name="way-works" value="1" checked', page.text), "what was ticked is lost"
    await create(edge, browser, **{"way-works": "1"})
    (share,) = (await edge.service.list()).items
    assert share.sign_in == ("works",)
    visitor = edge.browser()
    page = await visitor.follow(await visitor.get(edge.origins.share_origin(share.id) + "/"))
    assert "Who are you?" in page.words, "the one way that is taken begins at once"
    page = await create(edge, browser, **{"way-nobody": "1"})
    assert page.status == 422
    assert "no way of signing in named &#39;nobody&#39;" in page.text


# ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def change(edge: People, browser: Browser, share_id: str, **fields: str | None) -> Answer:
    """The form as it is shown, with these fields; None leaves one out."""
    path = f"/console/shares/{share_id}/change"
    page = await browser.get(edge.main + path)
    sent = form_with(page, path)
    for name, value in re.findall(r'<input id="f-[^"]+" name="([^"]+)" value="([^"]*)"', page.text):
        sent[name] = html.unescape(value)
    for name, value in re.findall(
        r'(?s)<textarea id="f-[^"]+" name="([^"]+)"[^>]*>(.*?)</textarea>', page.text
    ):
        sent[name] = html.unescape(value).replace("\n", "\r\n")
    for name in re.findall(r'name="(way-[^"]+)" value="1" checked', page.text):
        sent[name] = "1"
    sent |= {name: value for name, value in fields.items() if value is not None}
    sent = {name: value for name, value in sent.items() if fields.get(name, "") is not None}
    return await browser.post(edge.main + path, sent)


async def test_what_is_not_touched_does_not_change(edge_of_two_ways: People) -> None:
    """Else the end would move by the part of a second that the form does not show, and put everybody out."""
    edge = edge_of_two_ways
    browser = await owner(edge)
    share, _ = await edge.share(
        name="“Sales”",
        path="/d",
        scope=(parse_scope("* /d/**"), parse_scope("GET /a/**")),
        expires=time.time() + 3600.5,
        max_sessions=3,
        message="Hi\nthere",
        sign_in=("works", "email-code"),
    )
    page = await browser.follow(await change(edge, browser, share.id))
    assert "Nothing was changed." in page.words
    assert await edge.service.get(share.id) == share
    assert not [event for event in edge.seen if event.type == "share.updated"]


async def test_changing_a_share(edge_of_two_ways: People) -> None:
    edge = edge_of_two_ways
    browser = await owner(edge)
    share, _ = await edge.share(path="/d", scope=(parse_scope("* /d/**"),), sign_in=("email-code",))
    visitor = edge.browser()
    await visitor.sign_in(edge.origins.share_origin(share.id))
    answer = await change(
        edge,
        browser,
        share.id,
        name="Sales",
        path="/e",
        scope="* /e/**\r\nGET /a/**",
        expires="2d",
        max_sessions="4",
        message="Look",
        **{"way-email-code": None, "way-works": "1"},
    )
    page = await browser.follow(answer)
    assert "“Sales” is changed." in page.words
    changed = await edge.service.get(share.id)
    assert (changed.name, changed.path, changed.max_sessions) == ("Sales", "/e", 4)
    assert [str(rule) for rule in changed.scope] == ["* /e/**", "GET /a/**"]
    assert changed.message == "Look"
    assert changed.sign_in == ("works",)
    assert changed.expires is not None
    assert abs(changed.expires - time.time() - 2 * 86400) < 60
    # Who came in by a way that is not taken any more signs in again.
    assert (await visitor.get(edge.origins.share_origin(share.id) + "/e")).status == 303
    await change(
        edge, browser, share.id, scope="", expires="", max_sessions="", **{"way-works": None, "path": "/"}
    )
    changed = await edge.service.get(share.id)
    assert (changed.scope, changed.expires, changed.max_sessions, changed.sign_in) == ((), None, None, ())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"expires": "soon"}, "is not a time"),
        ({"max_sessions": "0"}, "between 1 and"),
        ({"scope": "nonsense"}, "nonsense"),
        ({"path": "/x", "scope": "* /d/**"}, "does not admit"),
        ({"name": ""}, "is empty"),
        ({"way-nobody": "1"}, "no way of signing in named"),
    ],
)
async def test_a_change_that_is_refused(edge_of_two_ways: People, fields: dict[str, str], says: str) -> None:
    edge = edge_of_two_ways
    browser = await owner(edge)
    share, _ = await edge.share(name="Kept")
    page = await change(edge, browser, share.id, message="Typed", **fields)
    assert page.status == 422
    assert "Nothing was changed" in page.words
    assert says in page.words
    assert ">Typed</textarea>" in page.text, "what was typed is lost"
    assert await edge.service.get(share.id) == share


async def test_a_form_from_before_another_change_takes_nothing_back(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share(name="Before")
    path = f"/console/shares/{share.id}/change"
    page = await browser.get(edge.main + path)
    await edge.service.update(share.id, scope=[parse_scope("* /d/**")], path="/d")
    answer = await browser.post(edge.main + path, {**form_with(page, path), "name": "After", "path": "/"})
    assert answer.status == 409
    assert "changed elsewhere" in answer.words
    assert "* /d/**" in answer.text
    assert (await edge.service.get(share.id)).name == "Before"


async def test_a_way_that_is_offered_no_more_is_shown_and_can_go(edge_of_two_ways: People) -> None:
    edge = edge_of_two_ways
    browser = await owner(edge)
    share, _ = await edge.share(sign_in=("works",))
    edge.plugins._authenticate.pop()
    page = await browser.get(f"{edge.main}/console/shares/{share.id}/change")
    assert "works – not offered any more" in page.words
    await change(edge, browser, share.id, name="Kept as it is")
    assert (await edge.service.get(share.id)).sign_in == ("works",)
    await change(edge, browser, share.id, **{"way-works": None})
    assert (await edge.service.get(share.id)).sign_in == ()


async def test_what_can_be_changed_ends_with_the_share(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share()
    path = f"/console/shares/{share.id}/change"
    page = await browser.get(edge.main + path)
    await edge.service.delete(share.id)
    assert (await browser.get(edge.main + path)).location == f"/console/shares/{share.id}"
    fields = {**form_with(page, path), "name": "x", "path": "/"}
    assert (await browser.post(edge.main + path, fields)).status == 410


async def test_a_token_for_a_script(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share(ALICE, BOB)
    base = f"/console/shares/{share.id}"
    page = await browser.get(edge.main + base)
    token = form_with(page, f"{base}/token")
    for fields, says in (
        ({"email": BOB, "token_expires": "soon"}, "is not a time"),
        ({"email": "nobody@", "token_expires": ""}, "is not an email address"),
    ):
        page = await browser.post(f"{edge.main}{base}/token", {**token, **fields})
        assert page.status == 422
        assert says in page.words
    page = await browser.post(f"{edge.main}{base}/token", {**token, "email": BOB, "token_expires": "1h"})
    assert f"Bearer token for {BOB}, shown this once" in page.words
    secret = re.search(r"<code>(gp_[\w-]+)</code>", page.text)
    assert secret
    origin = edge.origins.share_origin(share.id)
    answer = await edge.browser().get(origin + "/x", Authorization=f"Bearer {secret[1]}")
    assert f"application: {BOB}" in answer.text
    (session,) = await edge.service.sessions(share.id)
    assert session.expires is not None
    assert abs(session.expires - time.time() - 3600) < 60
    assert secret[1] not in (await browser.get(edge.main + base)).text


async def test_faults_that_only_the_service_knows(edge: People) -> None:
    page = await create(edge, await owner(edge), name="n" * 201)
    assert page.status == 422
    assert "longer than 200 characters" in page.words
    assert (await edge.service.list()).items == []


async def test_inviting_mailing_again_and_removing(edge: People) -> None:
    browser = await owner(edge)
    share, links = await edge.share()
    base = f"/console/shares/{share.id}"
    page = await browser.get(edge.main + base)
    token = form_with(page, f"{base}/recipients")
    page = await browser.post(f"{edge.main}{base}/recipients", {**token, "to": BOB})
    assert "Invited." in page.words
    assert BOB in page.words
    page = await browser.post(f"{edge.main}{base}/recipients", {**token, "to": "no address"})
    assert page.status == 422
    assert 'value="no address"' in page.text
    page = await browser.post(f"{edge.main}{base}/resend", {**token, "email": BOB})
    assert f"A new invitation is on its way to {BOB}" in page.words
    page = await browser.post(f"{edge.main}{base}/link", {**token, "email": ALICE})
    fresh = re.search(rf"{re.escape(edge.main)}/s/[\w-]+", page.text)
    assert fresh
    assert fresh[0] != links[ALICE]
    visitor = edge.browser()
    await visitor.sign_in(edge.origins.share_origin(share.id))
    answer = await browser.post(f"{edge.main}{base}/remove", {**token, "email": ALICE})
    page = await browser.follow(answer)
    assert f"{ALICE} is removed. 1 session and 0 open connections ended." in page.words
    assert (await browser.get(edge.main + base)).words.count("is removed") == 0, "told twice"
    assert (await visitor.get(edge.origins.share_origin(share.id))).status == 410
    answer = await browser.post(f"{edge.main}{base}/remove", {**token, "email": "who@example.org"})
    assert answer.status == 404


async def test_ending_a_session(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share()
    visitor = edge.browser()
    await visitor.sign_in(edge.origins.share_origin(share.id))
    base = f"/console/shares/{share.id}"
    page = await browser.get(edge.main + base)
    fields = form_with(page, f"{base}/end-session")
    page = await browser.follow(await browser.post(f"{edge.main}{base}/end-session", fields))
    assert f"{ALICE} is signed out." in page.words
    assert (await visitor.get(edge.origins.share_origin(share.id))).status == 303


async def test_deleting_is_asked_first_and_says_what_it_ended(edge: People) -> None:
    browser = await owner(edge)
    share, links = await edge.share(name="Sales")
    visitor = edge.browser()
    await visitor.sign_in(edge.origins.share_origin(share.id))
    page = await browser.get(f"{edge.main}/console/shares/{share.id}/delete")
    assert "Delete “Sales”?" in page.words
    assert "1 person is looking at it now" in page.words
    assert (await edge.service.get(share.id)).deleted is None
    path = f"/console/shares/{share.id}/delete"
    page = await browser.follow(await browser.post(edge.main + path, form_with(page, path)))
    assert "“Sales” is deleted: its links are dead. 1 session and 0 open connections ended." in page.words
    assert (await visitor.get(links[ALICE])).status == 410
    assert (await browser.get(edge.main + path)).location == f"/console/shares/{share.id}"
    assert "deleted" in (await browser.get(f"{edge.main}/console/shares/{share.id}")).words


async def test_a_share_with_no_recipients_left_can_be_deleted(edge: People) -> None:
    browser = await owner(edge)
    share, _ = await edge.share()
    await edge.service.remove_recipient(share.id, ALICE)
    path = f"/console/shares/{share.id}/delete"
    page = await browser.get(edge.main + path)
    page = await browser.follow(await browser.post(edge.main + path, form_with(page, path)))
    assert "is deleted" in page.words
