"""The keys of assertions: published before they sign, kept until what they signed has expired, the same for all."""

from __future__ import annotations

import bisect
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guestpass.cli import main
from guestpass.edge.signing_keys import DAY, FILE, JWKS_SECONDS, KEEP, LIFETIME, PUBLISH_AHEAD, KeyRing
from guestpass.errors import ConfigError

T = 1_750_000_000.0
DAYS = 90


def opened(folder: Path, now: float = T, days: float = DAYS) -> KeyRing:
    ring = KeyRing(folder, days=days)
    ring.open(now)
    return ring


def published(ring: KeyRing) -> list[str]:
    return [key["kid"] for key in ring.jwks["keys"]]


def test_the_first_key_signs_at_once_and_is_private(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    assert published(ring) == [ring.current(T).id]
    for name in (FILE, FILE + ".lock"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    public = ring.jwks["keys"][0]
    assert set(public) == {"kty", "crv", "x", "kid", "use", "alg"}, "nothing private"


def test_the_margins() -> None:
    assert PUBLISH_AHEAD > JWKS_SECONDS + 60, (
        "whoever keeps the set, and whoever sweeps, has seen a key that signs"
    )
    assert KEEP > LIFETIME, "what an old key signed can be verified until it expires"


def test_a_year_of_rotation(tmp_path: Path) -> None:
    """Minute by minute where something happens: whatever is signed verifies with every set that anybody may hold."""
    ring = opened(tmp_path)
    sets: list[tuple[float, set[str]]] = [(T, set(published(ring)))]
    signed: list[tuple[float, str]] = []
    signers = []
    now = T
    while now < T + 370 * DAY:
        ring.tick(now)
        sets.append((now, set(published(ring))))
        key = ring.current(now).id
        signed.append((now, key))
        if not signers or signers[-1] != key:
            signers.append(key)
        busy = len(published(ring)) > 1 or (now - T) % (DAYS * DAY) > DAYS * DAY - 2 * PUBLISH_AHEAD
        now += 60 if busy else 3600
    assert len(signers) == 5
    assert len(set(signers)) == 5
    times = [when for when, _ in sets]
    for at, key in signed:
        # Fetched at most JWKS_SECONDS before it was signed, or while it is good: the set in force at each such moment.
        first = bisect.bisect_right(times, at - JWKS_SECONDS) - 1
        last = bisect.bisect_right(times, at + LIFETIME)
        assert all(key in ids for _, ids in sets[max(first, 0) : last]), at
    assert max(len(ids) for _, ids in sets) == 2


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.rotate(T + 10)
    second = opened(tmp_path, T + 20)
    assert published(first) == published(second)
    assert first.current(T + 20).id == second.current(T + 20).id
    later = T + 10 + PUBLISH_AHEAD
    assert first.current(later - 1).id == second.current(later - 1).id != second.current(later).id


def test_two_processes_make_one_new_key(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    due = T + DAYS * DAY - PUBLISH_AHEAD
    one.tick(due)
    other.tick(due)
    one.tick(due + 60)
    assert published(one) == published(other)
    assert len(published(one)) == 2


def test_processes_that_rotate_at_the_same_time(tmp_path: Path) -> None:
    """Eight at once: one key is added, and the file is whole."""
    opened(tmp_path)
    code = (
        "import sys, pathlib; from guestpass.edge.signing_keys import KeyRing\n"
        f"ring = KeyRing(pathlib.Path(sys.argv[1]), days={DAYS}); ring.open({T}); ring.rotate({T} + 1)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(8)]
    assert [process.wait(60) for process in running] == [0] * 8
    assert len(json.loads((tmp_path / FILE).read_bytes())["keys"]) == 2


def test_without_days_a_key_stays(tmp_path: Path) -> None:
    ring = opened(tmp_path, days=0)
    before = published(ring)
    ring.tick(T + 3650 * DAY)
    assert published(ring) == before


def test_a_long_stop_is_made_up_for_in_order(tmp_path: Path) -> None:
    """An edge that was off when its key should have changed: the new one is published first all the same."""
    before = opened(tmp_path).current(T).id
    ring = opened(tmp_path, now := T + 400 * DAY)
    assert ring.current(now).id == before
    assert len(published(ring)) == 2
    ring.tick(now + PUBLISH_AHEAD + KEEP)
    assert published(ring) != [before]
    assert len(published(ring)) == 1


def test_compromised_keys_are_gone_at_once(tmp_path: Path) -> None:
    ring, other = opened(tmp_path), opened(tmp_path)
    old = published(ring)
    new = ring.rotate(T + 5, compromised=True)
    other.tick(T + 65)
    for each in (ring, other):
        assert published(each) == [new.id]
        assert each.current(T + 65).id == new.id
    assert new.id not in old
    assert b"PRIVATE" in (tmp_path / FILE).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2, "no copy of the old ones is left"


def test_a_clock_that_went_back_still_signs(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    assert ring.current(T - DAY).id == published(ring)[0]


def test_the_single_key_of_before_goes_on(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "assertion.key").write_bytes(pem)
    ring = opened(tmp_path)
    assert ring.current(T).key.public_key() == key.public_key()
    assert not (tmp_path / "assertion.key").exists()
    assert opened(tmp_path).current(T).id == ring.current(T).id


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "does not hold signing keys"),
        ("{}", "does not hold signing keys"),
        ('{"keys": []}', "holds no key"),
        ('{"keys": [1]}', "does not hold signing keys"),
        ('{"keys": [{"pem": "x", "signs_from": 1}]}', "is not a PEM private key"),
        ('{"keys": [{"pem": "x", "signs_from": "soon"}]}', "is not a PEM private key|does not hold"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=says):
        opened(tmp_path)


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    pem = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "assertion.key").write_bytes(pem)
    with pytest.raises(ConfigError, match="not an Ed25519 key"):
        opened(tmp_path)


def test_a_file_that_breaks_while_the_edge_runs_keeps_the_keys(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    before = published(ring)
    (tmp_path / FILE).write_text("half a fi")
    with pytest.raises(ConfigError):
        ring.tick(T + 60)
    assert published(ring) == before


def test_nothing_is_left_when_the_disk_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = opened(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        ring.rotate(T + 1)
    assert (tmp_path / FILE).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    assert ring.rotate(T + 1).signs_from == T + 1 + PUBLISH_AHEAD


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "edge.toml"
    config.write_text('[edge]\nstate = "sqlite:///edge.db"\n')

    def run(*arguments: str) -> list[dict[str, str]]:
        assert main(["--json", "keys", *arguments, "--config", str(config)]) == 0
        found: list[dict[str, str]] = json.loads(capsys.readouterr().out)["keys"]
        return found

    (first,) = run("list")
    assert first["state"] == "signs"
    assert [key["state"] for key in run("rotate")] == ["signs", "waits"]
    assert len(run("rotate")) == 2, "the one that waits is enough"
    (only,) = run("rotate", "--compromised")
    assert only["state"] == "signs"
    assert only["id"] != first["id"]
