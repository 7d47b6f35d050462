"""`guestpass gateway` with a configuration made of arguments, for examples/gateway/conformance.py.

python gateway_program.py EDGE SITE NAME KEY SERVICE URL FOLDER [CA]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

edge, site, name, key, service, url, folder, *ca = sys.argv[1:]
config = Path(folder) / "gateway.toml"
trust = f'ca = "{ca[0]}"\n' if ca else ""
config.write_text(
    f'[gateway]\nname = "{name}"\nsite = "{site}"\nedges = ["{edge}"]\nkey = "{key}"\ntunnels = 1\n'
    f'drain_seconds = 0\n{trust}[services.{service}]\nurl = "{url}"\n',
    "utf-8",
)
os.execv(sys.executable, [sys.executable, "-m", "guestpass", "gateway", "--config", str(config)])
