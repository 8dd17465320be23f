"""gate: the last word before a student is published. Pure but for reading statistics and writing its report.

Knows nothing about how a metric was measured; a metric that was not measured never passes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from contracts.config import parse_config, write_atomic
from contracts.dataset import Manifest
from contracts.errors import GateError
from contracts.gates import DraftOffer, Gate, GateReport, Verdict, judge
from contracts.speculative import best_tokens, expected_speed_up
from distill_jobs.config import IntervalConfig
from distill_jobs.measuring.intervals import Bootstrap, Interval
from distill_jobs.measuring.statistics import load
from registry.adapter import is_adapter

WORTH = 1.1
"""Expected speed-up below which a draft is not offered: the formula is an upper bound."""


def check(
    gates: Sequence[Gate],
    evaluated: Manifest,
    report_file: Path,
    override: str | None,
    champion: str | None = None,
    student: Path | None = None,
) -> GateReport:
    """Judge what was evaluated, write the report, and stop a student that failed unless somebody takes the
    blame. `champion` is the one it was held against, as name:version. `student` is the
    checkpoint that a student that failed is offered as its teacher's draft from.

    Raises: GateError listing what failed.
    """
    intervals = evaluated.intervals | _ratios(gates, evaluated)
    report = judge(list(gates), evaluated.metrics, intervals, champion)
    if report.verdict is not Verdict.PASS and override:
        report = report.model_copy(update={"overridden_by": override})
    if report.verdict is not Verdict.PASS and student is not None:
        report = report.model_copy(update={"draft": offer(evaluated.metrics, student)})
    write_atomic(report_file, report.model_dump_json(indent=1) + "\n")
    if report.verdict is Verdict.PASS or report.overridden_by is not None:
        return report
    failed = [
        f"  {r.verdict}: {r.reason}{_why(r.gate)}" for r in report.results if r.verdict is not Verdict.PASS
    ]
    lines = "\n".join(failed) or "  NO_DATA: the configuration has no gates"
    raise GateError(
        f"The student is not published: {report.verdict}.\n{lines}\nThe report is in {report_file}."
        " Train a better student, or publish it all the same with --override-gate 'REASON'."
        + ("" if report.draft is None else _offered(report.draft))
    )


def offer(metrics: Mapping[str, float | None], student: Path) -> DraftOffer | None:
    """What the student would gain as its teacher's draft, of what was evaluated; None where it would gain
    nothing, is an adapter, or where its tokens are not the teacher's (then there is no agreement)."""
    greedy, speed, teacher = (
        metrics.get(name) for name in ("student.agreement", "student.tokens_per_s", "teacher.tokens_per_s")
    )
    if not greedy or not speed or not teacher or math.isnan(greedy) or is_adapter(student):
        return None
    cost = teacher / speed
    tokens = best_tokens(greedy, cost)
    gain = expected_speed_up(greedy, tokens, cost)
    if gain < WORTH:
        return None
    return DraftOffer(
        greedy_acceptance=greedy,
        acceptance=metrics.get("student.acceptance"),
        cost=cost,
        tokens=tokens,
        expected_speed_up=gain,
        command=f"stillhouse speculate ROUTE --draft {shlex.quote(str(student))}",
    )


def _offered(draft: DraftOffer) -> str:
    sampled = "" if draft.acceptance is None else f", at temperature 1 at least {draft.acceptance:.0%}"
    return (
        f"\nIt may serve as its teacher's draft, which changes no answer: {draft.greedy_acceptance:.0%} of"
        f" its proposals would be kept (greedy{sampled}), {draft.tokens} at once should be"
        f" {draft.expected_speed_up:.2f} times as fast. To measure and turn on:\n  {draft.command}"
    )


def _ratios(gates: Sequence[Gate], evaluated: Manifest) -> dict[str, Interval]:
    """Paired intervals of metric / reference, for the gates whose bound is on one."""
    wanted = [g for g in gates if g.relative_to is not None and g.bound != "value"]
    if not wanted or "statistics" not in evaluated.outputs:
        return {}
    statistics = load(evaluated.output("statistics"))
    config = parse_config(evaluated.config.get("intervals", {}), IntervalConfig)
    found = {}
    for gate in wanted:
        metric, reference = statistics.get(gate.metric), statistics.get(gate.relative_to or "")
        if metric is None or reference is None or len(metric.rows) != len(reference.rows):
            continue
        interval = Bootstrap(len(metric.rows), config).ratio(metric, reference)
        if interval is not None:
            found[gate.name] = interval
    return found


def _why(gate: Gate) -> str:
    return f" ({gate.why})" if gate.why else ""
