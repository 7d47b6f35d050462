"""A certified OpenID provider, `oidc-provider` of npm, as a process of its own; and a visitor's way through its pages.

Its packages are installed once into build/npm, from the lock file beside `provider.mjs`.
"""

from __future__ import annotations

import hashlib
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
from yarl import URL

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "plugins" / "provider"
SECRET = "a secret, with = and %"
NEXT = "these tests run a real OpenID provider on Node: apt-get install nodejs npm"

FORM = re.compile(r'(?s)<form[^>]*\baction="([^"]+)"[^>]*>(.*?)</form>')
INPUT = re.compile(r"<input\b[^>]*>")
ATTRIBUTE = re.compile(r'\b(name|value|type)="([^"]*)"')


def installed() -> Path:
    """The folder with the provider's program and packages. AssertionError with the next step."""
    assert shutil.which("node"), NEXT
    lock = (SOURCE / "package-lock.json").read_bytes() + (SOURCE / "package.json").read_bytes()
    folder = ROOT / "build" / "npm" / hashlib.sha256(lock).hexdigest()[:16]
    if not (folder / "node_modules" / "oidc-provider").exists():
        npm = shutil.which("npm")
        assert npm, NEXT
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, folder)
        done = subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"npm ci failed: {done.stderr[-2000:]}"
    shutil.copy(SOURCE / "provider.mjs", folder)
    return folder


@contextmanager
def provider() -> Iterator[str]:
    """Its issuer, while it runs."""
    folder = installed()
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
