"""`make demo`: start the sample dashboard and share it with `guestpass up`. Ctrl-C stops both."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

DASHBOARD = Path(__file__).parent / "dashboard" / "app.py"


def main() -> int:
    with subprocess.Popen(
        [sys.executable, str(DASHBOARD), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as dashboard:
        try:
            assert dashboard.stdout is not None
            url = next(
                (word for word in dashboard.stdout.readline().split() if word.startswith("http://")), None
            )
            if url is None:
                print("The sample dashboard did not start.", file=sys.stderr)
                return 1
            command = [sys.executable, "-m", "guestpass", "up", url, "--to", "alice@example.org"]
            command += ["--name", "Sample dashboard", "--port", "0", *sys.argv[1:]]
            with subprocess.Popen(command) as up:
                # Ctrl-C reaches `up` too: let it end in its own time, then end with what it says.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, lambda *_: up.terminate())
                return up.wait()
        finally:
            dashboard.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                dashboard.wait(5)
            if dashboard.poll() is None:
                dashboard.kill()


if __name__ == "__main__":
    sys.exit(main())
