# One command for each thing a developer does. Everything is installed into $(VENV); nothing else on the machine changes.
#   make demo   make test   make test-apps   make check   make faults   make bench-quick   make bench

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := $(shell find proxy _speedups plugins -type f ! -name '*.so' ! -name '*.pyc' ! -name '*.c' ! -path '*.egg-info*') \
	setup.py pyproject.toml MANIFEST.in README.md LICENSE

# cython-lint calls pycodestyle by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DELETE_ON_ERROR:
.PHONY: help demo test test-apps check format screenshots bench bench-quick bench-smoke bench-tunnel report faults \
	conformance plugins choosers fuzz fuzz-fields fuzz-http-asan fuzz-asan build clean

help:
	@echo "make demo         share the bundled sample dashboard and print the link"
	@echo "make test         build the wheel, install it, run the test-suite against it"
	@echo "make test-apps    applications and every page of ours in a real browser (needs chromium, nodejs, npm)"
	@echo "make check        formatting, lint, types, docs, duplicates, import directions"
	@echo "make format       format the sources"
	@echo "make faults       what the tunnel survives: kills, black holes, storms, bad input (root, iproute2, nftables)"
	@echo "make conformance  HTTP, WebSocket, TLS, spoofs and floods against real applications, in a table"
	@echo "make plugins      hostile providers, containment, revocation of 10,000 streams, in a table"
	@echo "make choosers     simulate the choosers of gateways, and renew their plots in docs/plots"
	@echo "make fuzz-asan    fuzz the tunnel's compiled core under AddressSanitizer (60 s; FUZZ_SECONDS=3600 for long)"
	@echo "make bench-tunnel the tunnel against hashicorp/yamux and its targets, in a table"
	@echo "make bench-quick  the main ratios to nginx, HAProxy and others, in about a minute"
	@echo "make bench        all benchmarks, twenty minutes: benchmarks/report.md"
	@echo "make bench-smoke  whether the benchmarks run; measures nothing"
	@echo "make fuzz         scanner against llhttp, ten million cases, four minutes (FUZZ_CASES, FUZZ_SEED)"
	@echo "make fuzz-fields  cookies, forwarded addresses, paths, chunks (60 s each; FUZZ_SECONDS=3600 for long)"
	@echo "make fuzz-http-asan  the scanner's tests and a million cases under AddressSanitizer"
	@echo "make screenshots  renew the pictures in docs/screenshots (needs chromium)"
	@echo "make build        sdist and wheel in dist/"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Guestpass needs Python 3.11 or newer; set PYTHON=python3.11, say") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip

# The wheel is built whenever a source changed and installed over the old one, so that tests never see a stale .so.
$(VENV)/installed: $(BIN)/python $(SOURCES)
	rm -rf build dist/guestpass-*.whl
	$(PIP) wheel --no-deps --wheel-dir dist .
	$(PIP) install dist/guestpass-*.whl
	$(PIP) install --force-reinstall --no-deps dist/guestpass-*.whl
	touch $@

define extra
$(VENV)/extra-$(1): $(VENV)/installed
	$(PIP) install "$$$$(echo dist/guestpass-*.whl)[$(1)]"
	touch $$@
endef
$(foreach name,test apps bench check dev,$(eval $(call extra,$(name))))

# One line that says what is missing from Debian, before anything takes time: PROGRAM:PACKAGE …. Without these, tests fail;
# without others (nginx, apache2, golang-go, iproute2, nftables, …) a test is skipped and says so.
define needs
@missing="$$(for pair in $(1); do PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair%%:*}" >/dev/null || echo -n " $${pair##*:}"; done)"; \
[ -z "$$missing" ] || echo "make $@ lacks programs of Debian, and will fail without: apt-get install$$missing" >&2
endef

demo: $(VENV)/installed
	@$(BIN)/python examples/demo.py

test: $(VENV)/extra-test
	$(call needs,curl:curl node:nodejs npm:npm slapd:slapd)
	$(BIN)/pytest -m "not apps"

test-apps: $(VENV)/extra-test $(VENV)/extra-apps
	$(call needs,chromium:chromium node:nodejs npm:npm)
	$(BIN)/pytest -m apps tests/apps

screenshots: $(VENV)/extra-test $(VENV)/extra-apps
	GUESTPASS_SCREENSHOTS=docs/screenshots $(BIN)/pytest -m apps tests/apps

check: $(VENV)/extra-test $(VENV)/extra-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/cython-lint _speedups
	$(BIN)/mypy
	$(BIN)/symilar --duplicates=12 --ignore-imports --ignore-signatures --ignore-docstrings $$(find proxy plugins -name '*.py') | $(BIN)/python tests/checks/duplicates.py
	$(BIN)/pytest -q tests/checks

