"""The scaling guide: its arithmetic, and that its tables are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks.scale import guide, scrape, splits
from benchmarks.scale.arithmetic import Measured, ledger_rows, need, segments, size
from benchmarks.scale.ledger import knee

MEASURED = Measured(
    replica_per_s=2000.0,
    flush_s=1.0,
    poll_s=0.2,
    ledger_row_bytes=500.0,
    log_bytes={"full": 2000.0, "redacted": 1900.0},
    redact_cpu_s=0.001,
    rotate_bytes=64 * 2**20,
    rotate_s=300.0,
    host_series=4500,
)


def test_the_page_holds_the_committed_results() -> None:
    """`python -m benchmarks.scale.guide` has been run after the last benchmark."""
    assert guide.rendered() == guide.PAGE.read_text(encoding="utf-8")


def test_replicas_are_planned_with_headroom_and_never_alone() -> None:
    """Half of what one carries, rounded up; two at least, because one may be lost."""
    assert need(10, 20, MEASURED).replicas == 2
    assert need(2000, 20, MEASURED).replicas == 2
    assert need(2001, 20, MEASURED).replicas == 3
    assert need(100_000, 20, MEASURED).replicas == 100


def test_ledger_rows_are_bounded_by_requests_and_by_what_there_is_to_count() -> None:
    """Few requests: a row each. Many: one for each replica, route, arm and flush."""
    assert ledger_rows(10, replicas=2, routes=20, flush_s=1.0) == 10
    assert ledger_rows(100_000, replicas=100, routes=20, flush_s=1.0) == 4000
    assert ledger_rows(100_000, replicas=100, routes=20, flush_s=4.0) == 1000


def test_what_a_rate_needs() -> None:
    """Log volume, queries, connections, cores and series are products of the measured figures."""
    found = need(1000, 20, MEASURED)
    assert found.log_bytes_per_day == {"full": 1000 * 2000 * 86_400, "redacted": 1000 * 1900 * 86_400}
    assert found.queries_per_s == 2 * (3 / 0.2 + 2)
    assert found.connections == 4
    assert found.redact_cores == 1.0
    assert found.series == 4500
    assert need(100_000, 20, MEASURED).series == 25 * 4500
    assert found.ledger_bytes == 80 * 500 * 3600


def test_segments_are_cut_by_age_or_by_size() -> None:
    """Whatever comes first; where both come at once it is the same number."""
    assert segments(10.0, rotate_bytes=1000.0, rotate_s=300.0) == 3.6 * 10
    assert segments(1.0, rotate_bytes=1000.0, rotate_s=300.0) == 12
    assert segments(1000 / 300, rotate_bytes=1000.0, rotate_s=300.0) == 12


def test_sizes_are_said_in_steps_of_a_thousand() -> None:
    """From bytes to petabytes."""
    assert [size(10.0**n) for n in (0, 3, 7, 9, 13, 15)] == ["1 B", "1 kB", "10 MB", "1 GB", "10 TB", "1 PB"]


def test_the_knee_is_the_last_load_that_a_store_keeps_up_with() -> None:
    """On the interval still counts; none at all is zero."""
    rows = [{"routes": n, "round_cpu_s": s} for n, s in ((1, 0.2), (5, 1.0), (20, 3.0))]
    assert knee(rows, 1.0) == 5
    assert knee(rows, 0.1) == 0


def test_a_delay_counts_a_later_version_and_never_a_missing_one() -> None:
    """A router that skips a version had it when it had the next; one that never came has no delay."""
    put = {2: 10.0, 3: 11.0, 4: 12.0}
    assert splits.delays(put, [(9.0, 1), (11.5, 3)]) == [1.5, 0.5]
    assert splits.delays(put, [(9.0, 1)]) == []
    assert splits.delays({2: 10.0}, [(9.99, 2)]) == [0.0]  # seen before the writer came back


def test_versions_that_go_back_are_counted() -> None:
    """What the benchmark would say of a router that took over an older split."""
    assert splits.went_back([(1.0, 1), (2.0, 2), (3.0, 2), (4.0, 5)]) == 0
    assert splits.went_back([(1.0, 3), (2.0, 2), (3.0, 4), (4.0, 1)]) == 2


def test_blocks_are_filled_and_a_page_without_one_is_an_error() -> None:
    """Everything around a block stays as it is."""
    page = "a\n<!-- scale:x:start -->\nold\n<!-- scale:x:end -->\nb\n"
    assert guide.filled(page, {"x": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match="no block 'y'"):
        guide.filled(page, {"y": "new"})


def test_a_busy_host_stays_below_five_thousand_series() -> None:
    """20 routes of 3 arms: the router's own series, counted in one process without the `_created` lines."""
    metrics = scrape.busy_metrics()
    scrape.count_everything(metrics)
    lines = [line for line in scrape.series_of(metrics._expose()) if "_created{" not in line]
    assert 4000 < len(lines) <= 5000
