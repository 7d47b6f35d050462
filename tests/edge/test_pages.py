"""What every page of ours holds to: its policy, its words, nothing from elsewhere, nothing typed in by others."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from support.people import ALICE, API_KEY, Answer, People, people

from guestpass.edge import pages as module
from guestpass.edge.origins import Origins
from guestpass.edge.pages import ERRORS, Pages, ago, moment, remaining, wants_html

FOLDER = Path(module.__file__).parent


@pytest.fixture
def pages() -> Pages:
    return Pages(Origins("https://share.example.com", "share.example.net"))


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as found:
        yield found


def asking(accept: str = "text/html", method: str = "GET") -> web.Request:
    return make_mocked_request(method, "/", headers={"Accept": accept})


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 410, 413, 421, 429, 431, 500, 502, 503, 504, 418]
)
def test_an_error_as_page_and_as_text(pages: Pages, status: int) -> None:
    page = pages.error(status, error_id="12ab34cd", request=asking())
    assert page.status == status
    assert page.content_type == "text/html"
    assert "12ab34cd" in (page.text or "")
    assert page.headers["Cache-Control"] == "no-store"
    text = pages.error(status, error_id="12ab34cd", request=asking("application/json"))
    assert text.content_type == "text/plain"
    assert (text.text or "").startswith(f"{status} ")
    assert "Error id: 12ab34cd" in (text.text or "")
    assert ("WWW-Authenticate" in page.headers) is (status == 401)


def test_every_error_says_what_to_do_next() -> None:
    for status, words in ERRORS.items():
        assert all(word.endswith(".") for word in words[1:]), status


def test_the_503_page_tries_again_by_itself(pages: Pages) -> None:
    page = pages.error(503, retry_after=7, request=asking())
    assert page.headers["Retry-After"] == "7"
    assert '<meta http-equiv="refresh" content="7">' in (page.text or "")
    assert "This page tries again by itself." in (page.text or "")
    # What was posted is not sent again.
    posted = pages.error(503, request=asking(method="POST"))
    assert "refresh" not in (posted.text or "")
    assert "by itself" not in (posted.text or "")
    assert posted.headers["Retry-After"] == "5"
    assert "refresh" not in (pages.error(502, request=asking()).text or "")


def test_words_of_the_caller_are_escaped(pages: Pages) -> None:
    page = pages.error(403, request=asking(), message='a <script>"x"</script> & more')
    assert "<script>" not in (page.text or "")
    assert "A &lt;script&gt;" in (page.text or "")


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        ("text/html", True),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("application/xhtml+xml", True),
        ("TEXT/HTML;level=1", True),
        ("text/html;q=0", False),
        ("text/html; q=0.0, */*", False),
        ("*/*", False),
        ("application/json", False),
        ("text/htmlx", False),
        ("", False),
    ],
)
def test_who_gets_a_page(accept: str, html: bool) -> None:
    assert wants_html(asking(accept)) is html
    assert wants_html(None) is False


# ── policy ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_policy(pages: Pages) -> None:
    page = pages.error(404, request=asking())
    policy = page.headers["Content-Security-Policy"]
    for part in (
        "default-src 'none'",
        "style-src 'self'",
        "form-action 'self';",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ):
        assert part in policy
    assert "unsafe" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "same-origin"
    assert "script-src" not in policy
    scripted = pages.render("me_start.html", scripts=True).headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self'; style-src" in scripted
    elsewhere = pages.render("me_start.html", leads_elsewhere=True)
    assert "form-action 'self' https:;" in elsewhere.headers["Content-Security-Policy"]


@pytest.mark.parametrize("template", sorted((FOLDER / "templates").glob("*.html")), ids=lambda p: p.name)
def test_templates_bring_nothing_from_elsewhere_and_nothing_inline(template: Path) -> None:
    # The one script that there is: ours, by a name made of its content.
    text = template.read_text("utf-8").replace('<script src="{{ passkey_url }}" defer></script>', "")
    assert not re.search(r"<script|<style|\sstyle=|\son\w+=|javascript:|//[a-z0-9.-]+\.[a-z]{2,}", text)
    for url in re.findall(r'(?:href|src|action)="([^"]*)"', text):
        assert url.startswith(("/", "#", "{{")), url
    assert "| safe" not in text
    assert "|safe" not in text
    for form in re.findall(r"(?s)<form method=\"post\".*?</form>", text):
        bare = ("/me/sign-in", "{{ action }}", "/console/sign-in")
        assert 'name="csrf"' in form or any(f'action="{b}"' in form for b in bare), template.name


def test_assets_are_named_by_their_content(pages: Pages) -> None:
    text = pages.error(404, request=asking()).text or ""
    assert re.search(r'href="/\.guestpass/assets/style-[0-9a-f]{16}\.css"', text)
    assert "url(" not in (FOLDER / "style.css").read_text("utf-8")
    assert "@import" not in (FOLDER / "style.css").read_text("utf-8")


async def test_assets_on_every_origin(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    page = await browser.get(edge.main + "/")
    assets = re.findall(r'"(/\.guestpass/assets/[^"]+)"', page.text)
    assert len(set(assets)) == 2
    for origin in (edge.main, edge.origins.share_origin(share.id)):
        for path in assets:
            found = await browser.get(origin + path)
            assert found.status == 200
            assert found.headers["Cache-Control"] == "public, max-age=31536000, immutable"
            assert found.headers["Content-Type"].startswith(("text/css", "image/svg+xml"))
        assert (await browser.get(origin + "/.guestpass/assets/style-0.css")).status == 404
        assert (await browser.get(origin + "/.guestpass/assets/__init__.py")).status == 404


# ── contrast (WCAG 2.2: 4.5 for text, 3 for the edges of controls) ───────────────────────────────────────────────


def palettes() -> Iterator[tuple[str, dict[str, str]]]:
    sheet = (FOLDER / "style.css").read_text("utf-8")
    for name, block in zip(("light", "dark"), re.findall(r"(?s):root \{(.*?)\}", sheet), strict=True):
        yield name, dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    ("front", "back", "least"),
    [
        *(
            (front, back, 4.5)
            for front in ("text", "soft", "accent-strong")
            for back in ("ground", "surface", "sunken")
        ),
        ("on-accent", "accent", 4.5),
        ("on-accent", "accent-strong", 4.5),
        ("bad", "bad-ground", 4.5),
        ("bad", "surface", 4.5),
        ("warn", "warn-ground", 4.5),
        ("good", "good-ground", 4.5),
        ("edge", "surface", 3.0),
        ("accent-strong", "surface", 3.0),
    ],
)
def test_contrast(front: str, back: str, least: float) -> None:
    for name, colours in palettes():
        light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, f"{front} on {back}, {name}"


# ── what others typed ────────────────────────────────────────────────────────────────────────────────────────────

NASTY = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7*7 }} ‏"


def is_clean(page: Answer) -> bool:
    return (
        not re.search(r"<script|<img src=x|onerror=alert\(1\)>\s*49", page.text)
        and "49" not in page.words.split()
    )


async def test_names_and_messages_of_others_are_text(edge: People) -> None:
    share, links = await edge.share(name=NASTY, message=NASTY, owner=NASTY)
    page = await edge.browser().get(links[ALICE])
    assert is_clean(page)
    assert "{{ 7*7 }}" in page.words
    browser = edge.browser()
    await browser.sign_in(edge.origins.share_origin(share.id))
    for path in ("/me", f"/me/remove/{share.id}"):
        assert is_clean(await browser.get(edge.main + path))
    await browser.post(edge.main + "/console/sign-in", {"key": API_KEY})
    for path in ("/console", f"/console/shares/{share.id}", f"/console/shares/{share.id}/delete"):
        page = await browser.get(edge.main + path)
        assert page.status == 200
        assert is_clean(page)
    page = await browser.follow(await browser.get(edge.origins.share_origin((await edge.share())[0].id)))


@pytest.mark.parametrize(
    "name", ["Umsatz, Q3 „vorläufig“", "\"quoted\" 'name'", "📈 日本 dashboards", "n" * 200]
)
async def test_any_name_stands_on_the_page_as_it_is(edge: People, name: str) -> None:
    _, links = await edge.share(name=name)
    assert name in (await edge.browser().get(links[ALICE])).words


# ── words for times ──────────────────────────────────────────────────────────────────────────────────────────────


def test_times() -> None:
    assert moment(0) == "1 January 1970, 00:00 UTC"
    assert moment(1785664799) == "2 August 2026, 09:59 UTC"
    assert [remaining(s, 0) for s in (-1, 30, 60, 7200, 86400 * 3)] == [
        "over",
        "less than a minute left",
        "1 minute left",
        "2 hours left",
        "3 days left",
    ]
    assert [ago(0, s) for s in (-5, 5, 61, 90000)] == ["just now", "just now", "1 minute ago", "1 day ago"]
