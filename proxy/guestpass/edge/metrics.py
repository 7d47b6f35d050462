"""The edge's Prometheus metrics. No label holds an email address, a path or a share's id."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# Why something was revoked; a plugin's own reasons may be any text, a label may not.
REASONS = frozenset(
    ("deleted", "expired", "recipient_removed", "session_ended", "share_updated", "gateway_removed")
    + (
        "ended_by_owner",
        "replaced",
        "signed_out",
        "max_sessions",
        "sign_in_not_taken",
        "denied",
        "plugin_failed",
        "provider_removed",
    )
)

# Upper bounds of the buckets of durations, in seconds.
DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""One metric as it goes between processes: name, documentation, type, samples (name, labels, value)."""

# Of what several processes say, the largest counts; of everything else the sum.
LARGEST = frozenset(
    ("guestpass_tunnel_rtt_seconds", "process_start_time_seconds", "process_max_fds")
    # every worker has the same
    + ("guestpass_certificate_expires_seconds",)
)


class Service(Protocol):
    """What the fast lane counts of a service's answers."""

    @property
    def name(self) -> str: ...

    @property
    def counts(self) -> Iterable[tuple[str, int]]:
        """Classes of status, and how many."""


class Metrics:
    """Counters that the edge's parts increase; `watch` adds what is read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        # These two are what aiohttp's lane counts; the fast lane's own counters join them when somebody asks.
        self.requests = Counter(
            "guestpass_requests",
            "Requests answered on share origins",
            ("service", "code_class", "lane"),
            registry=None,
        )
        self.request_seconds = Histogram(
            "guestpass_request_seconds",
            "From the request head to the last byte of the response (upgraded connections are not counted)",
            registry=None,
            buckets=DURATIONS,
        )
        self.admissions = Counter(
            "guestpass_admissions", "Sessions asked for", ("plugin", "outcome"), registry=self.registry
        )
        self.revocations = Counter(
            "guestpass_revocations", "Revocations carried out", ("reason",), registry=self.registry
        )
        self.revocation_seconds = Histogram(
            "guestpass_revocation_seconds",
            "From the durable revocation to the last stream ended",
            registry=self.registry,
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
        )
        self.plugin_seconds = Histogram(
            "guestpass_plugin_seconds", "Time in a plugin's hook", ("plugin", "hook"), registry=self.registry
        )
        self._hooks: dict[tuple[str, str], Histogram] = {}
        self.plugin_errors = Counter(
            "guestpass_plugin_errors",
            "Hooks that raised or overran",
            ("plugin", "hook"),
            registry=self.registry,
        )
        # `reason`: a key of `edge.limits.TABLE`.
        self.refusals = Counter(
            "guestpass_refusals", "What was refused, by the reason", ("reason",), registry=self.registry
        )
        self.loop_blocked = Counter(
            "guestpass_loop_blocked",
            "Times that the event loop stood still for a quarter of a second, by the plugin at work ('-': none)",
            ("plugin",),
            registry=self.registry,
        )
        self.refused = Counter(
            "guestpass_refused", "Requests that the edge itself refused", ("status",), registry=self.registry
        )

        self.acme_attempts = Counter(
            "guestpass_acme_attempts", "Certificates ordered by ACME", ("outcome",), registry=self.registry
        )

    def families(self) -> list[Family]:
        """All of it, for another process."""
        return [
            (
                metric.name,
                metric.documentation,
                metric.type,
                [(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
            )
            for metric in self.registry.collect()
        ]

    def count_revocation(self, reason: str, seconds: float) -> None:
        self.revocations.labels(reason if reason in REASONS else "other").inc()
        self.revocation_seconds.observe(seconds)

    def observe_hook(self, plugin: str, hook: str, seconds: float, error: bool) -> None:
        histogram = self._hooks.get((plugin, hook))
        if histogram is None:
            histogram = self._hooks[plugin, hook] = self.plugin_seconds.labels(plugin, hook)
        histogram.observe(seconds)
        if error:
            self.plugin_errors.labels(plugin, hook).inc()

    def watch_lane(
        self, services: Callable[[], Iterable[Service]], durations: Callable[[], tuple[list[int], float]]
    ) -> None:
        """`durations` gives the fast lane's answers by bucket of DURATIONS, with a last one for the rest, and the sum
        of their seconds."""
        self.registry.register(_Requests(self.requests, self.request_seconds, services, durations))

    def watch_access_log(self, dropped: Callable[[], int]) -> None:
        """Registered only where there is an access log."""
        self.registry.register(_Dropped(dropped))

    def watch(
        self,
        *,
        grants: Callable[[], int],
        streams: Callable[[], int],
        tunnels: Callable[[], Iterable[tuple[str, str, int, float | None]]],
        tunnel_bytes: Callable[[], tuple[int, int]],
        certificates: Callable[[], Iterable[tuple[str, float]]],
    ) -> None:
        """`tunnels` yields (site, gateway, tunnels, rtt in seconds); `tunnel_bytes` gives (received, sent);
        `certificates` yields (host, seconds left), as many as edge.toml names."""
        Gauge("guestpass_grants", "Grants in force", registry=self.registry).set_function(grants)
        Gauge("guestpass_streams", "Live streams", registry=self.registry).set_function(streams)
        self.registry.register(_Tunnels(tunnels, tunnel_bytes))
        self.registry.register(_Certificates(certificates))


class _Requests(Collector):
    """Both lanes' answers under one name."""

    def __init__(
        self,
        requests: Counter,
        seconds: Histogram,
        services: Callable[[], Iterable[Service]],
        durations: Callable[[], tuple[list[int], float]],
    ) -> None:
        self._requests = requests
        self._seconds = seconds
        self._services = services
        self._durations = durations

    def collect(self) -> Iterable[Metric]:
        for metric in self._requests.collect():
            for service in self._services():
                for code_class, count in service.counts:
                    labels = {"service": service.name, "code_class": code_class, "lane": "fast"}
                    metric.add_sample(metric.name + "_total", labels, count)
            yield metric
        buckets, total = self._durations()
        for metric in self._seconds.collect():
            samples = []
            reached = iter(itertools.accumulate(buckets))
            for sample in metric.samples:
                if sample.name.endswith("_bucket"):
                    sample = sample._replace(value=sample.value + next(reached))
                elif sample.name.endswith("_count"):
                    sample = sample._replace(value=sample.value + sum(buckets))
                elif sample.name.endswith("_sum"):
                    sample = sample._replace(value=sample.value + total)
                samples.append(sample)
            metric.samples = samples
            yield metric


