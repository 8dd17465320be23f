"""Room for runs: budget, pressure and what serving's own figures say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from distill_jobs.flywheel.admit import Act, Do, Seen, Spent, State, blocked, decide
from distill_jobs.flywheel.config import BudgetConfig, PressureConfig
from distill_jobs.flywheel.pressure import Figures, Pressure, judge, over, quantile, read_metrics, since

CALM, PRESSED = Pressure(), Pressure(active=True, why="p99 is 2 s")
QUEUED, RUNNING, STOPPED = State.QUEUED, State.RUNNING, State.STOPPED


def acts(
    *runs: Seen,
    pressure: Pressure = CALM,
    spent: Spent = Spent(),
    now: float = 1000.0,
    config: PressureConfig | None = None,
    **budget: Any,
) -> list[tuple[int, Do]]:
    """What is decided, without the words."""
    found = decide(runs, BudgetConfig(**budget), config or PressureConfig(), pressure, spent, now)
    return [(act.run, act.do) for act in found]


def test_as_many_runs_start_as_there_is_room_for_in_the_order_of_the_queue() -> None:
    """One at a time by default; stopped and ending runs still hold their memory, and so their place."""
    assert acts(Seen(1, QUEUED), Seen(2, QUEUED)) == [(1, Do.START)]
    assert acts(Seen(1, QUEUED), Seen(2, QUEUED), Seen(3, QUEUED), runs=2) == [(1, Do.START), (2, Do.START)]
    assert acts(Seen(1, RUNNING), Seen(2, QUEUED)) == []
    assert acts(Seen(1, State.ENDING), Seen(2, QUEUED)) == []


def test_a_run_that_may_not_start_does_not_hold_up_the_next() -> None:
    """The first route is paused: the second one's run starts."""
    assert acts(Seen(1, QUEUED, route_paused=True), Seen(2, QUEUED)) == [(2, Do.START)]


def test_under_pressure_nothing_starts_and_what_works_is_stopped() -> None:
    """Serving comes first; a stopped run goes on when it is over."""
    assert acts(Seen(1, RUNNING), Seen(2, QUEUED), pressure=PRESSED, runs=2) == [(1, Do.STOP)]
    assert acts(Seen(1, STOPPED, stopped_at=900.0), pressure=PRESSED) == []
    assert acts(Seen(1, STOPPED, stopped_at=900.0)) == [(1, Do.GO_ON)]


def test_a_run_that_is_stopped_for_long_frees_its_memory() -> None:
    """After yield_after_s it is ended and waits; at once when its work is on a cluster, or with 0."""
    config = PressureConfig(yield_after_s=600)
    still = Seen(1, STOPPED, stopped_at=401.0)
    assert acts(still, pressure=PRESSED, config=config) == []
    assert acts(still._replace(stopped_at=400.0), pressure=PRESSED, config=config) == [(1, Do.YIELD)]
    assert acts(Seen(1, RUNNING, stoppable=False), pressure=PRESSED) == [(1, Do.YIELD)]
    at_once = PressureConfig(yield_after_s=0)
    assert acts(Seen(1, RUNNING), pressure=PRESSED, config=at_once) == [(1, Do.YIELD)]


def test_the_days_hours_are_a_bound_for_what_starts_and_what_runs() -> None:
    """At two hours of two a running one yields and a queued one waits, and says why."""
    spent = Spent(seconds=7200.0)
    assert acts(Seen(1, RUNNING), spent=spent, hours_per_day=2) == [(1, Do.YIELD)]
    assert acts(Seen(1, QUEUED), spent=spent, hours_per_day=2) == []
    assert acts(Seen(1, QUEUED), spent=Spent(7199.0), hours_per_day=2) == [(1, Do.START)]
    why = blocked(Seen(1, QUEUED), BudgetConfig(hours_per_day=2), CALM, spent)
    assert why == "2.0 h worked in 24 h, hours_per_day is 2"


def test_the_teachers_tokens_are_bounded_by_what_the_last_run_took() -> None:
    """600 spent and 500 expected are more than 1,000; two runs that start together are added up."""
    one = Seen(1, QUEUED, last_tokens=500)
    assert acts(one, spent=Spent(0, 500), teacher_tokens_per_day=1000) == [(1, Do.START)]
    assert acts(one, spent=Spent(0, 600), teacher_tokens_per_day=1000) == []
    assert acts(Seen(1, QUEUED), spent=Spent(0, 1000), teacher_tokens_per_day=1000) == []
    both = [one, one._replace(id=2)]
    assert acts(*both, spent=Spent(0, 400), teacher_tokens_per_day=1000, runs=2) == [(1, Do.START)]


