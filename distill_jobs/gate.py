"""gate: the last word before a student is published. Pure but for writing its report.

Knows nothing about how a metric was measured; a metric that was not measured never passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contracts.config import write_atomic
from contracts.errors import GateError
from contracts.gates import Gate, GateReport, Verdict, judge


def check(
    gates: Sequence[Gate], metrics: dict[str, float | None], report_file: Path, override: str | None
) -> GateReport:
    """Judge the metrics, write the report, and stop a student that failed unless somebody takes the blame.

    Raises: GateError listing what failed.
    """
    report = judge(list(gates), metrics)
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


def _why(gate: Gate) -> str:
    return f" ({gate.why})" if gate.why else ""
