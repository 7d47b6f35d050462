"""What is measured: Guestpass and its peers, each in front of the same application on loopback.

The application is nginx with static files (and a WebSocket echo server). Every peer gets what makes it fast: keep-alive
to both sides without a limit of requests, buffers that hold a response, no temporary files, no logs. One process per
role everywhere (nginx: one worker), so that no topology has more workers than another:

| target | visitor → … → application |
|---|---|
| guestpass | edge → TLS tunnel → gateway |
| guestpass-slow | the same with `fast_lane = false` |
| guestpass-log | the same with an access log |
| nginx | nginx, no TLS |
| nginx-tls | nginx → TLS, kept alive → nginx: the topology of ours |
| haproxy | haproxy, no TLS |
| aiohttp | a plain proxy on aiohttp and uvloop (`aiohttp_proxy.py`), no TLS |
| proxy.py | as a forward proxy, no TLS |
| ssh | `ssh -R`: sshd → the SSH connection → ssh |
| direct | nothing between client and application: what the client and the application can do |

With `tls=True` visitors come over TLS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Lab, Process, free_port, program

HERE = Path(__file__).parent

# Bodies by name: what a figure's name says, and their bytes. 43 B is the smallest GIF, the usual "small" of proxies.
SIZES = {"small": 43, "100B": 100, "16KB": 16 * 1024, "1MB": 1024 * 1024}

# No server closes a connection because of its age in the middle of a run.
MANY = 1_000_000_000
KEEP = "600s"

# Of a peer: sweeps end at 1,024 visitors, each with a connection to the application behind.
CONNECTIONS = 4096

SITE, SERVICE, ECHO, EMAIL = "bench", "app", "echo", "alice@example.org"


@dataclass
class Target:
    """Something that answers on a port of this machine."""

    lab: Lab
    name: str
    port: int
    processes: list[Process]
    headers: dict[str, str] = field(default_factory=dict)
    tls: bool = False
    prefix: str = ""  # of the request's target, where it is not a path: a forward proxy's
    echo_headers: dict[str, str] = field(default_factory=dict)  # for WebSockets, where they differ
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def role(self, name: str) -> Process:
        return next(process for process in self.processes if process.role == name)


# ── the application ──────────────────────────────────────────────────────────────────────────────────────────────


def body(name: str) -> bytes:
    """Text that no level of any stack could shorten unnoticed: every position differs from its neighbours."""
    size = SIZES[name]
    text = b"".join(b"%08d\n" % number for number in range(size // 9 + 1))
    return text[:size]


def application(lab: Lab) -> Target:
    """nginx with the static files; one for all targets of a lab."""
    if "application" not in lab.once:
        root = lab.folder / "root"
        root.mkdir()
        for name in SIZES:
            (root / name).write_bytes(body(name))
        port = free_port()
        server = f"""
            open_file_cache max=100 inactive={KEEP};
            open_file_cache_valid {KEEP};
            server {{ listen 127.0.0.1:{port} backlog=4096; root {root}; etag off; }}"""
        lab.once["application"] = Target(lab, "direct", port, [_nginx(lab, "application", port, server)])
    target: Target = lab.once["application"]
    return target


def echo_application(lab: Lab) -> Target:
    """A WebSocket server that sends back what it gets, at /echo."""
    if "echo" not in lab.once:
        port = free_port()
        process = lab.start("echo", [sys.executable, HERE / "echo_server.py", str(port)])
        process.wait_for_port(port)
        lab.once["echo"] = Target(lab, "direct", port, [process])
    target: Target = lab.once["echo"]
    return target


def _nginx(lab: Lab, role: str, port: int, servers: str) -> Process:
    """One nginx with one worker."""
    folder = lab.folder / f"nginx-{port}"
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        daemon off;
        worker_processes 1;
        worker_rlimit_nofile {2 * CONNECTIONS};
        pid {folder}/pid;
        error_log stderr error;
        events {{ worker_connections {2 * CONNECTIONS}; }}
        http {{
            access_log off;
            default_type application/octet-stream;
            sendfile on;
            tcp_nopush on;
            tcp_nodelay on;
            keepalive_timeout {KEEP};
            keepalive_requests {MANY};
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            {servers}
        }}
        """,
        "utf-8",
    )
    process = lab.start(role, [program("nginx"), "-p", folder, "-c", config, "-e", "stderr"])
    process.wait_for_port(port)
    return process


