"""The queue between a router and its log: never blocks a reply, never fails one.

The event loop itself turns small drafts into rows, a few at a time: a thread would do the same work and fight
the loop for the interpreter lock, which cost as much again. What is graded, redacted or large is done by a
thread, and another one writes, so neither a slow grader nor a slow disk is felt by a request; when the queue
is full a row is dropped and counted. Grading sees the whole row whatever the policy keeps of it. Knows
nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from contracts.traffic import LogMode, Outcome, RequestRow
from serve.grading.graders import NamedGrader
from serve.grading.sampling import sampled
from serve.request_log.detectors import BUILT_IN
from serve.request_log.policy import metadata_only
from serve.request_log.redact import Redactor
from serve.request_log.segments import SegmentWriter

_log = logging.getLogger("stillhouse.request_log")
_PAUSE_S = 0.05
_SLICE_S = 0.0003
"""So long the event loop builds rows before it looks at its sockets again."""
_LARGE = 64 * 1024
"""Bytes of a request and its answer from which the event loop leaves a row to the thread."""


class Draft(Protocol):
    """An ended request whose row is built later."""

    def build(self) -> RequestRow:
        """The row, not graded yet, with all its texts."""
        ...

    def log_mode(self) -> LogMode:
        """How much of the row may be written."""
        ...

    def size(self) -> int:
        """Bytes of the request and its answer."""
        ...


class LogHooks(Protocol):
    """What the owner of a log wants to know; called from the log's threads."""

    def graded(self, draft: Any, grader: str, score: float) -> None:
        """An answer got a score from a grader."""
        ...

    def ungraded(self, grader: str, reason: str) -> None:
        """An answer got none: 'abstained', 'error' or 'skipped'."""
        ...

    def answered(self, draft: Any, row: RequestRow) -> None:
        """A row with an answer's whole text was built; only where `wants_answers`."""
        ...

    def written(self, rows: int) -> None:
        """Rows reached the segment file."""
        ...

    def dropped(self, rows: int) -> None:
        """Rows were lost: the queue was full, or they could not be built or written."""
        ...

    def unredacted(self) -> None:
        """A row was to be redacted and could not be, so it was written without its texts."""
        ...


