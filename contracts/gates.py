"""Gates and verdicts: one vocabulary for offline evaluation and online rollouts.

Pure: no I/O. Knows nothing about where a value was measured. No data never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from contracts.config import Record

CHAMPION = "champion."
"""Metrics of the model that the registry calls champion begin with this."""


class Verdict(StrEnum):
    """The outcome of a gate. Only PASS lets anything through."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NO_DATA = "NO_DATA"
    ERROR = "ERROR"


class Gate(Record):
    """A bound on one measured metric, absolute or relative to a reference metric of the same report."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    relative_to: str | None = None
    """Name of another metric, e.g. teacher.accuracy or champion.accuracy; the bound is then on the ratio
    metric / reference."""
    bound: Literal["value", "lower", "upper"] = "value"
    """What must hold the bound: the measured value, or the lower (for at_least) or upper (for at_most) end of
    its interval. An interval on both sides of the bound is INCONCLUSIVE: more requests would decide."""
    when_no_champion: Literal["fail", "skip"] = "fail"
    """A gate relative to champion.* when there is no champion yet: fail, or let the first student pass it."""
    why: str = ""
    """One sentence for the report: what this gate protects."""

    @model_validator(mode="after")
    def _has_bound(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"gate on {self.metric!r}: give at_least or at_most")
        if self.bound == "lower" and (self.at_least is None or self.at_most is not None):
            raise ValueError(f"gate on {self.metric!r}: bound: lower goes with at_least alone")
        if self.bound == "upper" and (self.at_most is None or self.at_least is not None):
            raise ValueError(f"gate on {self.metric!r}: bound: upper goes with at_most alone")
        if self.when_no_champion == "skip" and not self.needs_champion:
            raise ValueError(
                f"gate on {self.metric!r}: when_no_champion is for a gate relative to champion.*"
            )
        return self

    @property
    def needs_champion(self) -> bool:
        """True for a gate that compares with the champion."""
        return self.relative_to is not None and self.relative_to.startswith(CHAMPION)

    @property
    def name(self) -> str:
        """What is held against the bound: the metric, or metric/reference."""
        return self.metric if self.relative_to is None else f"{self.metric}/{self.relative_to}"


class GateResult(Record):
    """A gate, what was measured and the verdict with its reason."""

    gate: Gate
    value: float | None
    interval: tuple[float, float] | None = None
    verdict: Verdict
    reason: str


class DraftOffer(Record):
    """What a refused student may still do: propose tokens to its teacher, which checks each of them, so that
    no answer changes (speculative decoding)."""

    greedy_acceptance: float
    """Share of the teacher's greedy tokens that are the student's likeliest too: kept at temperature 0."""
    acceptance: float | None = None
    """Mean of Σ min(p, q) over the teacher's greedy answers: kept at temperature 1. A lower bound, of the
    tokens that both list."""
    cost: float
    """Seconds of the student's step over the teacher's."""
    tokens: int
    """Tokens to propose at once, by the formula."""
    expected_speed_up: float
    """Of greedy decoding, by theorem 3.8 of Leviathan et al. 2023; predicted, not measured."""
    command: str
    """What measures it on logged traffic and writes the engine's setting."""


class GateReport(Record):
    """All gates of one artifact. `overridden_by` names who let a failed artifact through, and why."""

    results: list[GateResult] = Field(default_factory=list)
    draft: DraftOffer | None = None
    """Of a student that failed, where it would speed its teacher up."""
    champion: str | None = None
    """The model that gates relative to champion.* compared with, as name:version."""
    overridden_by: str | None = None

    @property
    def verdict(self) -> Verdict:
        """PASS only when every gate passed; the worst verdict otherwise. No gates at all: NO_DATA."""
        order = [Verdict.ERROR, Verdict.FAIL, Verdict.NO_DATA, Verdict.INCONCLUSIVE, Verdict.PASS]
        found = {r.verdict for r in self.results}
        return next((v for v in order if v in found), Verdict.NO_DATA)


def judge(
    gates: list[Gate],
    metrics: Mapping[str, float | None],
    intervals: Mapping[str, tuple[float, float]] | None = None,
    champion: str | None = None,
) -> GateReport:
    """Judge every gate against the measured metrics; a missing or NaN metric is NO_DATA, never PASS.

    Args:
        intervals: by `Gate.name`; only gates on a bound read them.
        champion: what champion.* metrics are of, as name:version; None when there is no champion yet.
    """
    results = [_judge_one(g, metrics, intervals or {}, champion) for g in gates]
    return GateReport(results=results, champion=champion)


def _judge_one(
    gate: Gate,
    metrics: Mapping[str, float | None],
    intervals: Mapping[str, tuple[float, float]],
    champion: str | None,
) -> GateResult:
    value = metrics.get(gate.metric)
    if value is None or math.isnan(value):
        return _no_data(gate, f"{gate.metric} was not measured")
    if gate.needs_champion and champion is None:
        return _without_champion(gate)
    if gate.relative_to is not None:
        reference = metrics.get(gate.relative_to)
        if reference is None or math.isnan(reference) or reference == 0:
            return _no_data(gate, f"reference {gate.relative_to} was not measured or is zero")
        value = value / reference
    interval = intervals.get(gate.name)
    if gate.bound == "value":
        return _held(gate, value, value, value, interval)
    if interval is None or any(math.isnan(end) for end in interval):
        return _no_data(gate, f"{gate.name} has no interval")
    return _held(gate, value, *interval, interval)


def _held(
    gate: Gate, value: float, low: float, high: float, interval: tuple[float, float] | None
) -> GateResult:
    """Hold [low, high] against the bound: all of it within, all of it outside, or the bound between."""
    shown = f"{gate.name} = {value:.4g}"
    if gate.bound != "value":
        shown += f" [{low:.4g}, {high:.4g}]"
    verdict, reason = Verdict.PASS, shown
    if gate.at_least is not None and low < gate.at_least:
        verdict = Verdict.FAIL if high < gate.at_least else Verdict.INCONCLUSIVE
        reason = f"{shown} {'is' if verdict is Verdict.FAIL else 'may be'} below {gate.at_least:g}"
    elif gate.at_most is not None and high > gate.at_most:
        verdict = Verdict.FAIL if low > gate.at_most else Verdict.INCONCLUSIVE
        reason = f"{shown} {'is' if verdict is Verdict.FAIL else 'may be'} above {gate.at_most:g}"
    return GateResult(gate=gate, value=value, interval=interval, verdict=verdict, reason=reason)


def _without_champion(gate: Gate) -> GateResult:
    """The rule for the first student of a name; PASS only where the configuration says so."""
    if gate.when_no_champion == "skip":
        reason = f"there is no champion yet for {gate.relative_to}: skipped (when_no_champion: skip)"
        return GateResult(gate=gate, value=None, verdict=Verdict.PASS, reason=reason)
    return _no_data(
        gate, f"there is no champion yet for {gate.relative_to}; when_no_champion: skip lets a first one pass"
    )


def _no_data(gate: Gate, reason: str) -> GateResult:
    return GateResult(gate=gate, value=None, verdict=Verdict.NO_DATA, reason=reason)
