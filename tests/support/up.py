"""`guestpass up` as its users run it: a process of its own, asked in JSON."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.programs import Program

START_SECONDS = 60.0
COMMAND_SECONDS = 30.0

GUESTPASS = (sys.executable, "-m", "guestpass")


class Up:
    """An edge, a gateway and one share of `url`. `with` ends them."""

    def __init__(
        self,
        url: str,
        *,
        to: str,
        folder: Path,
        mail: str | None = None,
        options: Sequence[str] = (),
        config: str = "",
    ) -> None:
        """`config`: further sections of edge.toml."""
        command = [*GUESTPASS, "up", url, "--to", to, "--port", "0", "--json", *options]
        if mail is not None:
            config = f'[mail]\nsmtp = "{mail}"\nfrom = "Guestpass <share@example.com>"\n{config}'
        if config:
            file = folder / "edge.toml"
            file.write_text(config, "utf-8")
            command += ["--config", str(file)]
        self.program = Program(command, log=folder / "guestpass.log", cwd=folder)
        try:
            self.facts: dict[str, Any] = json.loads(self.program.wait_for_line("{", seconds=START_SECONDS))
            assert "error" not in self.facts, self.program.output()
        except BaseException:
            self.program.stop()
            raise
        self.share: str = self.facts["share"]
        self.link: str = self.facts["link"]
        self.origin: str = self.facts["origin"]
        self.edge: str = self.facts["edge"]
        self.api_key: str = self.facts["api_key"]

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """A management command of this edge, started; `answer` waits for it."""
        return subprocess.Popen(
            [*GUESTPASS, *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GUESTPASS_EDGE": self.edge, "GUESTPASS_API_KEY": self.api_key},
        )

    def get(
        self, url: str, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Without a browser. `*.localhost` is 127.0.0.1, which Python's resolver does not know."""
        parts = urlsplit(url)
        connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=COMMAND_SECONDS)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Host": parts.netloc, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def __enter__(self) -> Up:
        self.program.__enter__()
        return self

    def __exit__(self, *about: Any) -> None:
        self.program.__exit__(*about)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object that a command printed; AssertionError unless it succeeded."""
    with process:
        output, _ = process.communicate(timeout=COMMAND_SECONDS)
    assert process.returncode == 0, output
    found = json.loads(output)
    assert isinstance(found, dict)
    return found