format: $(VENV)/extra-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Network namespaces need root, and iproute2 and nftables of Debian; without them those rows are missing, with the reason.
faults: $(VENV)/extra-test
	GUESTPASS_LONG=1 GUESTPASS_SCOREBOARD=benchmarks/results/faults.json $(BIN)/pytest -q tests/faults

# What an edge on the internet must refuse, and how applications of different tastes see what passes (long forms).
conformance: FUZZ_CASES ?= 10000000
conformance: $(VENV)/extra-test
	GUESTPASS_LONG=1 GUESTPASS_FUZZ_CASES=$(FUZZ_CASES) GUESTPASS_SCOREBOARD=benchmarks/results/conformance.json \
		$(BIN)/pytest -q tests/conformance tests/speedups/test_http1_differential.py

# What plugins may do, what they cannot do to others, and how fast a revocation ends things (long forms).
# Some drive Chromium, and an OpenID provider on Node (Debian: chromium, nodejs, npm). The browser of tests/apps comes
# last: as long as it is open, its event loop is the thread's.
plugins: $(VENV)/extra-test $(VENV)/extra-apps
	GUESTPASS_LONG=1 GUESTPASS_SCOREBOARD=benchmarks/results/plugins.json $(BIN)/pytest -q \
		tests/plugins tests/conformance/http/test_shares_apart.py tests/apps/test_sign_in.py

# Plots of a simulation; it measures no time, so they change only with the choosers.
choosers: $(VENV)/extra-test $(VENV)/extra-bench
	$(BIN)/python benchmarks/choosers.py

# Each writes benchmarks/results/NAME.json. Loopback, one machine: nothing else should run there.
BENCHMARKS := micro/run system/throughput system/sockets system/grants system/start

bench: bench-tunnel $(VENV)/extra-test $(VENV)/extra-bench
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(BENCHFLAGS); done
	$(BIN)/python benchmarks/report.py

bench-quick: $(VENV)/extra-test $(VENV)/extra-bench
	@$(BIN)/python benchmarks/quick.py $(BENCHFLAGS)

bench-smoke: $(VENV)/extra-test $(VENV)/extra-bench
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --smoke --results "$$folder"; done; \
	$(BIN)/python benchmarks/report.py --results "$$folder" --report "$$folder/report.md"

report: $(VENV)/extra-bench
	$(BIN)/python benchmarks/report.py

# Builds into build/asan with gcc and libasan (Debian: gcc); findings are left in build/asan/findings.
FUZZ_SECONDS ?= 60
fuzz-asan: $(VENV)/extra-test
	$(PIP) install 'Cython>=3.1' 'setuptools>=77'
	$(BIN)/python tests/fuzz/asan.py frames session websocket -- -m fuzz.tunnel --seconds $(FUZZ_SECONDS)

# From Debian, for parts that are skipped by name without it: golang-go and golang-github-hashicorp-yamux-dev, valgrind,
# openssl, iproute2. The benchmark's own extension is compiled by the Cython of `check`.
bench-tunnel: $(VENV)/extra-test $(VENV)/extra-check
	$(BIN)/python benchmarks/tunnel/run.py

# A disagreement is printed as a shrunk case. The same seed gives the same cases.
FUZZ_SEED ?= $(shell date +%s)
FUZZ_TESTS := tests/speedups/test_http1.py tests/speedups/test_http1_differential.py
fuzz: FUZZ_CASES ?= 10000000
fuzz: $(VENV)/extra-test
	GUESTPASS_FUZZ_CASES=$(FUZZ_CASES) GUESTPASS_FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -q tests/speedups/test_http1_differential.py

# A finding is printed as the input; it belongs into tests/corpus/fields.
fuzz-fields: $(VENV)/extra-test
	FUZZ_SECONDS=$(FUZZ_SECONDS) GUESTPASS_FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -q tests/fuzz/test_fields.py

# With gcc and its libasan and libubsan (Debian: gcc).
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
fuzz-http-asan: FUZZ_CASES ?= 1000000
fuzz-http-asan: $(VENV)/extra-test
	$(PIP) install 'Cython>=3.1' 'setuptools>=77'
	CC=gcc CFLAGS="-g -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	$(BIN)/python setup.py -q build_ext --build-lib build/http-asan --build-temp build/http-asan/temp
	cp _speedups/guestpass_speedups/__init__.py build/http-asan/guestpass_speedups
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/http-asan \
	GUESTPASS_FUZZ_CASES=$(FUZZ_CASES) GUESTPASS_FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -q $(FUZZ_TESTS)

build: $(VENV)/extra-dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
