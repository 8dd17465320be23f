"""Metrics of kind `query`: what both arms' PromQL says at one look, as integers or as one value.

Counters are read at two instants, the end of the look before and the end of this one, so that windows touch
and no sample is counted twice; both arms at the same instants. Never rate() or increase(): those extrapolate,
and tests need counts. The end of the last look is kept in the status's cursor, so a controller that was
killed goes on where it was. Knows nothing about how Prometheus is asked or what a reading decides.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from contracts.errors import ConfigError
from contracts.grading import PrometheusConfig
from contracts.metrics import MetricKind, MetricSpec, QuerySpec
from contracts.rollout import RolloutSpec, RolloutStatus
from contracts.traffic import Arm, Split, Upstream
from serve.rollout.observation import QueryReading
from serve.rollout.prometheus import Empty, NotFinite, Problem, Prometheus

CURSOR = "prometheus"
"""Key of the status's cursor that holds the end of the last look in milliseconds (Unix)."""

_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_WHOLE = 1e-6
_THREADS = 8

Fields = dict[str, str]


class QueryReader:
    """Asks one Prometheus for the rollouts of one controller.

    Args:
        config: where it is.
        prometheus: what asks it; None makes the real one.
    """

    def __init__(self, config: PrometheusConfig, prometheus: Prometheus | None = None) -> None:
        self._lag_s, self._timeout_s = config.lag_s, config.timeout_s
        self._prometheus = prometheus or Prometheus(config)
        self._pool = ThreadPoolExecutor(_THREADS, "prometheus")

    def read(
        self, spec: RolloutSpec, status: RolloutStatus, split: Split, now: float
    ) -> tuple[dict[str, QueryReading], dict[str, int]]:
        """One reading a query metric, and what to add to the cursor once they are consumed."""
        wanted = query_metrics(spec.metrics)
        if not wanted or not split.collects(spec.id):
            return {}, {}
        until = round((now - self._lag_s) * 1000)
        since = max(status.cursor.get(CURSOR, 0), round(status.step_since * 1000))
        arms = arms_of(split, spec.candidate)
        deadline = time.monotonic() + 2 * self._timeout_s
        readings = {m.key: self._pool.submit(self._one, m, arms, since, until, deadline) for m in wanted}
        return {key: _done(f) for key, f in readings.items()}, {CURSOR: max(since, until)}

    def close(self) -> None:
        """Ask nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _one(
        self, metric: MetricSpec, arms: dict[Arm, Fields], since: int, until: int, deadline: float
    ) -> QueryReading:
        query = metric.query
        assert query is not None
        try:
            if query.value is not None:
                asked = fill(query.value, arms[Arm.CANARY])
                return QueryReading(value=self._number(asked, until, deadline))
            if until <= since:  # Prometheus has not seen anything of this step yet
                return QueryReading()
            return self._counters(query, arms, since, until, deadline)
        except Problem as err:
            return QueryReading(problem=str(err))

    def _number(self, query: str, at_ms: int, deadline: float) -> float:
        if time.monotonic() > deadline:
            raise Problem(
                "Prometheus is too slow: this look's queries took longer than the controller waits."
            )
        return self._prometheus.number(query, at_ms / 1000)

    def _counters(
        self, query: QuerySpec, arms: dict[Arm, Fields], since: int, until: int, deadline: float
    ) -> QueryReading:
        assert query.bad is not None
        assert query.total is not None
        grown: dict[str, int] = {}
        for arm, fields in arms.items():
            total, bad = (
                self._increase(fill(q, fields), since, until, deadline) for q in (query.total, query.bad)
            )
            if bad > total:
                raise Problem(
                    f"{arm.value}: `bad` grew by {bad} and `total` by {total}; `bad` must be part of `total`."
                )
            grown[f"{arm.value}_total"], grown[f"{arm.value}_bad"] = total, bad
        return QueryReading(**grown)

    def _increase(self, query: str, since: int, until: int, deadline: float) -> int:
        before, after = (_count(self._number(query, at, deadline), query) for at in (since, until))
        if after < before:
            # A sum of counters of which one began again: what it lost in between nobody knows.
            raise Problem(
                f"`{query}` fell from {before} to {after}: a counter was reset; this look is left out."
            )
        return after - before


def nobody_to_ask(spec: RolloutSpec) -> dict[str, QueryReading]:
    """The readings of a controller without a Prometheus: no data, and why."""
    why = "the stack's configuration names no Prometheus any more; give it 'prometheus: {url: …}'."
    return {m.key: QueryReading(problem=why) for m in query_metrics(spec.metrics)}


def query_metrics(metrics: Iterable[MetricSpec]) -> list[MetricSpec]:
    """The metrics that are asked of Prometheus."""
    return [m for m in metrics if m.kind is MetricKind.QUERY]


def arms_of(split: Split, candidate: Upstream) -> dict[Arm, Fields]:
    """Arm → what its placeholders mean."""
    return {
        arm: placeholders(split.route, arm, up)
        for arm, up in ((Arm.STABLE, split.stable), (Arm.CANARY, candidate))
    }


def placeholders(route: str, arm: Arm, upstream: Upstream) -> Fields:
    """What `{{…}}` means for an arm. All are names: letters, digits, `.`, `_` and `-`, so nothing to
    escape."""
    return {"route": route, "arm": arm.value, "upstream": upstream.name}


def fill(query: str, fields: Fields) -> str:
    """The query with its placeholders filled in. Raises: ConfigError for one that does not exist."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            known = ", ".join(f"{{{{{name}}}}}" for name in fields)
            raise ConfigError(f"query: there is no placeholder {match[0]}; there are {known}.")
        return fields[match[1]]

    return _PLACEHOLDER.sub(value, query)


def check_queries(
    metrics: Iterable[MetricSpec], config: PrometheusConfig | None, split: Split, now: float
) -> None:
    """Ask every query once for the stable arm before a rollout starts.

    NaN is let through (no traffic yet); a query that Prometheus cannot evaluate, or that matches nothing, is
    not: it would never have data, and the rollout would only wait for its deadline.

    Raises: ConfigError naming the metric, the query and the reason.
    """
    wanted = query_metrics(metrics)
    if not wanted:
        return
    if config is None:
        raise ConfigError(
            f"metric {wanted[0].key}: give 'prometheus: {{url: …}}' in the stack's configuration."
        )
    prometheus = Prometheus(config)
    fields = placeholders(split.route, Arm.STABLE, split.stable)
    for metric in wanted:
        assert metric.query is not None
        for name in ("total", "bad", "value"):
            query = getattr(metric.query, name)
            if query is not None:
                _check_one(metric, name, fill(query, fields), prometheus, now - config.lag_s)


def _check_one(metric: MetricSpec, name: str, query: str, prometheus: Prometheus, at: float) -> None:
    try:
        prometheus.number(query, at)
    except Empty as err:
        raise ConfigError(
            f"metric {metric.key}, query.{name}: {err} For a counter without a series until its first count "
            "write `(sum(…) or vector(0))`."
        ) from err
    except NotFinite:
        return
    except Problem as err:
        raise ConfigError(f"metric {metric.key}, query.{name}: {err}") from err


def _count(value: float, query: str) -> int:
    whole = round(value)
    if value < 0 or abs(value - whole) > _WHOLE * max(1.0, value):
        raise Problem(
            f"`{query}` is {value:g}, which is no count: ask for the counter itself, not for rate() or "
            "increase()."
        )
    return whole


def _done(future: Future[QueryReading]) -> QueryReading:
    """Its result. Every question has a timeout, so this ends."""
    return future.result()
