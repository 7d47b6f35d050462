"""Against OpenLDAP's slapd, on a Unix socket's worth of loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import ldap3
import pytest
from guestpass_ldap import TRIES, LdapAuthenticator

from guestpass.testing import edge_with, use

SLAPD = shutil.which("slapd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib/openldap")

CONFIG = """
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/inetorgperson.schema
modulepath /usr/lib/ldap
moduleload back_mdb
pidfile {folder}/slapd.pid
database mdb
suffix "dc=example,dc=org"
rootdn "cn=admin,dc=example,dc=org"
rootpw secret
directory {folder}/db
access to attrs=userPassword by anonymous auth by * none
access to * by * read
"""

BASE = "dc=example,dc=org"
PEOPLE = {
    "alice": ("alice@example.org", "correct horse"),
    "mallory": ("mallory@example.org", "battery staple"),
}
TWINS = ("twin-1", "twin-2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert SLAPD, "this needs slapd: apt-get install slapd"
    folder = tmp_path_factory.mktemp("ldap")
    (folder / "db").mkdir()
    (folder / "slapd.conf").write_text(CONFIG.format(folder=folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"ldap://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [SLAPD, "-f", str(folder / "slapd.conf"), "-h", url, "-d", "0"], stderr=log, stdout=log
        )
    try:
        fill(url, folder)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def fill(url: str, folder: Path) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            admin = ldap3.Connection(ldap3.Server(url), f"cn=admin,{BASE}", "secret", auto_bind=True)
            break
        except ldap3.core.exceptions.LDAPException:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
    assert admin.add(BASE, ["dcObject", "organization"], {"dc": "example", "o": "Example"})
    people = {**PEOPLE, **dict.fromkeys(TWINS, ("twin@example.org", "same"))}
    for name, (mail, password) in people.items():
        fields = {"cn": name, "sn": name, "mail": mail, "userPassword": password}
        assert admin.add(f"uid={name},{BASE}", "inetOrgPerson", fields), admin.result
    admin.unbind()


async def sign_in(url: str, email: str, password: str, times: int = 1) -> tuple[int, str]:
    async with edge_with(use(LdapAuthenticator, url=url, base=BASE, insecure=True)) as edge:
        page = await edge.visitor().get("/")
        for _ in range(times):
            page = await page.submit(email=email, password=password)
        return page.status, page.text


async def test_the_password_admits(directory: str) -> None:
    status, text = await sign_in(directory, "Alice@Example.org", "correct horse")
    assert status == 200
    assert '"x-guestpass-email": "alice@example.org"' in text


@pytest.mark.parametrize(
    ("email", "password"),
    [
        ("alice@example.org", "battery staple"),
        ("alice@example.org", ""),
        ("nobody@example.org", "correct horse"),
        ("twin@example.org", "same"),
        ("*@example.org", "correct horse"),
        ("alice@example.org)(uid=*", "correct horse"),
    ],
)
async def test_nothing_else_does(directory: str, email: str, password: str) -> None:
    _, text = await sign_in(directory, email, password)
    assert "x-guestpass-email" not in text


async def test_who_is_not_invited_stays_outside(directory: str) -> None:
    status, _ = await sign_in(directory, "mallory@example.org", "battery staple")
    assert status == 403


async def test_nobody_guesses_for_ever(directory: str) -> None:
    _, text = await sign_in(directory, "alice@example.org", "a guess", TRIES + 1)
    assert "Too many attempts" in text


async def test_without_its_directory_it_denies() -> None:
    async with edge_with(use(LdapAuthenticator, url="ldap://127.0.0.1:1", base=BASE, insecure=True)) as edge:
        page = await edge.visitor().get("/")
        page = await page.submit(email="alice@example.org", password="correct horse")
        assert "x-guestpass-email" not in page.text
        assert edge.faults() != {}


async def test_a_password_never_crosses_the_network_in_the_clear(directory: str) -> None:
    """slapd here has no TLS: unless `insecure` is set, nothing is sent."""
    async with edge_with(use(LdapAuthenticator, url=directory, base=BASE)) as edge:
        page = await edge.visitor().get("/")
        page = await page.submit(email="alice@example.org", password="correct horse")
        assert "x-guestpass-email" not in page.text
