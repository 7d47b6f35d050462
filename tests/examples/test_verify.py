"""The listings of docs/verifying.md, each run against a real edge: what it signs is accepted, all else is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.stack import EMAIL, SERVICE, SITE, RawServer, Stack, read_head, running

from guestpass.edge.signing_keys import KeyRing

ROOT = Path(__file__).parents[2]
LISTINGS = ROOT / "examples" / "verify"
MODULES = ROOT / "build" / "tools" / "verify"
AUDIENCE = f"{SITE}/{SERVICE}"

# The first run compiles (Go) or installs (npm).
PREPARE_SECONDS = 180
RUN_SECONDS = 60


def program(name: str, package: str) -> str:
    """Its path; where it is missing the test is skipped with the reason, in CI it fails."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is missing: apt-get install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def python(folder: Path) -> list[str]:
    return [sys.executable, str(LISTINGS / "verify.py")]


def node(folder: Path) -> list[str]:
    found, npm = program("node", "nodejs"), program("npm", "npm")
    MODULES.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / "tests" / "examples" / "verify" / name, MODULES)
    if not (MODULES / "node_modules" / "jose").exists():
        made = subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=MODULES,
            capture_output=True,
            encoding="utf-8",
            timeout=PREPARE_SECONDS,
        )
        assert made.returncode == 0, f"jose cannot be installed from npm: {made.stderr[-500:]}"
    shutil.copy(LISTINGS / "verify.mjs", MODULES)
    return [found, str(MODULES / "verify.mjs")]


def go(folder: Path) -> list[str]:
    built = folder / "verify"
    made = subprocess.run(
        [program("go", "golang-go"), "build", "-o", str(built), str(LISTINGS / "verify.go")],
        capture_output=True,
        encoding="utf-8",
        timeout=PREPARE_SECONDS,
        env={**os.environ, "GOCACHE": str(ROOT / "build" / "tools" / "go"), "GOFLAGS": "-mod=mod"},
    )
    assert made.returncode == 0, made.stderr
    return [str(built)]


LANGUAGES: dict[str, Callable[[Path], list[str]]] = {"python": python, "node": node, "go": go}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async def show(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            found = re.search(rb"(?mi)^X-Guestpass-Assertion: (\S+)", head)
            body = found[1] if found else b""
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async with RawServer(show) as app, running(tmp_path, app.url) as started:
        yield started


async def verified(stack: Stack, command: list[str], *assertions: str) -> list[str]:
    """What the listing prints for each."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stack.edge.config.edge.public_url,
        AUDIENCE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "NO_PROXY": "*", "no_proxy": "*"},
    )
    async with asyncio.timeout(RUN_SECONDS):
        out, err = await process.communicate("".join(line + "\n" for line in assertions).encode())
    assert process.returncode == 0, err.decode()
    lines = out.decode().splitlines()
    assert len(lines) == len(assertions), (lines, err.decode())
    return lines


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def forgeries(good: str, ring: KeyRing, issuer: str) -> dict[str, str]:
    """What must be refused, by what is wrong with it. Those of `signed` bear the edge's own signature."""
    now = time.time()
    ours = ring.current(now)
    claims = {"iss": issuer, "aud": AUDIENCE, "sub": EMAIL, "email": EMAIL, "share": "s", "session": "x"}
    claims |= {"iat": int(now), "exp": int(now) + 600}

    def signed(**changes: Any) -> str:
        changed = {k: v for k, v in {**claims, **changes}.items() if v is not None}
        return jwt.encode(changed, ours.key, algorithm="EdDSA", headers={"kid": ours.id})

    head, body, signature = good.split(".")
    payload = json.loads(base64.urlsafe_b64decode(body + "=="))
    raw = ours.key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    stranger = Ed25519PrivateKey.generate()
    return {
        "another's service": signed(aud=f"{SITE}/other"),
        "no audience": signed(aud=None),
        "another's issuer": signed(iss="https://evil.example"),
        "no issuer": signed(iss=None),
        "expired": signed(iat=int(now) - 1200, exp=int(now) - 600),
        "no expiry": signed(exp=None),
        "nobody": signed(email=None),
        "another body": f"{head}.{part({**payload, 'email': 'mallory@example.org'})}.{signature}",
        "another signature": f"{head}.{body}.{signature[::-1]}",
        "no signature": f"{head}.{body}.",
        "none": f"{part({'alg': 'none', 'typ': 'JWT', 'kid': ours.id})}.{body}.",
        "hmac with the public key": jwt.encode(claims, raw, algorithm="HS256", headers={"kid": ours.id}),
        "a key of its own under our id": jwt.encode(
            claims, stranger, algorithm="EdDSA", headers={"kid": ours.id}
        ),
        "a key that is not published": jwt.encode(claims, stranger, algorithm="EdDSA", headers={"kid": "x"}),
        "two parts": f"{head}.{body}",
        "text": "alice@example.org",
        "nothing": "",
    }


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_listing(language: str, stack: Stack, tmp_path: Path) -> None:
    command = await asyncio.to_thread(LANGUAGES[language], tmp_path)
    good = (await stack.get("/")).body.decode()
    bad = forgeries(good, stack.edge.keys, stack.edge.config.edge.public_url)
    first, *rest = await verified(stack, command, good, *bad.values())
    assert first == EMAIL
    accepted = {name: line for name, line in zip(bad, rest, strict=True) if not line.startswith("refused: ")}
    assert not accepted


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_listing_through_a_rotation(language: str, stack: Stack, tmp_path: Path) -> None:
    """Both keys are published: what either signed is accepted."""
    command = await asyncio.to_thread(LANGUAGES[language], tmp_path)
    before = (await stack.get("/")).body.decode()
    ring = stack.edge.keys
    new = ring.rotate(time.time())
    claims = jwt.decode(before, options={"verify_signature": False})
    after = jwt.encode(claims, new.key, algorithm="EdDSA", headers={"kid": new.id})
    assert await verified(stack, command, before, after) == [EMAIL, EMAIL]


@pytest.mark.parametrize("name", ["verify.py", "verify.mjs", "verify.go"])
def test_the_page_shows_the_files(name: str) -> None:
    page = (ROOT / "docs" / "verifying.md").read_text("utf-8")
    assert (LISTINGS / name).read_text("utf-8") in page.replace("\r", "")
