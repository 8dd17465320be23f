"""Gates and verdicts: one vocabulary for offline evaluation and online rollouts.

Pure: no I/O. Knows nothing about where a value was measured. No data never passes.
"""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import Field, model_validator

from contracts.config import Record


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
    """Name of another metric; the bound is then on the ratio metric / reference."""
    why: str = ""
    """One sentence for the report: what this gate protects."""

    @model_validator(mode="after")
    def _has_bound(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"gate on {self.metric!r}: give at_least or at_most")
        return self


class GateResult(Record):
    """A gate, what was measured and the verdict with its reason."""

    gate: Gate
    value: float | None
    verdict: Verdict
    reason: str


class GateReport(Record):
    """All gates of one artifact. `overridden_by` names who let a failed artifact through, and why."""

    results: list[GateResult] = Field(default_factory=list)
    overridden_by: str | None = None

    @property
    def verdict(self) -> Verdict:
        """PASS only when every gate passed; the worst verdict otherwise. No gates at all: NO_DATA."""
        order = [Verdict.ERROR, Verdict.FAIL, Verdict.NO_DATA, Verdict.INCONCLUSIVE, Verdict.PASS]
        found = {r.verdict for r in self.results}
        return next((v for v in order if v in found), Verdict.NO_DATA)


def judge(gates: list[Gate], metrics: dict[str, float | None]) -> GateReport:
    """Judge every gate against the measured metrics; a missing or NaN metric is NO_DATA, never PASS."""
    return GateReport(results=[_judge_one(g, metrics) for g in gates])


def _judge_one(gate: Gate, metrics: dict[str, float | None]) -> GateResult:
    value = metrics.get(gate.metric)
    if value is None or math.isnan(value):
        return GateResult(
            gate=gate, value=None, verdict=Verdict.NO_DATA, reason=f"{gate.metric} was not measured"
        )
    name = gate.metric
    if gate.relative_to is not None:
        reference = metrics.get(gate.relative_to)
        if reference is None or math.isnan(reference) or reference == 0:
            reason = f"reference {gate.relative_to} was not measured or is zero"
            return GateResult(gate=gate, value=None, verdict=Verdict.NO_DATA, reason=reason)
        value, name = value / reference, f"{gate.metric}/{gate.relative_to}"
    if gate.at_least is not None and value < gate.at_least:
        reason = f"{name} = {value:.4g} is below {gate.at_least:g}"
        return GateResult(gate=gate, value=value, verdict=Verdict.FAIL, reason=reason)
    if gate.at_most is not None and value > gate.at_most:
        reason = f"{name} = {value:.4g} is above {gate.at_most:g}"
        return GateResult(gate=gate, value=value, verdict=Verdict.FAIL, reason=reason)
    return GateResult(gate=gate, value=value, verdict=Verdict.PASS, reason=f"{name} = {value:.4g}")
