"""What a recipient does: open the link of the mail, prove the address with the code of the second mail, land."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from support.mail_server import MailServer, code_in

if TYPE_CHECKING:
    from playwright.sync_api import Page, Response

STEP_MS = 15_000.0

Look = Callable[[str], None]


def nothing(_page: str) -> None:
    pass


def sign_in(
    page: Page, link: str, email: str, mail: MailServer, *, origin: str, look: Look = nothing
) -> None:
    """From the link to the application. `look` is called on each page of ours with its name."""
    answer = page.goto(link)
    assert answer is not None
    assert answer.status == 200
    look("link")
    press(page, "Continue")
    page.locator("input[name=email]").wait_for(timeout=STEP_MS)
    look("sign-in")
    page.fill("input[name=email]", email)
    submit(page, "email")
    page.locator("input[name=code]").wait_for(timeout=STEP_MS)
    look("code")
    page.fill("input[name=code]", code_in(mail.take(email)))
    submit(page, "code")
    page.wait_for_url(f"{origin}/**", timeout=STEP_MS, wait_until="commit")


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).or_(page.get_by_role("link", name=name)).first.click(
        timeout=STEP_MS
    )


def submit(page: Page, field: str) -> None:
    """By keyboard, as people do after typing."""
    page.locator(f"input[name={field}]").press("Enter")


def opens(page: Page, url: str) -> Response:
    answer = page.goto(url)
    assert answer is not None
    return answer
