"""Applications that nobody here wrote a server for: nginx, Apache httpd, Node, aiohttp, uvicorn with h11.

Each answers every request with what its server made of it: method, target, size and digest of the body and the port of
the connection in the header field X-Seen (so that an answer to HEAD has it too), the fields in the body. nginx and
Apache are asked for what they tell programs, by FastCGI, and are configured as permissively as they allow: names with
underscores and other odd characters pass. Each request that was read to its end is a line of the origin's log.

Beside the echo, /static/ of nginx and Apache are files, for ranges and conditional requests; /early-hints and /trailers
of Node, and /status/204 and /status/304 of all, are what they are called.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.programs import Program, free_port

HERE = Path(__file__).parent
START_SECONDS = 30.0
STATIC = bytes(range(32, 127)) * 1000
MODIFIED = 1_000_000_000.0  # Sun, 09 Sep 2001 01:46:40 GMT

NGINX = """
daemon off; user nobody nogroup; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; underscores_in_headers on; ignore_invalid_headers off; merge_slashes off;
  large_client_header_buffers 8 64k; client_max_body_size 64m; keepalive_requests 1000000;
  client_body_temp_path {folder}/b; fastcgi_temp_path {folder}/f; proxy_temp_path {folder}/p;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      fastcgi_pass 127.0.0.1:{echo};
      fastcgi_param REQUEST_METHOD $request_method; fastcgi_param REQUEST_URI $request_uri;
      fastcgi_param CONTENT_LENGTH $content_length; fastcgi_param REMOTE_PORT $remote_port;
    }}
    location /static/ {{ root {folder}; }}
  }}
}}
"""

APACHE = """
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {folder}/httpd.pid
ErrorLog {folder}/httpd-error.log
DefaultRuntimeDir {folder}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_fcgi_module {modules}/mod_proxy_fcgi.so
User nobody
Group nogroup
HttpProtocolOptions Unsafe LenientMethods Allow0.9
AllowEncodedSlashes NoDecode
MergeSlashes Off
LimitRequestFieldSize 65536
LimitRequestLine 65536
MaxKeepAliveRequests 0
DocumentRoot {folder}
ProxyPass /static/ !
ProxyPassMatch "^/" "fcgi://127.0.0.1:{echo}" enablereuse=off
"""
APACHE_MODULES = Path("/usr/lib/apache2/modules")


@dataclass(frozen=True, slots=True)
class Origin:
    name: str
    url: str
    log: Path


def _python(script: str, name: str, port: int, log: Path) -> list[str | Path]:
    return [sys.executable, HERE / script, name, str(port), log]


def _ready(program: Program) -> None:
    program.wait_for_line("ready", seconds=START_SECONDS)


def _own(script: str) -> Callable[[ExitStack, Path, str], str]:
    def start(stack: ExitStack, folder: Path, name: str) -> str:
        port, log = free_port(), folder / "seen.log"
        command: list[str | Path] = (
            [tool("node", "nodejs"), HERE / script, name, str(port), log]
            if script.endswith(".js")
            else _python(script, name, port, log)
        )
        _ready(stack.enter_context(Program(command, log=folder / "program.log")))
        return f"http://127.0.0.1:{port}"

    return start


def _behind(
    template: str, command: Callable[[Path], list[str | Path]]
) -> Callable[[ExitStack, Path, str], str]:
    """A server in front of the FastCGI echo. Where it runs as root it serves as somebody else, who must reach its
    files."""

    def start(stack: ExitStack, folder: Path, name: str) -> str:
        port, echo = free_port(), free_port()
        program = _python("fastcgi_echo.py", name, echo, folder / "seen.log")
        _ready(stack.enter_context(Program(program, log=folder / "echo.log")))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"guestpass-{name}-")))
        home.chmod(0o755)
        (home / "static").mkdir()
        (home / "static" / "file.txt").write_bytes(STATIC)
        os.utime(home / "static" / "file.txt", (MODIFIED, MODIFIED))
        config = home / "server.conf"
        config.write_text(template.format(folder=home, port=port, echo=echo, modules=APACHE_MODULES), "utf-8")
        url = f"http://127.0.0.1:{port}"
        server = stack.enter_context(Program(command(config), log=folder / "program.log"))
        server.wait_for_url(f"{url}/static/file.txt", seconds=START_SECONDS)
        return url

    return start


START: dict[str, Callable[[ExitStack, Path, str], str]] = {
    "nginx": _behind(
        NGINX, lambda config: [tool("nginx", "nginx"), "-e", config.with_name("error.log"), "-c", config]
    ),
    "apache": _behind(
        APACHE, lambda config: [tool("apache2", "apache2"), "-f", config, "-k", "start", "-DFOREGROUND"]
    ),
    "node": _own("node_echo.js"),
    "aiohttp": _own("aiohttp_echo.py"),
    "uvicorn": _own("uvicorn_echo.py"),
}
FILES = ("nginx", "apache")  # those with /static/
# The one that misbehaves on purpose is none of the tastes.
RAW = "raw"


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, Origin]]:
    """All of them, each in a process of its own."""
    with ExitStack() as stack:
        found = {}
        for name, start in {**START, RAW: _own("raw_origin.py")}.items():
            own = folder / name
            own.mkdir()
            found[name] = Origin(name, start(stack, own, name), own / "seen.log")
        yield found


def tool(name: str, package: str) -> str:
    """Path of a program from Debian. A test that needs one never passes without."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        message = f"these tests run {name} and there is none: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path
