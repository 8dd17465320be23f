"""Turns a client that left, or a deadline that passed, into the cancellation of one request's task.

One timer and one watcher a request, however many chunks it has. Knows nothing about what the task does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Cause(Enum):
    """Why the task was cancelled."""

    CLIENT = "the client closed the connection"
    FIRST_BYTE = "the upstream sent nothing in time"
    BETWEEN = "the upstream stopped sending"
    TOTAL = "the request took too long"


class Guard:
    """Watches over the current task between `start` and `stop`."""

    __slots__ = ("_due", "_end", "_ended", "_loop", "_task", "_timer", "_waiting_for", "_watcher", "cause")

    def __init__(self, receive: Receive, total_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._end = self._loop.time() + total_s
        self._due = self._end
        self._waiting_for = Cause.TOTAL
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._watcher = self._loop.create_task(self._watch(receive))
        self.cause: Cause | None = None

    def wait_for(self, cause: Cause, seconds: float) -> None:
        """From now on the task is cancelled for `cause` after this long; the previous wait is over."""
        self._waiting_for = cause
        self._due = min(self._loop.time() + seconds, self._end)
        if self._timer is None or self._timer.when() > self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._due, self._fire)

    def extend(self, seconds: float) -> None:
        """Something came: the current wait starts again. Cheap; the timer finds out when it fires."""
        self._due = min(self._loop.time() + seconds, self._end)

    def caught(self) -> Cause | None:
        """After a CancelledError: the cause if it was ours (we go on), None if the server cancels us."""
        cause, self.cause = self.cause, None
        if cause is not None:
            self._task.uncancel()
        return cause

    def ending(self) -> None:
        """The answer is whole: nothing cancels the task any more."""
        self._ended = True

    def stop(self) -> None:
        """Release the timer and the watcher."""
        self._ended = True
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancel(Cause.CLIENT)

    def _fire(self) -> None:
        self._timer = None
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._fire)
            return
        self._cancel(Cause.TOTAL if self._due >= self._end else self._waiting_for)

    def _cancel(self, cause: Cause) -> None:
        if self._ended:
            return
        if self.cause is None:
            self.cause = cause
            self._task.cancel()
        elif cause is Cause.CLIENT:  # both in one turn of the loop: nobody is left to answer
            self.cause = cause
