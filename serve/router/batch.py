"""Counts of the hot path, gathered in plain numbers and handed to prometheus_client a hundred times a second.

A prometheus counter takes a lock, and in a file shared by processes packs bytes, each time it is touched; ten
of them a request were a fifth of routing it. Used from one event loop. Knows nothing about what is counted.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

FLUSH_S = 0.01
"""How old what prometheus_client knows may be."""


class _Flushed(Protocol):
    def flush(self) -> None:
        """Hand over what was gathered."""
        ...


class Batch:
    """What was counted since the last flush. Without a running loop each count is flushed at once."""

    def __init__(self) -> None:
        self._dirty: list[_Flushed] = []
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def add(self, counted: _Flushed) -> None:
        """Something is to be flushed; called once by each until it was."""
        self._dirty.append(counted)
        if self._loop is None:
            self.flush()
        elif len(self._dirty) == 1:
            self._loop.call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand everything over now."""
        dirty, self._dirty = self._dirty, []
        for counted in dirty:
            counted.flush()


class Counted:
    """A counter with its labels."""

    __slots__ = ("_batch", "_child", "_n")

    def __init__(self, batch: Batch, child: Counter) -> None:
        self._batch = batch
        self._child = child
        self._n = 0

    def inc(self, amount: int = 1) -> None:
        """Count; `amount` is positive."""
        before, self._n = self._n, self._n + amount
        if not before:
            self._batch.add(self)

    def flush(self) -> None:
        """Hand over what was gathered."""
        n, self._n = self._n, 0
        self._child.inc(n)


class Level:
    """A gauge with its labels that goes up and down."""

    __slots__ = ("_batch", "_child", "_dirty", "_value")

    def __init__(self, batch: Batch, child: Gauge) -> None:
        self._batch = batch
        self._child = child
        self._value = 0
        self._dirty = False

    def inc(self) -> None:
        """One more."""
        self._value += 1
        self._changed()

    def dec(self) -> None:
        """One less."""
        self._value -= 1
        self._changed()

    def _changed(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._batch.add(self)

    def flush(self) -> None:
        """Hand over what it is."""
        self._dirty = False
        self._child.set(self._value)


class Observed:
    """A histogram with its labels."""

    __slots__ = ("_batch", "_bounds", "_child", "_counts", "_dirty", "_sum")

    def __init__(self, batch: Batch, child: Histogram, bounds: tuple[float, ...]) -> None:
        self._batch = batch
        self._child = child
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._dirty = False

    def observe(self, value: float) -> None:
        """Note a value; a bucket holds what is not above its bound."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value
        if not self._dirty:
            self._dirty = True
            self._batch.add(self)

    def flush(self) -> None:
        """Hand over what was gathered, in the way of `Histogram.observe`, many values at a time."""
        self._dirty = False
        for at, n in enumerate(self._counts):
            if n:
                self._child._buckets[at].inc(n)
                self._counts[at] = 0
        self._child._sum.inc(self._sum)
        self._sum = 0.0
