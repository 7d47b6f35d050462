"""The scanner: what a typical head costs, without any Python object, and llhttp through aiohttp's parser beside it.

    python benchmarks/bench_http1.py                nanoseconds per head, best of 7
    python benchmarks/bench_http1.py --json         one JSON object
    python benchmarks/bench_http1.py --callgrind    instructions per head (needs valgrind)

`scan` finds every field, checks it and says how the message is framed; `write` copies besides what passes on into the
head for the next hop. aiohttp's figure includes the Python objects that it makes: it has no other interface.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from aiohttp import http_parser

from guestpass_speedups.http1 import parse_request, parse_response, repeat

REQUEST = b"""\
GET /dashboard/view?tab=2&from=now-6h HTTP/1.1
Host: s4k2m9q8w1e5r7t3.share.example.org
Connection: keep-alive
sec-ch-ua: "Chromium";v="124", "Google Chrome";v="124", "Not-A.Brand";v="99"
sec-ch-ua-mobile: ?0
sec-ch-ua-platform: "Linux"
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/124.0.0.0 Safari/537.36
Accept: */*
Sec-Fetch-Site: same-origin
Sec-Fetch-Mode: cors
Sec-Fetch-Dest: empty
Referer: https://s4k2m9q8w1e5r7t3.share.example.org/dashboard/
Accept-Encoding: gzip, deflate, br, zstd
Accept-Language: en-GB,en;q=0.9
Cookie: __Host-guestpass=Zx0r8nq2mQ4b5v6c7d8e9f0g1h2j3k4l5m6n7p8q9r0; theme=dark

""".replace(b"\n", b"\r\n")

RESPONSE = b"""\
HTTP/1.1 200 OK
Server: nginx/1.22.1
Date: Mon, 24 Nov 2025 04:00:00 GMT
Content-Type: application/json; charset=utf-8
Content-Length: 18321
Connection: keep-alive
Vary: Accept-Encoding, Cookie
ETag: "6592f0a1-4791"
Cache-Control: private, max-age=0
X-Content-Type-Options: nosniff
X-Frame-Options: SAMEORIGIN
Referrer-Policy: same-origin
Set-Cookie: sid=0123456789abcdef0123456789abcdef; Path=/; HttpOnly; SameSite=Lax
Accept-Ranges: bytes

""".replace(b"\n", b"\r\n")


def llhttp(head: bytes, loops: int, response: bool) -> None:
    """Head after head of one connection."""
    kind: Any = http_parser.HttpResponseParser if response else http_parser.HttpRequestParser
    parser = kind(None, object(), 1 << 16, response_with_body=False)
    for _ in range(loops):
        parser.feed_data(head)


CASES: dict[str, Callable[[int], None]] = {
    "request scan": lambda loops: repeat(REQUEST, loops),
    "request scan + write": lambda loops: repeat(REQUEST, loops, write=True),
    "request aiohttp": lambda loops: llhttp(REQUEST, loops, False),
    "response scan": lambda loops: repeat(RESPONSE, loops, response=True),
    "response scan + write": lambda loops: repeat(RESPONSE, loops, response=True, write=True),
    "response aiohttp": lambda loops: llhttp(RESPONSE, loops, True),
}


def nanoseconds(case: Callable[[int], None], loops: int = 20_000, rounds: int = 7) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        case(loops)
        best = min(best, (time.perf_counter_ns() - begin) / loops)
    return best


def instructions(name: str) -> float:
    """Of one head: two runs under callgrind, subtracted."""
    counts = []
    for loops in (1_000, 3_000):
        run = subprocess.run(
            ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__]
            + ["--only", name, "--loops", str(loops)],
            capture_output=True,
            text=True,
            check=True,
        )
        counts.append(int(re.findall(r"Collected : (\d+)", run.stderr)[0]))
    return (counts[1] - counts[0]) / 2_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--callgrind", action="store_true")
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--loops", type=int)
    options = parser.parse_args()
    request, response = parse_request(REQUEST), parse_response(RESPONSE)
    assert request is not None
    assert response is not None
    if options.loops is not None:
        CASES[options.only](options.loops)
        return
    if options.callgrind and shutil.which("valgrind") is None:
        sys.exit("--callgrind needs valgrind: apt-get install valgrind")
    results = {}
    unit = "instructions" if options.callgrind else "ns"
    if not options.json:
        print(
            f"request: {request.size} bytes, {len(request.fields)} fields;"
            f" response: {response.size} bytes, {len(response.fields)} fields"
        )
    for name, case in CASES.items():
        if options.only in (None, name):
            results[name] = instructions(name) if options.callgrind else nanoseconds(case)
            if not options.json:
                print(f"{name:24}{results[name]:10,.0f} {unit} a head", flush=True)
    if options.json:
        print(json.dumps({f"{name} ({unit})": round(value, 1) for name, value in results.items()}))


if __name__ == "__main__":
    main()
