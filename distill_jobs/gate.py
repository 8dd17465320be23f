"""gate: the last word before a student is published. Pure but for reading statistics and writing its report.

Knows nothing about how a metric was measured; a metric that was not measured never passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contracts.config import parse_config, write_atomic
from contracts.dataset import Manifest
from contracts.errors import GateError
from contracts.gates import Gate, GateReport, Verdict, judge
from distill_jobs.config import IntervalConfig
from distill_jobs.measuring.intervals import Bootstrap, Interval
from distill_jobs.measuring.statistics import load


def check(
    gates: Sequence[Gate],
    evaluated: Manifest,
    report_file: Path,
    override: str | None,
    champion: str | None = None,
) -> GateReport:
    """Judge what was evaluated, write the report, and stop a student that failed unless somebody takes the
    blame. `champion` is the one it was held against, as name:version.

    Raises: GateError listing what failed.
    """
    intervals = evaluated.intervals | _ratios(gates, evaluated)
    report = judge(list(gates), evaluated.metrics, intervals, champion)
    if report.verdict is not Verdict.PASS and override:
        report = report.model_copy(update={"overridden_by": override})
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
