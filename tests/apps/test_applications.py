"""The main job, whole: applications that nobody here wrote, opened by a recipient in a browser from the mail that a
real mail server took, used through the tunnel, and cut off when the share is deleted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.applications import APPLICATIONS, START_SECONDS, Application
from support.browser import Sockets, screenshot
from support.mail_server import MailServer, link_in
from support.up import Up, answer
from support.visitor import sign_in

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

pytestmark = [pytest.mark.apps, pytest.mark.timeout(300)]

ALICE = "alice@example.org"

# From the answer of the deletion. The edge answers when the streams have ended, so what is left is the browser's part.
CUT_OFF_SECONDS = 1.0
# How long a page that was cut off is watched: its attempts to come back must bring nothing.
AFTERWARDS_SECONDS = 2.0


@pytest.mark.parametrize("application", APPLICATIONS, ids=lambda application: application.name)
def test_recipient_works_in_the_application_until_the_share_is_deleted(
    application: Application, context: BrowserContext, mail: MailServer, tmp_path: Path
) -> None:
    running = application.start(tmp_path)
    with running.program:
        running.program.wait_for_url(running.url + running.path, seconds=START_SECONDS)
        with Up(
            running.url, to=ALICE, mail=mail.url, folder=tmp_path, options=["--path", running.path]
        ) as up:
            page = context.new_page()
            sockets = Sockets(page)
            sign_in(page, link_in(mail.take(ALICE)), ALICE, mail, origin=up.origin)
            application.use(page, sockets)
            screenshot(page, f"application-{application.name}")

            live = sockets.live()
            assert live, "the application used no WebSocket"
            assert all(socket.url.startswith(up.origin.replace("http", "ws", 1)) for socket in live)
            cookies = {cookie["name"]: cookie["value"] for cookie in context.cookies(up.origin)}
            session = {"Cookie": f"__Host-guestpass={cookies['__Host-guestpass']}"}
            assert up.get(up.origin + running.path, session)[0] == 200

            deletion = up.command("share", "delete", up.share)
            while deletion.poll() is None:
                sockets.watch(0.01)
            deleted = time.monotonic()
            revoked = answer(deletion)["revoked"]
            assert revoked["sessions"] >= 1
            assert revoked["streams"] >= len(live)
            sockets.wait_until_closed(live, seconds=CUT_OFF_SECONDS - (time.monotonic() - deleted))

            sockets.watch(AFTERWARDS_SECONDS)
            late = [s.url for s in sockets.all for at in s.received if at > deleted + CUT_OFF_SECONDS]
            assert not late, "something reached the page after the deletion"
            screenshot(page, f"application-{application.name}-cut-off")

            assert up.get(up.link)[0] == 410, "the link"
            assert up.get(up.origin + running.path, session)[0] == 410, "the cookie"
            assert (
                up.get(up.origin + running.path, {"Authorization": f"Bearer {up.facts['token']}"})[0] == 410
            ), "the token"