def _upstream(name: str, port: int) -> str:
    return f"""
        upstream {name} {{
            server 127.0.0.1:{port};
            keepalive 2048; keepalive_requests {MANY}; keepalive_timeout {KEEP};
        }}"""


# The whole of a 1 MB response may be in memory, so that the application is never held up by buffers. Of what was tried
# with 1 MB bodies (the defaults, 8 × 32k, 64 × 16k, 16 × 64k, 8 × 256k, 4 × 1m, no buffering) this was the fastest,
# with TLS and without.
PROXY = """
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_buffer_size 16k;
    proxy_buffers 4 1m;
    proxy_busy_buffers_size 2m;
    proxy_max_temp_file_size 0;
"""

UPGRADE = """
    proxy_http_version 1.1;
    proxy_set_header Connection upgrade;
    proxy_set_header Upgrade $http_upgrade;
    proxy_read_timeout 600s;
"""


def _visitors(lab: Lab, port: int, tls: bool) -> str:
    """How an nginx listens."""
    if not tls:
        return f"listen 127.0.0.1:{port} backlog=4096;"
    _, certificate, key = lab.certificates()
    return f"""listen 127.0.0.1:{port} ssl backlog=4096;
        ssl_certificate {certificate}; ssl_certificate_key {key}; ssl_protocols TLSv1.3;
        ssl_session_cache shared:s{port}:10m;"""


# ── the peers ────────────────────────────────────────────────────────────────────────────────────────────────────


def nginx(lab: Lab, tls: bool = False) -> Target:
    port = free_port()
    echo = echo_application(lab).port
    servers = f"""
        {_upstream("app", application(lab).port)}
        server {{
            {_visitors(lab, port, tls)}
            location / {{ proxy_pass http://app; {PROXY} }}
            location = /echo {{ proxy_pass http://127.0.0.1:{echo}; {UPGRADE} }}
        }}"""
    return Target(lab, "nginx", port, [_nginx(lab, "nginx", port, servers)], tls=tls)


def nginx_tls(lab: Lab, tls: bool = False) -> Target:
    """nginx → TLS → nginx. The first one checks the certificate of the second, as a gateway checks the edge's."""
    inner, port = free_port(), free_port()
    echo = echo_application(lab).port
    ca, _, _ = lab.certificates()
    verify = f"""
        proxy_ssl_verify on; proxy_ssl_trusted_certificate {ca}; proxy_ssl_name localhost;
        proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse on;"""
    second = f"""
        {_upstream("app", application(lab).port)}
        server {{
            {_visitors(lab, inner, True)}
            location / {{ proxy_pass http://app; {PROXY} }}
            location = /echo {{ proxy_pass http://127.0.0.1:{echo}; {UPGRADE} }}
        }}"""
    first = f"""
        {_upstream("second", inner)}
        server {{
            {_visitors(lab, port, tls)}
            location / {{ proxy_pass https://second; {PROXY} {verify} }}
            location = /echo {{ proxy_pass https://127.0.0.1:{inner}; {UPGRADE} {verify} }}
        }}"""
    processes = [_nginx(lab, "second nginx", inner, second), _nginx(lab, "first nginx", port, first)]
    return Target(lab, "nginx-tls", port, processes, tls=tls)


def haproxy(lab: Lab, tls: bool = False) -> Target:
    if tls:
        raise ValueError("haproxy is measured without TLS")
    port = free_port()
    config = lab.folder / f"haproxy-{port}.cfg"
    config.write_text(
        f"""
global
    nbthread 1
    maxconn {CONNECTIONS}
defaults
    mode http
    timeout connect 5s
    timeout client {KEEP}
    timeout server {KEEP}
    timeout tunnel {KEEP}
    option forwardfor
    http-reuse always
frontend visitors
    bind 127.0.0.1:{port} backlog 4096
    default_backend app
backend app
    server app 127.0.0.1:{application(lab).port}
""",
        "utf-8",
    )
    process = lab.start("haproxy", [program("haproxy"), "-db", "-f", config])
    process.wait_for_port(port)
    return Target(lab, "haproxy", port, [process])


def aiohttp_proxy(lab: Lab, tls: bool = False) -> Target:
    if tls:
        raise ValueError("the plain aiohttp proxy is measured without TLS")
    port = free_port()
    upstream = f"http://127.0.0.1:{application(lab).port}"
    process = lab.start("aiohttp proxy", [sys.executable, HERE / "aiohttp_proxy.py", str(port), upstream])
    process.wait_for_port(port)
    return Target(lab, "aiohttp", port, [process])


