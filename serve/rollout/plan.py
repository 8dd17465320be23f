"""Before a rollout starts: how long it will take, and what it would catch, at the route's present traffic.

Resamples what the request log recorded of the route's stable arm and sends it through decide() many times:
once as it is (how long until promoted?), and for every metric with a canary that is worse by some difference
(what share is thrown back, how soon?). Requests are drawn independently, each metric on its own; a log that
samples shows less traffic than there is. Knows nothing about terminals.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from contracts.config import Record
from contracts.errors import ConfigError, DataError
from contracts.metrics import (
    LATENCY_BUCKETS_S,
    LATENCY_KINDS,
    SCORE_STEPS,
    ArmCounts,
    MetricKind,
    MetricSpec,
    score_bin,
)
from contracts.rollout import RolloutSpec
from contracts.traffic import Arm, Outcome, Split
from serve.rollout.observation import SeenWindow
from serve.rollout.simulate import follow

Floats = NDArray[np.float64]

LOOK_BACK_S = 24 * 3600.0
"""How much of the request log is read at most."""
CAUGHT = 0.9
"""A difference counts as detectable when this share of the simulated rollouts was thrown back."""
_MULTIPLES = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Differences tried, in margins."""


class Traffic(Record):
    """What a route's stable arm did: requests a minute and, of those that count, how they went."""

    per_minute: float = Field(gt=0)
    counts: ArmCounts
    source: str
    """Where it is from, in words."""


class Caught(Record):
    """What became of canaries that are worse on one metric by `excess`."""

    excess: float
    rolled_back: float
    """Share thrown back within the plan's minutes."""
    promoted: float
    median_min: float | None
    """Minutes to the rollback, over those thrown back."""
    p90_min: float | None


class MetricPlan(Record):
    """What the rollout would notice on one metric."""

    metric: str
    margin: float
    base: float
    """The stable arm's own rate (for latency: above the first threshold), or mean score."""
    detectable: float | None
    """Smallest difference tried of which at least CAUGHT were thrown back; None when none was."""
    tried: tuple[Caught, ...]


class Plan(Record):
    """The answer of `stillhouse rollout plan`."""

    route: str
    traffic: Traffic
    minutes: float
    """Longest time simulated."""
    runs: int
    promoted: float
    """Share of students exactly as good as stable that were promoted within `minutes`."""
    rolled_back: float
    """Share of them that were thrown back wrongly."""
    silent: float
    """Share of them that were thrown back because the canary got no request before its deadline."""
    median_min: float | None
    p90_min: float | None
    metrics: tuple[MetricPlan, ...]
    unknown: tuple[str, ...]
    """Metrics that the traffic says nothing about: the rollout waits for their data, the plan does not."""


def read_traffic(folder: Path, route: str, now: float, look_back_s: float = LOOK_BACK_S) -> Traffic:
    """The stable arm's requests on a route in the newest rows of a request-log folder.

    Raises: DataError when the log has no such rows.
    """
    tally = _Tally()
    for row in _rows(folder, now - look_back_s):
        if row.get("route") == route and row.get("arm") == Arm.STABLE and row.get("ts", 0.0) <= now:
            tally.add(row)
    if tally.counts.n == 0:
        raise DataError(
            f"the request log in {folder} has no row of route {route!r} in the last "
            f"{look_back_s / 3600:g} h; say what to expect with --per-minute and --errors"
        )
    # Up to now, not to the last row: a route that fell silent has little traffic.
    minutes = max(now - tally.first, 60.0) / 60.0
    source = f"{tally.counts.n} requests of the last {minutes:.0f} min in {folder}"
    return Traffic(per_minute=tally.counts.n / minutes, counts=tally.counts, source=source)


def expected(per_minute: float, errors: float) -> Traffic:
    """Traffic that somebody expects, with nothing but an error rate.

    Raises: ConfigError unless the rate is positive and the share of errors in [0, 1).
    """
    if not 0 < per_minute < math.inf or not 0.0 <= errors < 1.0:
        raise ConfigError("plan: --per-minute must be positive and --errors a share in [0, 1), e.g. 0.01")
    n = 1_000_000
    return Traffic(per_minute=per_minute, counts=ArmCounts(n=n, errors=round(n * errors)), source="as said")


