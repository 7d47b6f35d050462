"""The conformance script against this edge, and against both gateways: the example and `guestpass gateway`."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support import stack

from guestpass.local_ca import write_certificates

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "gateway"
SPEC = ROOT / "proxy" / "guestpass" / "mux" / "SPEC.md"

PLACES = "--edge {edge} --site {site} --name {name} --key {key} --service {service} --url {url}"
GATEWAYS = {
    "example": f"{sys.executable} {EXAMPLE / 'gateway.py'} {PLACES} --ca {{ca}}",
    "guestpass": f"{sys.executable} {ROOT / 'tests/support/gateway_program.py'} "
    "{edge} {site} {name} {key} {service} {url} {folder} {ca}",
}


async def conformance(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the script writes as JSON; its table is in the report if it fails."""
    report = folder / "report.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLE / "conformance.py"),
        *arguments,
        "--json",
        str(report),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    print(output.decode("utf-8", "replace"))
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    assert process.returncode == (1 if found["FAIL"] else 0)
    return found


def complete(report: dict[str, Any], rules: int) -> None:
    assert [rule for rule in report["rules"] if rule["outcome"] != "pass"] == []
    assert report["pass"] == len(report["rules"]) >= rules
    chapters = set(re.findall(r"^##+ ([\d.]+\d|\d+)\.? ", SPEC.read_text("utf-8"), re.MULTILINE))
    assert {rule["chapter"] for rule in report["rules"]} <= chapters


async def test_edge(tmp_path: Path) -> None:
    """With TLS, a join token, and a share whose visitors the script plays."""
    async with stack.running(tmp_path, "http://127.0.0.1:9", gateways=0) as edge:
        (tmp_path / "token").write_text(await edge.edge.service.create_join_token(stack.SITE), "utf-8")
        (tmp_path / "bearer").write_text(edge.token, "utf-8")
        report = await conformance(
            tmp_path,
            *("--edge", edge.tunnel_url, "--ca", str(edge.ca), "--api", f"http://localhost:{edge.port}"),
            *("--join-token-file", str(tmp_path / "token"), "--service", stack.SERVICE),
            *("--share", f"http://{edge.host}/x", "--bearer-file", str(tmp_path / "bearer")),
        )
        complete(report, 38)
        await edge.until(lambda: not edge.edge.tunnels.status(), "all tunnels gone")
        assert edge.edge.tunnels.streams == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", GATEWAYS)
async def test_gateway(which: str, tmp_path: Path) -> None:
    ca, cert, key = write_certificates(tmp_path, ("localhost", "127.0.0.1"))
    report = await conformance(
        tmp_path, "--gateway", GATEWAYS[which], "--ca", str(ca), "--tls", str(cert), str(key)
    )
    complete(report, 29)


async def test_a_fault_is_found(tmp_path: Path) -> None:
    """The script is not one that everybody passes: a gateway that ignores its credit, and does not answer PING."""
    wrong = tmp_path / "gateway.py"
    text = (EXAMPLE / "gateway.py").read_text("utf-8")
    for right, changed in (
        ("while stream.sent == stream.limit:", "while False:"),
        ("stream.limit - stream.sent)", "wire.MAX_DATA)"),
        ("self.carrier.write(wire.frame(wire.PONG, 0, payload))", "pass"),
    ):
        assert right in text
        text = text.replace(right, changed)
    wrong.write_text(text, "utf-8")
    for name in ("wire.py", "websocket.py"):
        (tmp_path / name).write_text((EXAMPLE / name).read_text("utf-8"), "utf-8")
    command = f"{sys.executable} {wrong} {PLACES}"
    credit = await conformance(tmp_path, "--gateway", command, "--only", "a response stops at the credit")
    ping = await conformance(tmp_path, "--gateway", command, "--only", "unknown frame types are skipped")
    assert (credit["FAIL"], ping["FAIL"]) == (1, 1)
    assert "with credit for" in credit["rules"][0]["detail"]