class RequestLog:
    """Accepts drafts from one event loop and makes rows of them."""

    def __init__(
        self,
        writer: SegmentWriter,
        hooks: LogHooks,
        queue_rows: int,
        graders: Sequence[NamedGrader] = (),
        redactor: Redactor | None = None,
        wants_answers: bool = False,
    ) -> None:
        """`wants_answers`: the hooks are shown every answer, whatever is logged of it."""
        self._writer = writer
        self._hooks = hooks
        self._bound = queue_rows
        self._graders = graders
        self._wants_answers = wants_answers
        self._redactor = redactor or Redactor(tuple(BUILT_IN.values()))
        self._drafts: deque[Draft] = deque()
        self._costly: deque[Draft] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: deque[bytes] = deque()
        self._stop = threading.Event()
        self._built = threading.Event()
        self._complained_at = 0.0
        self._threads = [
            threading.Thread(target=self._build_loop, name="request-log-build", daemon=True),
            threading.Thread(target=self._write_loop, name="request-log-write", daemon=True),
        ]

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Start the two threads, and building on the event loop where there is one."""
        for thread in self._threads:
            thread.start()
        if loop is not None and not self._graders and not self._wants_answers:
            self._loop = loop
            loop.call_later(_PAUSE_S, self._build_slice)

    def submit(self, draft: Draft) -> bool:
        """Queue an ended request; False (and counted) when the queue is full."""
        if len(self) >= self._bound:
            self._hooks.dropped(1)
            return False
        self._drafts.append(draft)
        return True

    def __len__(self) -> int:
        """Rows that are not written yet."""
        return len(self._drafts) + len(self._costly) + len(self._lines)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Write everything and make the segment final; False when that took too long. Blocks."""
        self._stop.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(t.is_alive() for t in self._threads)

    # building and grading ------------------------------------------------------------------------

    def _build_slice(self) -> None:
        """Rows on the event loop, until they are all built or the time is up; then once more, later."""
        assert self._loop is not None
        until = time.perf_counter() + _SLICE_S
        while not self._stop.is_set() and (draft := _next(self._drafts)) is not None:
            if draft.size() >= _LARGE or draft.log_mode() is LogMode.REDACTED:
                self._costly.append(draft)
            else:
                self._build(draft)
            if time.perf_counter() > until:
                self._loop.call_soon(self._build_slice)
                return
        if not self._stop.is_set():
            self._loop.call_later(_PAUSE_S, self._build_slice)

    def _build_loop(self) -> None:
        """Rows in a thread: all of them without an event loop, else those that are not the loop's."""
        while True:
            stopping = self._stop.is_set()
            while (draft := _next(self._costly)) is not None:
                self._build(draft)
            while (self._loop is None or stopping) and (draft := _next(self._drafts)) is not None:
                self._build(draft)
            if stopping:
                break
            # Sleeping instead of waiting for a signal batches the work: a wake-up a request would make this
            # thread fight the event loop for the interpreter lock.
            self._stop.wait(_PAUSE_S)
        self._built.set()

    def _build(self, draft: Draft) -> None:
        try:
            mode = draft.log_mode()
            if mode is LogMode.OFF and not self._graders and not self._wants_answers:
                return
            row = draft.build()
            if row.outcome is Outcome.OK and row.response_text is not None:
                row = self._graded(draft, row, row.response_text)
                if self._wants_answers:
                    self._hooks.answered(draft, row)
            if mode is not LogMode.OFF:
                self._lines.append(_line(self._kept(row, mode)))
        except Exception as err:  # noqa: BLE001 reason: one odd row must not end the log; it is counted
            self._hooks.dropped(1)
            self._complain("a row could not be built: %s", _without_values(err))

    def _kept(self, row: RequestRow, mode: LogMode) -> RequestRow:
        """What the policy lets through of a row."""
        if mode is LogMode.FULL:
            return row
        if mode is LogMode.REDACTED:
            try:
                return self._redactor.row(row)
            except Exception as err:  # noqa: BLE001 reason: a detector is the user's code; counted and told
                self._hooks.unredacted()
                self._complain("a row could not be redacted: %s", _without_values(err))
        return metadata_only(row)

    def _graded(self, draft: Draft, row: RequestRow, text: str) -> RequestRow:
        scores = {}
        for grader in self._graders:
            if not grader.spec.grades(row.route) or not sampled(grader.name, grader.spec, row.request_id):
                continue
            score = self._score(grader, row, text)
            if score is not None:
                scores[grader.name] = score
                self._hooks.graded(draft, grader.name, score)
        return row.model_copy(update={"scores": scores}) if scores else row

    def _score(self, grader: NamedGrader, row: RequestRow, text: str) -> float | None:
        if len(self._drafts) > self._bound // 2:
            self._hooks.ungraded(grader.name, "skipped")  # a slow grader must not cost log rows
            return None
        try:
            score = grader.score(row.request, text)
        except Exception as err:  # noqa: BLE001 reason: a grader is the user's code; counted and told
            self._hooks.ungraded(grader.name, "error")
            self._complain(f"grader {grader.name} failed: %s", _without_values(err))
            return None
        if score is None:
            self._hooks.ungraded(grader.name, "abstained")
        return score

    # writing ---------------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        while True:
            last = self._built.is_set()
            self._write_batch()
            if last:
                break
            self._built.wait(_PAUSE_S)
        try:
            self._writer.close()
        except OSError as err:
            self._complain("the last segment could not be closed: %s", repr(err))

    def _write_batch(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        try:
            self._writer.append(lines)
        except OSError as err:
            self._hooks.dropped(len(lines))
            self._complain("rows could not be written: %s", repr(err))
        else:
            if lines:
                self._hooks.written(len(lines))
        try:
            self._writer.tick()
        except OSError as err:
            self._complain("the segment could not be synced or rotated: %s", repr(err))

    def _complain(self, message: str, detail: str) -> None:
        """At most one line every ten seconds: a full disk must not fill another one with complaints."""
        now = time.monotonic()
        if now - self._complained_at >= 10 or self._complained_at == 0:
            self._complained_at = now
            _log.error(message, detail)


def _next(drafts: deque[Draft]) -> Draft | None:
    """The oldest, None when there is none; while the log stops, two may ask."""
    try:
        return drafts.popleft()
    except IndexError:
        return None


def _line(row: RequestRow) -> bytes:
    """The row as JSON; orjson takes a sixth of pydantic's time, and refuses integers of more than 64 bits."""
    try:
        return orjson.dumps(row.__dict__, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return row.model_dump_json().encode() + b"\n"


def _without_values(err: BaseException) -> str:
    """Type and place of an error, not its message: that may quote the text that must not be logged."""
    return f"{type(err).__name__}\n{''.join(traceback.format_tb(err.__traceback__))}"