def make_plan(
    spec: RolloutSpec,
    traffic: Traffic,
    minutes: float = 240.0,
    runs: int = 100,
    seed: int = 1,
    told: Callable[[str, float], None] = lambda what, share: None,
) -> Plan:
    """Simulate `runs` rollouts of an equal student, and of worse ones metric by metric.

    Args:
        told: called with what is being simulated and the share of the work that is done.

    Raises: ConfigError when the traffic says nothing about any of the spec's metrics.
    """
    known = tuple(m for m in spec.metrics if _has_data(m, traffic.counts))
    if not known:
        names = ", ".join(m.key for m in spec.metrics)
        raise ConfigError(f"plan: nothing is known about any metric of the policy ({names})")
    of = _unattended(spec).model_copy(update={"metrics": known})
    work = _Work(of, traffic, minutes, runs, seed, told, 1 + len(known) * len(_MULTIPLES))
    equal = work.ends("an equal student", None, 0.0)
    plans = tuple(_plan_metric(work, metric, i) for i, metric in enumerate(known))
    told("done", 1.0)
    took = [e.minutes for e in equal if e.decision == "promoted"]
    back = [e for e in equal if e.decision == "rolled_back"]
    silent = [e for e in back if e.reason.startswith("no data")]
    return Plan(
        route=spec.route,
        traffic=traffic,
        minutes=minutes,
        runs=runs,
        promoted=len(took) / runs,
        rolled_back=(len(back) - len(silent)) / runs,
        silent=len(silent) / runs,
        median_min=_quantile(took, runs, 0.5),
        p90_min=_quantile(took, runs, 0.9),
        metrics=plans,
        unknown=tuple(m.key for m in spec.metrics if m not in known),
    )


def _unattended(spec: RolloutSpec) -> RolloutSpec:
    """The rollout without anything that waits for a person, a hook or office hours, and without its watch."""
    steps = tuple(step.model_copy(update={"approval": False}) for step in spec.steps)
    alone = {"hold_final": False, "hooks": (), "windows": (), "watch_s": 0.0}
    return spec.model_copy(update={"steps": steps, **alone})


class _End(NamedTuple):
    """How one simulated rollout ended."""

    decision: str
    minutes: float
    reason: str


@dataclass
class _Work:
    """What all simulations of a plan share, and how far they are."""

    spec: RolloutSpec
    traffic: Traffic
    minutes: float
    runs: int
    seed: int
    told: Callable[[str, float], None]
    parts: int
    done: int = 0

    def ends(self, what: str, worse: MetricSpec | None, excess: float) -> list[_End]:
        """All runs with a canary that is worse on one metric by `excess`."""
        self.told(what, self.done / self.parts)
        self.done += 1
        return [self._end(worse, excess, (self.seed, i)) for i in range(self.runs)]

    def _end(self, worse: MetricSpec | None, excess: float, seed: tuple[int, int]) -> _End:
        spec, like, rng = self.spec, self.traffic.counts, np.random.default_rng(seed)

        def window(split: Split, _t: float) -> SeenWindow:
            n = int(rng.poisson(self.traffic.per_minute * spec.look_s / 60.0))
            n_c = int(rng.binomial(n, split.weight))
            stable, canary = _draw(rng, spec, like, n - n_c), _draw(rng, spec, like, n_c, worse, excess)
            return SeenWindow(split_version=split.version, stable=stable, canary=canary)

        run = follow(spec, window, self.minutes * 60.0)
        return _End(run.status.decision or "", run.seconds / 60.0, run.status.reason)


def _plan_metric(work: _Work, metric: MetricSpec, index: int) -> MetricPlan:
    """Ever larger differences until all are caught."""
    counts, tried = work.traffic.counts, []
    for multiple in _MULTIPLES:
        excess = multiple * metric.margin
        if excess >= _room(metric, counts):
            break
        tried.append(_caught(excess, work.ends(f"{metric.key} worse by {excess:g}", metric, excess)))
        if tried[-1].rolled_back >= 1.0:
            break
    work.done = 1 + len(_MULTIPLES) * (index + 1)
    return MetricPlan(
        metric=metric.key,
        margin=metric.margin,
        base=_base(metric, counts),
        detectable=next((c.excess for c in tried if c.rolled_back >= CAUGHT), None),
        tried=tuple(tried),
    )


# simulating -------------------------------------------------------------------------------------


def _draw(
    rng: np.random.Generator,
    spec: RolloutSpec,
    like: ArmCounts,
    n: int,
    worse: MetricSpec | None = None,
    excess: float = 0.0,
) -> ArmCounts:
    """`n` requests resampled from what was counted; of the worse metric, with `excess` more that are bad."""
    kind = None if worse is None else worse.kind
    more = excess if kind is MetricKind.ERRORS else 0.0
    errors = int(rng.binomial(n, min(1.0, like.errors / like.n + more)))
    answered = n - errors
    fields: dict[str, Any] = {"n": n, "errors": errors}
    for latency in {m.kind for m in spec.metrics} & set(LATENCY_KINDS):
        shares = _shares(getattr(like, latency.value))
        if worse is not None and kind is latency:
            shares = _slower(shares, LATENCY_BUCKETS_S.index(worse.thresholds_s[0]), excess)
        fields[latency.value] = tuple(rng.multinomial(answered, shares).tolist())
    scores = {}
    for grader in {m.grader for m in spec.metrics if m.kind in (MetricKind.QUALITY, MetricKind.SCORE)}:
        shares = _shares(like.scores[grader])
        if worse is not None and worse.grader == grader and kind in (MetricKind.QUALITY, MetricKind.SCORE):
            shares = _lower(shares, worse, excess)
        graded = int(rng.binomial(answered, min(1.0, like.graded(grader) / max(1, like.n - like.errors))))
        scores[grader] = tuple(rng.multinomial(graded, shares).tolist())
    return ArmCounts(**fields, scores=scores)


