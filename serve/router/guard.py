"""Turns a client that left, or a deadline that passed, into the cancellation of one request's task.

No timer a request: one for all of them looks at every deadline that runs, some twenty times a second. No task
a request either where the server can call back. Knows nothing about what the task does.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import Enum
from math import inf
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]

_LOOK_S = 0.05
"""How late a deadline may be noticed."""


class Source(ABC):
    """An ASGI `receive` of a server of ours: it knows without waiting, and calls back."""

    __slots__ = ()

    @abstractmethod
    async def __call__(self) -> dict[str, Any]:
        """The next ASGI message."""

    @abstractmethod
    def whole_body(self) -> bytes | None:
        """The body when all of it is here and nobody took any of it; None otherwise."""

    @abstractmethod
    def write(self, body: bytes) -> bool:
        """Send a piece of an answer that has begun, at once; False when `drained` must be awaited first."""

    @abstractmethod
    async def drained(self) -> None:
        """Wait until the client took most of what was written."""

    @abstractmethod
    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the client leaves before its answer is whole."""


class Cause(Enum):
    """Why the task was cancelled."""

    CLIENT = "the client closed the connection"
    FIRST_BYTE = "the upstream sent nothing in time"
    BETWEEN = "the upstream stopped sending"
    TOTAL = "the request took too long"


class Deadlines:
    """Every guard that runs in one event loop, and the one timer that looks at them."""

    __slots__ = ("_guards", "_loop", "_timer")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._guards: set[Guard] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, guard: Guard) -> None:
        """Look at a guard until it is discarded."""
        self._guards.add(guard)
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_S, self._look)

    def discard(self, guard: Guard) -> None:
        """Look at it no more."""
        self._guards.discard(guard)

    def _look(self) -> None:
        now = self._loop.time()
        for guard in [g for g in self._guards if g.due <= now]:
            guard.fire()
        # With nothing left to look at the timer ends too, and an idle loop stays idle.
        self._timer = self._loop.call_later(_LOOK_S, self._look) if self._guards else None


class Guard:
    """Watches over the current task from its making to `stop`."""

    __slots__ = (
        "_deadlines", "_end", "_ended", "_loop", "_task", "_waiting_for", "_watcher", "cause", "due",
        "source",
    )  # fmt: skip

    def __init__(self, receive: Receive, total_s: float, deadlines: Deadlines) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._deadlines = deadlines
        self._end = self._loop.time() + total_s
        self.due = self._end
        """When it fires, by the event loop's clock."""
        self._waiting_for = Cause.TOTAL
        self._ended = False
        self._watcher: asyncio.Task[None] | None = None
        self.cause: Cause | None = None
        self.source = receive if isinstance(receive, Source) else None
        """The client's side, where the server is ours."""
        deadlines.add(self)
        if self.source is not None:
            self.source.on_disconnect(self._left)
        else:
            self._watcher = self._loop.create_task(self._watch(receive))

    def wait_for(self, cause: Cause, seconds: float) -> None:
        """From now on the task is cancelled for `cause` after this long; the previous wait is over."""
        self._waiting_for = cause
        self.extend(seconds)

    def extend(self, seconds: float) -> None:
        """Something came: the current wait starts again."""
        due = self._loop.time() + seconds
        self.due = due if due < self._end else self._end

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
        """Look and listen no more."""
        self._ended = True
        self._deadlines.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()

    def fire(self) -> None:
        """The deadline passed."""
        cause = Cause.TOTAL if self.due >= self._end else self._waiting_for
        # This wait is over; the whole request may still take too long, once.
        self.due = inf if cause is Cause.TOTAL else self._end
        self._cancel(cause)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left()

    def _left(self) -> None:
        self._cancel(Cause.CLIENT)

    def _cancel(self, cause: Cause) -> None:
        if self._ended:
            return
        if self.cause is None:
            self.cause = cause
            self._task.cancel()
        elif cause is Cause.CLIENT:  # both in one turn of the loop: nobody is left to answer
            self.cause = cause
