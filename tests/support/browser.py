"""Headless Chromium under Playwright, and what a test asks of a page: its sockets, its screenshots.

Playwright is imported when a browser starts, so that tests that need none can be collected without it.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from support.npm import ROOT, installed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, WebSocket

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")

DESKTOP = (1280, 800)
PHONE = (320, 640)  # the narrowest that our pages promise to fit

# A folder; without it no screenshot is taken.
SCREENSHOTS = "GUESTPASS_SCREENSHOTS"


def executable() -> str:
    """Path of the browser. AssertionError with the next step: a test that needs one never passes without."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    assert found, "these tests drive Chromium and there is none: apt-get install chromium"
    return found


@contextmanager
def browser(*more: str) -> Iterator[Browser]:
    """`more`: further arguments of the browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as exc:
        raise AssertionError("these tests need Playwright: pip install 'guestpass[apps]'") from exc
    path = executable()
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, *more])
        try:
            yield found
        finally:
            found.close()


@dataclass
class Socket:
    """One WebSocket of a page, as the browser saw it. Times are of the monotonic clock."""

    url: str
    opened: float
    received: list[float] = field(default_factory=list)
    closed: float | None = None


class Sockets:
    """All WebSockets of a page, from now on."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.all: list[Socket] = []
        page.on("websocket", self._opened)

    def _opened(self, websocket: WebSocket) -> None:
        socket = Socket(websocket.url, time.monotonic())
        self.all.append(socket)
        websocket.on("framereceived", lambda _: socket.received.append(time.monotonic()))
        websocket.on("close", lambda _: setattr(socket, "closed", time.monotonic()))

    def live(self) -> list[Socket]:
        """Those that brought something and are open."""
        return [s for s in self.all if s.received and s.closed is None]

    def watch(self, seconds: float) -> None:
        """Let the browser's events arrive for that long."""
        self.page.wait_for_timeout(seconds * 1000)

    def wait_until_closed(self, sockets: list[Socket], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(s.closed is None for s in sockets):
            still = [s.url for s in sockets if s.closed is None]
            assert time.monotonic() < deadline, f"still open after {seconds:g} s: {still}"
            self.watch(0.01)


def screenshot(page: Page, name: str, *, full_page: bool = False) -> None:
    """`name`.png in the folder that the environment names."""
    folder = os.environ.get(SCREENSHOTS)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=full_page, animations="disabled")


Scheme = Literal["light", "dark"]

# axe's rules beyond WCAG that are on by default, and of WCAG 2.2 A and AA all. Not asked: a page that tries again by
# itself (503) says so in words, and reloads what has no state.
AXE_OPTIONS = {"rules": {"meta-refresh": {"enabled": False}}}


@functools.cache
def axe() -> str:
    """The script of axe-core, which knows what keeps people from using a page."""
    folder = installed(
        ROOT / "tests" / "apps" / "axe", "axe-core", "these tests judge pages by axe-core of npm"
    )
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


def accessible(page: Page, name: str) -> None:
    """No label is missing, no contrast too low, no heading out of order, …: see axe-core's rules."""
    page.evaluate(axe())
    found = page.evaluate("(options) => axe.run(document, options)", AXE_OPTIONS)
    assert found["passes"], "axe looked at nothing"
    faults = [
        f"{fault['id']}: {fault['help']}: {node['html']}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]
    assert not faults, f"{name}: " + "\n".join(faults)


def gallery(page: Page, name: str) -> None:
    """Screenshots of a page of ours, on a desktop and a phone, light and dark; that it fits a phone, and that everybody
    can use it."""
    for device, (width, height) in (("desktop", DESKTOP), ("phone", PHONE)):
        page.set_viewport_size({"width": width, "height": height})
        schemes: tuple[Scheme, ...] = ("light", "dark")
        for scheme in schemes:
            page.emulate_media(
                color_scheme=scheme, reduced_motion="reduce"
            )  # no colour on its way to another
            screenshot(page, f"{name}-{device}-{scheme}", full_page=True)
            if not name.startswith("application-dashboard"):
                accessible(page, f"{name}, {device}, {scheme}")
        overflow = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0, f"{name} is {overflow} px wider than a {device} of {width} px"
    page.set_viewport_size({"width": DESKTOP[0], "height": DESKTOP[1]})
    page.emulate_media(color_scheme="light", reduced_motion="no-preference")