class _Dropped(Collector):
    def __init__(self, dropped: Callable[[], int]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterable[Metric]:
        lines = CounterMetricFamily(
            "guestpass_access_log_dropped",
            "Lines that the disk, or who reads standard output, was too slow for",
        )
        lines.add_metric((), self._dropped())
        return (lines,)


class _Tunnels(Collector):
    def __init__(
        self,
        tunnels: Callable[[], Iterable[tuple[str, str, int, float | None]]],
        tunnel_bytes: Callable[[], tuple[int, int]],
    ) -> None:
        self._tunnels = tunnels
        self._bytes = tunnel_bytes

    def collect(self) -> Iterable[Metric]:
        count = GaugeMetricFamily("guestpass_tunnels", "Tunnels by gateway", labels=("site", "gateway"))
        rtt = GaugeMetricFamily(
            "guestpass_tunnel_rtt_seconds",
            "Round-trip time, best of the gateway's tunnels",
            labels=("site", "gateway"),
        )
        for site, gateway, tunnels, seconds in self._tunnels():
            count.add_metric((site, gateway), tunnels)
            if seconds is not None:
                rtt.add_metric((site, gateway), seconds)
        received, sent = self._bytes()
        total = CounterMetricFamily("guestpass_tunnel_bytes", "Bytes through tunnels", labels=("direction",))
        total.add_metric(("received",), received)
        total.add_metric(("sent",), sent)
        return (count, rtt, total)


class _Certificates(Collector):
    def __init__(self, certificates: Callable[[], Iterable[tuple[str, float]]]) -> None:
        self._certificates = certificates

    def collect(self) -> Iterable[Metric]:
        left = GaugeMetricFamily(
            "guestpass_certificate_expires_seconds",
            "Seconds until the certificate for this host expires",
            labels=("host",),
        )
        for host, seconds in dict(self._certificates()).items():
            left.add_metric((host,), seconds)
        return (left,)


class Together(Collector):
    """The metrics of several processes as one. Counters of those that have ended stay in the sums, so that none ever
    falls."""

    def __init__(self) -> None:
        self._ended: dict[str, Family] = {}

    def keep(self, families: Iterable[Family]) -> None:
        """What a process had counted when it ended; its gauges go with it."""
        counted = [family for family in families if family[2] in ("counter", "histogram")]
        self._ended = _added([list(self._ended.values()), counted])

    def of(self, processes: Iterable[Iterable[Family]]) -> Iterable[Metric]:
        for name, documentation, kind, samples in _added([self._ended.values(), *processes]).values():
            metric = Metric(name, documentation, kind)
            for sample_name, labels, value in samples:
                # When a series began is another moment in each process, and says nothing of their sum.
                if not sample_name.endswith("_created"):
                    metric.add_sample(sample_name, labels, value)
            yield metric

    def collect(self) -> Iterable[Metric]:
        return self.of(())


def _added(processes: Iterable[Iterable[Family]]) -> dict[str, Family]:
    sums: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}
    about: dict[str, tuple[str, str]] = {}
    for families in processes:
        for name, documentation, kind, samples in families:
            about.setdefault(name, (documentation, kind))
            found = sums.setdefault(name, {})
            for sample_name, labels, value in samples:
                key = (sample_name, frozenset(labels.items()))
                if name in LARGEST:
                    found[key] = max(found.get(key, value), value)
                else:
                    found[key] = found.get(key, 0.0) + value
    return {
        name: (
            name,
            *about[name],
            [(sample, dict(labels), value) for (sample, labels), value in found.items()],
        )
        for name, found in sums.items()
    }
