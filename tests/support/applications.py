"""The applications that a recipient opens: how each starts, and how a person sees that it is alive.

None of them is ours, apart from the sample dashboard, and none is told that it stands behind Guestpass.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from support.programs import Program, free_port, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from support.browser import Sockets

SERVED = Path(__file__).parents[1] / "apps" / "served"
DASHBOARD = Path(__file__).parents[2] / "examples" / "dashboard" / "app.py"

START_SECONDS = 60.0  # two busy cores
PAGE_MS = 60_000.0


@dataclass(frozen=True)
class Running:
    program: Program
    url: str
    path: str = "/"


@dataclass(frozen=True)
class Application:
    """`use` does on the page what a person would and fails unless a value came that only a WebSocket brings."""

    name: str
    start: Callable[[Path], Running]
    use: Callable[[Page, Sockets], None]


# ── Bokeh ────────────────────────────────────────────────────────────────────────────────────────────────────


def start_bokeh(folder: Path) -> Running:
    port = free_port()
    program = Program(
        [
            sys.executable,
            "-m",
            "bokeh",
            "serve",
            SERVED / "bokeh_app.py",
            "--address",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        log=folder / "bokeh.log",
        cwd=folder,
    )
    return Running(program, f"http://127.0.0.1:{port}", "/bokeh_app")


def use_bokeh(page: Page, sockets: Sockets) -> None:
    handle = page.locator(".noUi-handle")
    handle.wait_for(timeout=PAGE_MS)
    handle.press("ArrowRight")
    page.get_by_text("7 squared is 49").wait_for(timeout=PAGE_MS)
    ticks = page.get_by_text(re.compile(r"^tick \d+$"))
    ticks.wait_for(timeout=PAGE_MS)
    seen = int(ticks.inner_text().split()[1])

    def ticked_on() -> bool:
        return int(ticks.inner_text().split()[1]) >= seen + 2

    wait_until("two more ticks", ticked_on, seconds=PAGE_MS / 1000, pause=sockets.watch)


# ── JupyterLab ───────────────────────────────────────────────────────────────────────────────────────────────

NOTEBOOK = {
    "cells": [
        {
            "cell_type": "code",
            "id": "sum",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": 'total = sum(range(1, 101))\nprint("the kernel says", total)',
        }
    ],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}

# So that it neither reads nor writes the settings of whoever runs the tests.
JUPYTER_FOLDERS = (
    "IPYTHONDIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
)


def start_jupyterlab(folder: Path) -> Running:
    port = free_port()
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    (notebooks / "check.ipynb").write_text(json.dumps(NOTEBOOK), "utf-8")
    # Everything else is JupyterLab's default; it listens on loopback only, so the test needs no token of its own.
    config = folder / "jupyter_server_config.json"
    config.write_text(json.dumps({"IdentityProvider": {"token": ""}}), "utf-8")
    # Or it asks the network for news, and the visitor whether it may.
    settings = folder / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    program = Program(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            f"--config={config}",
            f"--notebook-dir={notebooks}", "--ip=127.0.0.1", f"--port={port}", "--port-retries=0",
        ],
        log=folder / "jupyterlab.log",
        cwd=folder,
        env={name: str(folder / name.lower()) for name in JUPYTER_FOLDERS},
    )  # fmt: skip
    return Running(program, f"http://127.0.0.1:{port}", "/lab/tree/check.ipynb")


def use_jupyterlab(page: Page, sockets: Sockets) -> None:
    cell = page.locator(".jp-CodeCell .cm-content").first
    cell.wait_for(timeout=PAGE_MS)

    def kernel_speaks() -> bool:
        return any("/channels" in socket.url for socket in sockets.live())

    # JupyterLab shows a kernel as idle before it has heard of it, and complains about what is run until then.
    wait_until("the kernel's WebSocket", kernel_speaks, seconds=PAGE_MS / 1000, pause=sockets.watch)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for(timeout=PAGE_MS)
    cell.click()
    page.keyboard.press("Shift+Enter")
    page.locator(".jp-OutputArea-output", has_text="the kernel says 5050").wait_for(timeout=PAGE_MS)


# ── Streamlit ────────────────────────────────────────────────────────────────────────────────────────────────


def start_streamlit(folder: Path) -> Running:
    port = free_port()
    program = Program(
        [
            sys.executable, "-m", "streamlit", "run", SERVED / "streamlit_app.py", "--server.headless", "true",
            "--server.address", "127.0.0.1", "--server.port", str(port), "--browser.gatherUsageStats", "false",
        ],
        log=folder / "streamlit.log",
        cwd=folder,
    )  # fmt: skip
    return Running(program, f"http://127.0.0.1:{port}")


def use_streamlit(page: Page, sockets: Sockets) -> None:
    for clicks in range(1, 4):
        page.get_by_role("button", name="Count").click(timeout=PAGE_MS)
        page.get_by_text(f"{clicks} clicks, their square is {clicks * clicks}").wait_for(timeout=PAGE_MS)
    page.locator("[data-testid=stVegaLiteChart]").locator("canvas, svg").first.wait_for(timeout=PAGE_MS)


# ── The sample dashboard ─────────────────────────────────────────────────────────────────────────────────────


def start_dashboard(folder: Path) -> Running:
    port = free_port()
    program = Program([sys.executable, DASHBOARD, "--port", str(port)], log=folder / "dashboard.log")
    return Running(program, f"http://127.0.0.1:{port}")


def use_dashboard(page: Page, sockets: Sockets) -> None:
    page.locator("#state.live").wait_for(timeout=PAGE_MS)
    page.locator("#viewers", has_text="1").wait_for(timeout=PAGE_MS)
    newest = page.locator("#log li").first
    newest.wait_for(timeout=PAGE_MS)
    before = newest.inner_text()
    page.locator("#log li").nth(1).get_by_text(before.split("\n")[-1]).wait_for(timeout=PAGE_MS)
    page.fill("#text", "Seen, thank you.")
    page.get_by_role("button", name="Post").click()
    page.locator("#notes li", has_text="Seen, thank you.").wait_for(timeout=PAGE_MS)


APPLICATIONS = (
    Application("dashboard", start_dashboard, use_dashboard),
    Application("bokeh", start_bokeh, use_bokeh),
    Application("jupyterlab", start_jupyterlab, use_jupyterlab),
    Application("streamlit", start_streamlit, use_streamlit),
)
