"""A certified OpenID provider, `oidc-provider` of npm, as a process of its own; and a visitor's way through its pages.

Its packages are installed from the lock file beside `provider.mjs`.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
from support.npm import ROOT, installed
from yarl import URL

SOURCE = ROOT / "tests" / "plugins" / "provider"
SECRET = "a secret, with = and %"

FORM = re.compile(r'(?s)<form[^>]*\baction="([^"]+)"[^>]*>(.*?)</form>')
INPUT = re.compile(r"<input\b[^>]*>")
ATTRIBUTE = re.compile(r'\b(name|value|type)="([^"]*)"')


def program() -> Path:
    """The folder with the provider's program and packages. AssertionError with the next step."""
    needed = "these tests run a real OpenID provider on Node"
    assert shutil.which("node"), f"{needed}: apt-get install nodejs npm"
    folder = installed(SOURCE, "oidc-provider", needed)
    shutil.copy(SOURCE / "provider.mjs", folder)
    return folder


@contextmanager
def provider() -> Iterator[str]:
    """Its issuer, while it runs."""
    folder = program()
    process = subprocess.Popen(
        ["node", "provider.mjs"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the provider did not start"
        yield json.loads(line)["issuer"]
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


async def through(url: str, login: str, callback: str) -> str:
    """Sign in as `login` and agree; the URL with which the provider sends the visitor back to `callback`…"""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        fields: dict[str, str] | None = None
        for _ in range(12):
            async with session.request(
                "GET" if fields is None else "POST",
                URL(url, encoded=True),
                data=fields,
                allow_redirects=False,
            ) as response:
                text = await response.text()
                if response.status in (302, 303):
                    url, fields = urljoin(url, response.headers["Location"]), None
                    if url.startswith(callback):
                        return url
                    continue
            form = FORM.search(text)
            assert form, text[:2000]
            fields = {}
            for tag in INPUT.findall(form[2]):
                found = dict(ATTRIBUTE.findall(tag))
                if "name" in found:
                    fields[found["name"]] = html.unescape(found.get("value", ""))
            if "login" in fields:
                fields |= {"login": login, "password": "any"}
            url = urljoin(url, html.unescape(form[1]))
    raise AssertionError("the provider's pages do not end")