def proxy_py(lab: Lab, tls: bool = False) -> Target:
    """As a forward proxy: the event loop of its reverse proxy (2.4.10) ends with an exception after a few requests on
    connections that are kept alive."""
    if tls:
        raise ValueError("proxy.py is measured without TLS")
    port = free_port()
    command = [sys.executable, "-m", "proxy", "--hostname", "127.0.0.1", "--port", str(port)]
    command += ["--num-workers", "1", "--num-acceptors", "1", "--threadless", "--local-executor", "1"]
    command += ["--log-level", "ERROR", "--data-dir", str(lab.folder / "proxy.py")]
    command += ["--timeout", "600", "--backlog", "4096"]
    process = lab.start("proxy.py", command)
    process.wait_for_port(port)
    return Target(lab, "proxy.py", port, [process], prefix=f"http://127.0.0.1:{application(lab).port}")


def ssh_reverse(lab: Lab, tls: bool = False) -> Target:
    """An sshd of its own with throw-away keys, and `ssh -R` from "the private network"."""
    if tls:
        raise ValueError("ssh carries bytes: visitors' TLS would end at the application")
    folder = lab.folder / "ssh"
    folder.mkdir()
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(
            [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    (folder / "authorized_keys").write_bytes((folder / "user.pub").read_bytes())
    sshd_port, port = free_port(), free_port()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{sshd_port} {(folder / 'host.pub').read_text()}")
    if os.getuid() == 0:
        # Where sshd as root chroots its unprivileged half; the init script makes it at boot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = folder / "sshd_config"
    config.write_text(
        f"""
        ListenAddress 127.0.0.1:{sshd_port}
        HostKey {folder}/host
        PidFile none
        AuthorizedKeysFile {folder}/authorized_keys
        StrictModes no
        UsePAM no
        PasswordAuthentication no
        PermitRootLogin prohibit-password
        AllowTcpForwarding remote
        """,
        "utf-8",
    )
    sshd = lab.start("sshd", [program("sshd"), "-D", "-e", "-f", config])
    sshd.wait_for_port(sshd_port)
    command: list[str | Path] = [
        program("ssh"),
        "-N",
        "-F",
        "none",
        "-p",
        str(sshd_port),
        "-i",
        folder / "user",
    ]
    for option in (f"UserKnownHostsFile={folder}/known_hosts", "BatchMode=yes", "ExitOnForwardFailure=yes"):
        command += ["-o", option]
    command += ["-R", f"127.0.0.1:{port}:127.0.0.1:{application(lab).port}", "127.0.0.1"]
    ssh = lab.start("ssh", command)
    ssh.wait_for_port(port)
    return Target(lab, "ssh", port, [sshd, ssh])


# ── Guestpass ────────────────────────────────────────────────────────────────────────────────────────────────────


class Api:
    """The management API of an edge."""

    def __init__(self, port: int, key: str) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1"
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.headers["Host"] = f"localhost:{port}"

    def post(self, path: str, data: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._base + path, json.dumps(data).encode(), self.headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
            return answer


def guestpass_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-P", "-m", "guestpass", *map(str, arguments)]


def edge_config(lab: Lab, folder: Path, *, fast_lane: bool, tls: bool, log: bool = False) -> dict[str, Any]:
    """An `edge.toml` in `folder`; returns its ports. `log`: with an access log."""
    _, certificate, key = lab.certificates()
    port, tunnel, admin = free_port(), free_port(), free_port()
    # Visitors over TLS come to the listener of the tunnels; the plain one serves the API in either case.
    visitors = tunnel if tls else port
    domain = f"share.localhost:{visitors}"
    config = folder / "edge.toml"
    config.write_text(
        f"""[edge]
listen = ["http://127.0.0.1:{port}", "https://127.0.0.1:{tunnel}"]
admin_listen = "127.0.0.1:{admin}"
public_url = "http://localhost:{port}"
share_domain = "{domain}"
tls = {{ cert = "{certificate}", key = "{key}" }}
fast_lane = {str(fast_lane).lower()}
drain_seconds = 0
{f'access_log = "{folder}/access.log"' if log else ""}

# Everything comes from one address and one session.
[limits]
connections_per_client = 100000
streams_per_session = 100000
streams_per_share = 100000
""",
        "utf-8",
    )
    return {"port": port, "tunnel": tunnel, "visitors": visitors, "domain": domain, "config": config}


def guestpass(
    lab: Lab,
    tls: bool = False,
    *,
    fast_lane: bool = True,
    log: bool = False,
    name: str = "guestpass",
    edge_command: Callable[[Path], list[str]] | None = None,
) -> Target:
    """An edge and one gateway with the tunnels of its default configuration; two shares, a bearer token each."""
    folder = lab.folder / f"{name}{'-visitors-tls' if tls else ''}-{free_port()}"
    folder.mkdir()
    ports = edge_config(lab, folder, fast_lane=fast_lane, tls=tls, log=log)
    edge, ready = start_edge(lab, ports["config"], edge_command)
    api = Api(ports["port"], Path(ready["api_key_file"]).read_text().strip())
    gateway = start_gateway(lab, folder, api, ports)
    headers = []
    shares = []
    for service in (SERVICE, ECHO):
        share = api.post(
            "/shares", {"site": SITE, "service": service, "to": [EMAIL], "invite": False, "path": "/"}
        )
        token = api.post(f"/shares/{share['id']}/tokens", {"email": EMAIL, "expires": None})["token"]
        headers.append({"Host": f"{share['id']}.{ports['domain']}", "Authorization": f"Bearer {token}"})
        shares.append(share["id"])
    return Target(
        lab,
        name,
        ports["visitors"],
        [edge, gateway],
        headers=headers[0],
        echo_headers=headers[1],
        tls=tls,
        facts={**ports, "folder": folder, "api": api, "shares": shares, "ready": ready},
    )


def start_edge(
    lab: Lab, config: Path, command: Callable[[Path], list[str]] | None = None
) -> tuple[Process, dict[str, Any]]:
    """The edge and its `ready` line."""
    make = command or (lambda path: guestpass_command("edge", "--config", path, "--json"))
    edge = lab.start("edge", make(config))
    ready: dict[str, Any] = json.loads(edge.wait_for_line("{"))
    if "error" in ready:
        raise RuntimeError(f"the edge did not start: {ready['error']}")
    return edge, ready


def start_gateway(lab: Lab, folder: Path, api: Api, ports: Mapping[str, Any]) -> Process:
    """Enrol one, start it and wait until it is connected."""
    ca, _, _ = lab.certificates()
    config = folder / "gateway.toml"
    config.write_text(
        f"""[gateway]
name = "gateway-1"
site = "{SITE}"
edges = ["https://localhost:{ports["tunnel"]}"]
ca = "{ca}"
drain_seconds = 0

[services.{SERVICE}]
url = "http://127.0.0.1:{application(lab).port}"

[services.{ECHO}]
url = "http://127.0.0.1:{echo_application(lab).port}"
""",
        "utf-8",
    )
    join = api.post("/gateways/join-tokens", {"site": SITE})["join_token"]
    subprocess.run(
        guestpass_command(
            *("gateway", "enroll", "--edge", f"http://localhost:{ports['port']}"),
            *("--join-token-file", "-", "--config", config, "--ca", ca),
        ),
        input=join,
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    gateway = lab.start("gateway", guestpass_command("gateway", "--config", config, "--json"))
    gateway.wait_for_line('{"gateway"')
    return gateway


def guestpass_slow(lab: Lab, tls: bool = False) -> Target:
    return guestpass(lab, tls, fast_lane=False, name="guestpass-slow")


def guestpass_log(lab: Lab, tls: bool = False) -> Target:
    return guestpass(lab, tls, log=True, name="guestpass-log")


def direct(lab: Lab, tls: bool = False) -> Target:
    if tls:
        raise ValueError("the application has no TLS")
    return application(lab)


TARGETS: dict[str, Callable[..., Target]] = {
    "guestpass": guestpass,
    "guestpass-slow": guestpass_slow,
    "guestpass-log": guestpass_log,
    "nginx": nginx,
    "nginx-tls": nginx_tls,
    "haproxy": haproxy,
    "aiohttp": aiohttp_proxy,
    "proxy.py": proxy_py,
    "ssh": ssh_reverse,
    "direct": direct,
}

# As they are called in figures and plots.
LABELS = {
    "guestpass": "Guestpass",
    "guestpass-slow": "Guestpass, fast lane off",
    "guestpass-log": "Guestpass with an access log",
    "nginx": "nginx, one hop",
    "nginx-tls": "nginx → TLS → nginx",
    "haproxy": "HAProxy, one hop",
    "aiohttp": "plain aiohttp proxy",
    "proxy.py": "proxy.py",
    "ssh": "ssh -R",
    "direct": "the application itself",
}