def _shares(counts: tuple[int, ...]) -> Floats:
    made: Floats = np.array(counts, dtype=float) / sum(counts)
    return made


def _slower(shares: Floats, edge: int, excess: float) -> Floats:
    """Move `excess` of the mass from the buckets up to a threshold to just above it."""
    fast = shares[: edge + 1].sum()
    moved = shares.copy()
    moved[: edge + 1] *= (fast - excess) / fast
    moved[edge + 1] += excess
    return moved


def _lower(shares: Floats, metric: MetricSpec, excess: float) -> Floats:
    """Turn good answers into answers of score 0: `excess` more failures, or a mean lower by `excess`."""
    good = score_bin(metric.pass_at) if metric.kind is MetricKind.QUALITY else 1
    weight = shares[good:].sum() if metric.kind is MetricKind.QUALITY else _mean(shares)
    moved = shares.copy()
    moved[good:] *= 1.0 - excess / weight
    moved[0] += 1.0 - moved.sum()
    return moved


# summing up -------------------------------------------------------------------------------------


def _has_data(metric: MetricSpec, counts: ArmCounts) -> bool:
    if metric.kind is MetricKind.ERRORS:
        return True
    if metric.kind in LATENCY_KINDS:
        return bool(getattr(counts, metric.kind.value))
    return metric.kind in (MetricKind.QUALITY, MetricKind.SCORE) and bool(counts.graded(metric.grader))


def _base(metric: MetricSpec, counts: ArmCounts) -> float:
    if metric.kind is MetricKind.ERRORS:
        return counts.errors / counts.n
    if metric.kind in LATENCY_KINDS:
        edge = LATENCY_BUCKETS_S.index(metric.thresholds_s[0])
        return float(_shares(getattr(counts, metric.kind.value))[edge + 1 :].sum())
    if metric.kind is MetricKind.QUALITY:
        return counts.failed(metric.grader, metric.pass_at) / counts.graded(metric.grader)
    return _mean(_shares(counts.scores[metric.grader]))


def _room(metric: MetricSpec, counts: ArmCounts) -> float:
    """The largest difference that is possible at all."""
    base = _base(metric, counts)
    return base if metric.kind is MetricKind.SCORE else 1.0 - base


def _mean(shares: Floats) -> float:
    return float((shares * np.arange(SCORE_STEPS + 1)).sum() / SCORE_STEPS)


def _caught(excess: float, ends: list[_End]) -> Caught:
    back = [e.minutes for e in ends if e.decision == "rolled_back"]
    return Caught(
        excess=excess,
        rolled_back=len(back) / len(ends),
        promoted=sum(e.decision == "promoted" for e in ends) / len(ends),
        median_min=_quantile(back, len(back), 0.5),
        p90_min=_quantile(back, len(back), 0.9),
    )


def _quantile(minutes: list[float], of: int, q: float) -> float | None:
    """The minute by which a share q of `of` runs was there; None when fewer than that ever were."""
    at = math.ceil(q * of) - 1
    return sorted(minutes)[at] if 0 <= at < len(minutes) else None


# the request log --------------------------------------------------------------------------------


class _Tally:
    """Rows of the log as counts."""

    def __init__(self) -> None:
        self.first = math.inf
        self._n = self._errors = 0
        self._slots = {name: [0] * (len(LATENCY_BUCKETS_S) + 1) for name in ("ttft", "e2e")}
        self._scores: dict[str, list[int]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """One row; those that are nobody's fault (a client that left) do not count."""
        outcome = Outcome(row["outcome"])
        if not outcome.counts:
            return
        self.first = min(self.first, row["ts"])
        self._n += 1
        if outcome.failed:
            self._errors += 1
            return
        for name, slots in self._slots.items():
            seconds = row.get(f"{name}_s")
            if seconds is not None:
                slots[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        for grader, score in row.get("scores", {}).items():
            self._scores.setdefault(grader, [0] * (SCORE_STEPS + 1))[score_bin(score)] += 1

    @property
    def counts(self) -> ArmCounts:
        """What was added."""
        scores = {grader: tuple(found) for grader, found in self._scores.items()}
        ttft, e2e = (tuple(s) if any(s) else () for s in self._slots.values())
        return ArmCounts(n=self._n, errors=self._errors, ttft=ttft, e2e=e2e, scores=scores)


def _rows(folder: Path, since: float) -> Iterator[dict[str, Any]]:
    """Rows not older than `since`, from segments that were written to since then; torn lines are left out."""
    for path in sorted(folder.glob("requests-*.jsonl")):
        try:
            if path.stat().st_mtime < since:
                continue
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:  # closed by a rename, or expired, in between
            continue
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the open segment's last line while it is being written
                continue
            if isinstance(row, dict) and row.get("ts", 0.0) >= since:
                yield row
