"""Bytes of a request in the log under each policy, and how many a second one router process writes.

The shipped `RequestLog` with its threads, redactor and segment writer; rows are support chats of about the
size that the traffic generator's are: a kilobyte asked, half a kilobyte answered.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Bar
from contracts.traffic import Arm, LogMode, Outcome, Reason, RequestRow, UnitKind
from serve.request_log import RequestLog, SegmentWriter
from serve.router.config import RequestLogConfig

ROWS = {LogMode.FULL: 4000, LogMode.REDACTED: 800, LogMode.METADATA: 4000}
_ASKED = (
    "My order 4711-{n} has not arrived, although the tracking page has said since Tuesday that it is out for "
    "delivery. You can reach me at customer{n}@example.org. I have tried to telephone twice, and each time "
    "the queue was so long that I had to give up. Please tell me where the parcel is. "
)
_ANSWERED = (
    "I am sorry that parcel {n} is late. The carrier scanned it this morning at the depot in your town, so "
    "it should be with you before six. If it is not, answer here and we send another one at once. "
)


def run() -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row for each policy."""
    return [_measure(mode, rows) for mode, rows in ROWS.items()], []


class Draft(NamedTuple):
    """An ended request as the router hands it over."""

    row: RequestRow
    mode: LogMode

    def build(self) -> RequestRow:
        """The row with all its texts."""
        return self.row

    def log_mode(self) -> LogMode:
        """How much of it is kept."""
        return self.mode

    def size(self) -> int:
        """Bytes of request and answer, about."""
        return 2000


class Hooks:
    """Counts what was written and lost."""

    def __init__(self) -> None:
        self.rows = self.lost = 0

    def written(self, rows: int) -> None:
        """Rows reached the file."""
        self.rows += rows

    def dropped(self, rows: int) -> None:
        """Rows were lost."""
        self.lost += rows

    def graded(self, draft: Any, grader: str, score: float) -> None:
        """Nobody grades here."""

    def ungraded(self, grader: str, reason: str) -> None:
        """Nobody grades here."""

    def answered(self, draft: Any, row: RequestRow) -> None:
        """Nobody wants answers here."""

    def unredacted(self) -> None:
        """A detector failed: the figures would be another mode's."""
        self.lost += 1


def row(number: int) -> RequestRow:
    """A logged chat."""
    asked, answered = (_ASKED * 3).format(n=number), (_ANSWERED * 3).format(n=number)
    messages = [{"role": "system", "content": "You answer for the shop."}, {"role": "user", "content": asked}]
    return RequestRow(
        request_id=f"req-{number:032d}", ts=1.0, route="support", endpoint="/v1/chat/completions",
        arm=Arm.STABLE, served_arm=Arm.STABLE, reason=Reason.RANDOM, unit_kind=UnitKind.HEADER,
        unit_hash="0123456789abcdef", split_version=3, rollout_id="support-20261126-abc", upstream="teacher",
        model="teacher", stream=True, status=200, outcome=Outcome.OK, finish_reason="stop",
        prompt_tokens=200, completion_tokens=120, ttft_s=0.12, tpot_s=0.01, e2e_s=1.3, overhead_s=0.0004,
        request={"model": "support", "messages": messages, "stream": True}, response_text=answered,
    )  # fmt: skip


def _measure(mode: LogMode, rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sh-log-") as folder:
        hooks = Hooks()
        log = RequestLog(SegmentWriter(Path(folder), "bench-1-ab", 2**40, 3600.0), hooks, rows)
        drafts = [Draft(row(n), mode) for n in range(rows)]
        began, cpu = time.perf_counter(), time.process_time()
        log.start()
        for draft in drafts:
            log.submit(draft)
        assert log.close(120.0)
        took, used = time.perf_counter() - began, time.process_time() - cpu
        size = sum(file.stat().st_size for file in Path(folder).glob("*.jsonl"))
    if hooks.lost or hooks.rows != rows:
        raise RuntimeError(f"{hooks.lost} of {rows} rows were lost, {hooks.rows} written")
    return {
        "part": "logs",
        "mode": mode.value,
        "rows": rows,
        "bytes_per_request": round(size / rows),
        "rows_per_s": round(rows / took),
        "mb_per_s": round(size / took / 1e6, 2),
        "cpu_ms_per_1000": round(1e6 * used / rows),
        "rotate_bytes": RequestLogConfig.model_fields["rotate_bytes"].default,
        "rotate_s": RequestLogConfig.model_fields["rotate_s"].default,
    }
