"""Counts that are gathered first: a scrape must not be able to tell."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.router.batch import Batch, Counted, Level, Observed

BOUNDS = (0.1, 0.2, 0.5)
VALUES = (0.0, 0.05, 0.1, 0.1000001, 0.2, 0.3, 0.5, 0.6, 99.0)


def _histogram() -> tuple[CollectorRegistry, Histogram]:
    registry = CollectorRegistry()
    return registry, Histogram("h", "h", ["a"], buckets=BOUNDS, registry=registry)


def _samples(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if not line.startswith("#") and "_created" not in line]


async def test_gathered_values_land_in_the_buckets_that_prometheus_puts_them_in() -> None:
    """Bounds belong to the bucket below; the sum and the count are those of every value."""
    expected_registry, expected = _histogram()
    registry, histogram = _histogram()
    batch = Batch()
    observed = Observed(batch, histogram.labels("x"), BOUNDS)
    for value in VALUES:
        expected.labels("x").observe(value)
        observed.observe(value)
    batch.flush()
    assert _samples(registry) == _samples(expected_registry)
    observed.observe(0.3)
    batch.flush()
    expected.labels("x").observe(0.3)
    assert _samples(registry) == _samples(expected_registry)  # what was handed over is not handed over again


async def test_counts_reach_a_scrape_by_themselves() -> None:
    """Nobody has to ask for the flush: the loop does it soon after the first count."""
    registry = CollectorRegistry()
    counter, gauge = Counter("c", "c", registry=registry), Gauge("g", "g", registry=registry)
    batch = Batch()
    counted, level = Counted(batch, counter), Level(batch, gauge)
    for _ in range(3):
        counted.inc(2)
        level.inc()
    level.dec()
    assert _samples(registry) == ["c_total 0.0", "g 0.0"]
    while registry.get_sample_value("c_total") == 0.0:
        await asyncio.sleep(0.001)
    assert _samples(registry) == ["c_total 6.0", "g 2.0"]
    level.dec()
    level.dec()
    batch.flush()
    assert _samples(registry) == ["c_total 6.0", "g 0.0"]


def test_without_a_loop_nothing_is_held_back() -> None:
    """A process that has no event loop counts at once."""
    registry = CollectorRegistry()
    counted = Counted(Batch(), Counter("c", "c", registry=registry))
    counted.inc()
    assert _samples(registry) == ["c_total 1.0"]
