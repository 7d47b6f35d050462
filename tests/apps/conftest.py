"""One browser for all, a fresh context for each test; a mail server for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from support.browser import DESKTOP, browser
from support.mail_server import MailServer, mail_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    found = chromium.new_context(viewport={"width": DESKTOP[0], "height": DESKTOP[1]})
    yield found
    found.close()


@pytest.fixture
def mail() -> Iterator[MailServer]:
    with mail_server() as server:
        yield server
