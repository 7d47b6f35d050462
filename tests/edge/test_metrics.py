"""Labels hold a few known words, whatever plugins say."""

from guestpass.edge.metrics import Metrics


def test_reasons_of_plugins_are_no_labels() -> None:
    metrics = Metrics()
    for reason in ("deleted", "alice@example.org left", "bob@example.org left"):
        metrics.count_revocation(reason, 0.001)
    count = metrics.registry.get_sample_value
    assert count("guestpass_revocations_total", {"reason": "deleted"}) == 1
    assert count("guestpass_revocations_total", {"reason": "other"}) == 2
    assert count("guestpass_revocation_seconds_count") == 3
