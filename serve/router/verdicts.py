"""What the request log tells the router: scores become evidence and metrics, losses become metrics.

Called from the log's threads. Hands answers on to the judges. Knows nothing about how an answer was graded.
"""

from __future__ import annotations

from collections.abc import Callable

from contracts.traffic import RequestRow
from serve.router.exchange import Exchange
from serve.router.ledger import Ledger
from serve.router.metrics import Metrics

Answered = Callable[[Exchange, RequestRow], None]


class Verdicts:
    """The hooks of one router's request log."""

    def __init__(self, metrics: Metrics, ledger: Ledger, answered: Answered | None = None) -> None:
        """`answered`: called in the log's thread with every answer; must not block."""
        self._metrics = metrics
        self._ledger = ledger
        self._answered = answered

    def graded(self, draft: Exchange, grader: str, score: float) -> None:
        """Count a score for the arm that gave the answer."""
        self._metrics.graded(draft.route.split.route, draft.assignment.arm.value, grader, score)
        for key in draft.evidence():
            self._ledger.score(key, grader, score)

    def ungraded(self, grader: str, reason: str) -> None:
        """Count an answer without a score; errors have a metric of their own."""
        if reason == "error":
            self._metrics.grader_errors.labels(grader).inc()
        else:
            self._metrics.ungraded.labels(grader, reason).inc()

    def answered(self, draft: Exchange, row: RequestRow) -> None:
        """Pass an answer on."""
        if self._answered is not None:
            self._answered(draft, row)

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
