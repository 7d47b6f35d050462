"""What an edge has once: here, what it says of itself when it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guestpass.config import EdgeConfig, parse
from guestpass.edge.home import ready_line


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, True),
        ({"mail": {"smtp": "smtp://mail.example.org", "from": "share@example.org"}}, False),
        ({"notify": [{"use": "webhook"}]}, False),
    ],
    ids=["nothing", "mail", "notify"],
)
def test_the_outbox_is_named_only_where_mail_goes_there(
    tmp_path: Path, sections: dict[str, Any], named: bool
) -> None:
    config = parse(EdgeConfig, sections, tmp_path / "edge.toml")
    line = ready_line(config, listen=[], admin_url="http://127.0.0.1:8081", api_key_file=None, pid=1)
    assert line["outbox"] == (str(tmp_path / "outbox") if named else None)
