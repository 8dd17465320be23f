"""What the request log tells the router: verdicts become evidence and metrics, losses become metrics.

Called from the log's threads. Knows nothing about how an answer was graded.
"""

from __future__ import annotations

from contracts.metrics import GRADE
from serve.router.exchange import Exchange
from serve.router.ledger import Ledger
from serve.router.metrics import Metrics


class Verdicts:
    """The hooks of one router's request log."""

    def __init__(self, metrics: Metrics, ledger: Ledger) -> None:
        self._metrics = metrics
        self._ledger = ledger

    def graded(self, draft: Exchange, passed: bool) -> None:
        """Count a verdict for the arm that gave the answer."""
        verdict = "pass" if passed else "fail"
        self._metrics.grades.labels(draft.route.split.route, draft.assignment.arm.value, verdict).inc()
        key = draft.evidence()
        if key is not None:
            self._ledger.score(key, GRADE, 1.0 if passed else 0.0)

    def ungraded(self, reason: str) -> None:
        """Count an answer without a verdict; errors have a metric of their own."""
        if reason == "error":
            self._metrics.grader_errors.inc()
        else:
            self._metrics.ungraded.labels(reason).inc()

    def written(self, rows: int) -> None:
        """Count rows that reached the file."""
        self._metrics.log_rows.inc(rows)

    def dropped(self, rows: int) -> None:
        """Count rows that were lost."""
        self._metrics.log_dropped.inc(rows)

    def uploaded(self, ok: bool) -> None:
        """Count an upload of a segment."""
        self._metrics.log_uploads.labels("ok" if ok else "error").inc()

    def unredacted(self) -> None:
        """Count a row that lost its texts because a detector failed."""
        self._metrics.log_unredacted.inc()