def test_a_run_that_takes_too_much_fails() -> None:
    """Memory and hours of one run; at the bound it still works."""
    assert acts(Seen(1, RUNNING, memory=8 * 10**9), memory_gb=8) == []
    assert acts(Seen(1, RUNNING, memory=8 * 10**9 + 1), memory_gb=8) == [(1, Do.FAIL)]
    assert acts(Seen(1, RUNNING, worked_s=3601), max_run_hours=1) == [(1, Do.FAIL)]


def test_a_cancelled_run_ends_in_any_state_and_an_ending_one_is_left_alone() -> None:
    """Also a queued one, which does not start first; its place goes to the next only once it is gone."""
    for state in (QUEUED, RUNNING, STOPPED):
        assert acts(Seen(1, state, cancel="cancelled by ann")) == [(1, Do.CANCEL)]
    assert acts(Seen(1, State.ENDING, cancel="again")) == []
    found = decide(
        [Seen(1, RUNNING, cancel="cancelled by ann")], BudgetConfig(), PressureConfig(), CALM, Spent(), 0
    )
    assert found == [Act(1, Do.CANCEL, "cancelled by ann")]


def test_pausing_a_route_ends_its_run_softly() -> None:
    """Not SIGSTOP: a pause may last for days, and the memory is wanted."""
    assert acts(Seen(1, RUNNING, route_paused=True)) == [(1, Do.YIELD)]


def test_pressure_takes_looks_in_a_row_and_leaves_after_calm() -> None:
    """Two looks begin it, one look's peak does not; it ends a minute after the last look over a bound."""
    config = PressureConfig(p99_s=1.0, looks=2, calm_s=60)
    high, low = Figures(p99_s=2.0), Figures(p99_s=0.5)
    one = judge(config, Pressure(), high, 0.0)
    assert (one.active, one.over) == (False, 1)
    assert judge(config, judge(config, one, low, 10.0), high, 20.0).active is False
    two = judge(config, one, high, 10.0)
    assert two.active
    assert two.why == "p99 is 2 s (bound 1)"
    still = judge(config, two, low, 69.0)
    assert (still.active, still.why) == (True, two.why)
    assert judge(config, still, low, 70.0).active is False
    again = judge(config, still, high, 69.5)
    assert again.active
    assert judge(config, again, low, 100.0).active


def test_every_bound_is_told_and_what_is_not_known_breaks_none() -> None:
    """A router that cannot be asked is no pressure; bounds that are not configured neither."""
    config = PressureConfig(busy=0.5, free_memory_gb=2, p99_s=1, queue=10)
    assert over(config, Figures()) == []
    assert len(over(config, Figures(busy=0.9, free_gb=1.0, p99_s=math.inf, queue=11))) == 4
    assert over(config, Figures(busy=0.5, free_gb=2.0, p99_s=1.0, queue=10)) == []
    assert over(PressureConfig(), Figures(1.0, 0.0, math.inf, 1e9)) == []


def test_the_routers_metrics_are_read_over_all_their_series() -> None:
    """Counts and gauges of all arms are added; the p99 is that of what came between two looks."""
    registry = CollectorRegistry()
    ttft = Histogram("stillhouse_ttft_seconds", "t", ["arm"], buckets=(0.1, 1.0), registry=registry)
    flight = Gauge("stillhouse_in_flight", "f", ["arm"], registry=registry)
    for _ in range(100):
        ttft.labels("stable").observe(5.0)

    def look() -> tuple[dict[float, float], float | None]:
        return read_metrics(
            generate_latest(registry).decode(), "stillhouse_ttft_seconds", "stillhouse_in_flight"
        )

    before, _ = look()
    for _ in range(99):
        ttft.labels("stable").observe(0.05)
    ttft.labels("canary").observe(0.5)
    flight.labels("stable").set(3)
    flight.labels("canary").set(4)
    after, queue = look()
    assert queue == 7
    new = since(before, after)
    assert new[math.inf] == 100
    assert quantile(new, 0.99, 20) == 0.1
    assert quantile(new, 0.999, 20) == 1.0
    assert quantile(new, 0.99, 101) is None
    assert quantile(after, 0.99, 1) == math.inf


def test_a_router_that_was_restarted_counts_from_zero() -> None:
    """Fewer than before: everything that it says is new."""
    assert since({1.0: 50.0, math.inf: 60.0}, {1.0: 3.0, math.inf: 4.0}) == {1.0: 3.0, math.inf: 4.0}


def test_what_is_no_prometheus_text_is_an_error() -> None:
    """A login page must not count as a calm router's metrics."""
    with pytest.raises(ValueError):
        read_metrics("<html>Please log in</html>", "a", "b")
