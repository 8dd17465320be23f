"""Bounded concurrency of one route in one router process: places, a queue by priority, 429 beyond.

Owned by one event loop. Knows nothing about HTTP or arms.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from typing import Final

from contracts.routes import Priority, RouteLimits
from serve.router.errors import RequestRefused

_SMOOTH: Final = 0.1
_FIRST_GUESS_S: Final = 1.0


class _Waiter:
    __slots__ = ("future", "gone", "priority")

    def __init__(self, priority: Priority, future: asyncio.Future[None]) -> None:
        self.priority, self.future, self.gone = priority, future, False


class Limiter:
    """Hands out the places of one route; whoever waits longest within the best priority is next."""

    def __init__(self, route: str, limits: RouteLimits) -> None:
        self._route = route
        self._limits = limits
        self._running = 0
        self._order = itertools.count()
        self._heap: list[tuple[int, int, _Waiter]] = []
        self._waiting = 0
        self._takes_s = _FIRST_GUESS_S
        """Smoothed seconds a request holds its place."""

    @property
    def running(self) -> int:
        """Places taken."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting

    def update(self, limits: RouteLimits) -> None:
        """Take over changed limits; new places are given out at once, taken ones are never revoked."""
        self._limits = limits
        self._hand_out()

    async def enter(self, priority: Priority = Priority.NORMAL) -> None:
        """Take a place, waiting for one if need be. Raises RequestRefused (429)."""
        places = self._limits.max_in_flight
        if places is None or (self._running < places and not self._waiting):
            self._running += 1
            return
        if self._waiting >= self._limits.max_queued:
            self._make_room(priority)
        await self._wait(priority)

    def leave(self, seconds: float) -> None:
        """Give the place back; it was held this long."""
        self._running -= 1
        self._takes_s += _SMOOTH * (seconds - self._takes_s)
        self._hand_out()

    async def _wait(self, priority: Priority) -> None:
        waiter = _Waiter(priority, asyncio.get_running_loop().create_future())
        heapq.heappush(self._heap, (priority, next(self._order), waiter))
        self._waiting += 1
        entered = False
        try:
            async with asyncio.timeout(self._limits.queue_s):
                await waiter.future
            entered = True
        except TimeoutError:
            raise self._full(f"no place became free within {self._limits.queue_s:g} s") from None
        finally:
            if not entered:
                self._gave_up(waiter)

    def _gave_up(self, waiter: _Waiter) -> None:
        """Refused, timed out or cancelled; the latter two may come in the very turn that gave it a place."""
        if not waiter.gone:
            waiter.gone = True
            self._waiting -= 1
        future = waiter.future
        if future.done() and not future.cancelled() and future.exception() is None:
            self.leave(self._takes_s)

    def _make_room(self, priority: Priority) -> None:
        """The queue is full: the last of a worse priority goes, or this one does."""
        worst = max((entry for entry in self._heap if not entry[2].gone), default=None)
        if worst is None or worst[0] <= priority:
            raise self._full(f"{self._waiting} requests wait already")
        self._drop(worst[2])

    def _drop(self, waiter: _Waiter) -> None:
        waiter.gone = True
        self._waiting -= 1
        if not waiter.future.done():
            waiter.future.set_exception(self._full("a request of higher priority took its place"))

    def _hand_out(self) -> None:
        places = self._limits.max_in_flight
        while self._heap and (places is None or self._running < places):
            waiter = heapq.heappop(self._heap)[2]
            if waiter.gone or waiter.future.done():
                continue
            waiter.gone = True
            self._waiting -= 1
            self._running += 1
            waiter.future.set_result(None)

    def _full(self, why: str) -> RequestRefused:
        places = self._limits.max_in_flight or 1
        wait = math.ceil(min(60.0, max(1.0, (self._waiting + 1) * self._takes_s / places)))
        return RequestRefused(
            f"Route {self._route!r} is at its limit of {places} requests: {why}. Try again in {wait} s.",
            429,
            "route_overloaded",
            kind="rate_limit_error",
            headers=((b"retry-after", str(wait).encode()),),
            route=self._route,
        )


class RetryBudget:
    """Retries as a share of requests, so that a failing upstream is not asked twice as often as a sound one.

    Every request earns `ratio` of a retry; `reserve` retries are there from the start (as in Finagle).
    """

    __slots__ = ("_credit", "_ratio", "_reserve")

    def __init__(self, ratio: float, reserve: float = 10.0) -> None:
        self._ratio = ratio
        self._reserve = reserve
        self._credit = reserve

    def earn(self) -> None:
        """A request came in."""
        self._credit = min(self._credit + self._ratio, 10.0 * self._reserve)

    def spend(self) -> bool:
        """True when one more retry is affordable."""
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True
