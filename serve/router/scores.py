"""Where scores go that come after their answer: evidence, metrics, and a line beside the request log.

Judges' scores and pairs' come seconds after the row they belong to was written, so they have segments of
their own (`scores-…`, contracts.grading.ScoreRow). Knows nothing about how a score was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from contracts.grading import ScoreRow
from serve.request_log import SegmentWriter
from serve.router.ledger import EvidenceKey, Ledger
from serve.router.metrics import Metrics

_log = logging.getLogger("stillhouse.router")
_FLUSH_S = 0.5
_MAX_LINES = 10_000


class Scores:
    """The late scores of one router process."""

    def __init__(self, metrics: Metrics, ledger: Ledger, lines: SegmentWriter | None) -> None:
        """`lines`: where rows are written; None without a request log."""
        self._metrics = metrics
        self._ledger = ledger
        self._writer = lines
        self._lines: deque[bytes] = deque()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write lines."""
        self._task = asyncio.create_task(self._flush_forever())

    async def stop(self) -> None:
        """Write what is left and make the segment final."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._write, True)

    def add(self, keys: tuple[EvidenceKey, ...], row: ScoreRow) -> None:
        """Count a score once: as evidence of each of the keys, and in metrics and log anyway."""
        for key in keys:
            self._ledger.score(key, row.grader, row.score)
        self._metrics.graded(row.route, row.arm, row.grader, row.score)
        if self._writer is None or len(self._lines) >= _MAX_LINES:
            self._metrics.log_dropped.inc()
            return
        self._lines.append(row.model_dump_json().encode() + b"\n")

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            await asyncio.to_thread(self._write, False)

    def _write(self, last: bool) -> None:
        if self._writer is None:
            return
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        try:
            self._writer.append(lines)
            self._writer.tick()
            if last:
                self._writer.close()
        except OSError as err:  # the evidence is counted; only its line is missing
            self._metrics.log_dropped.inc(len(lines))
            _log.error("scores could not be written beside the request log: %r", err)
