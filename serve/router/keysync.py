"""Keeps the API keys of one router process and the state store in step: keys and others' counts in, own out.

`read`, `write` and `fold` visit the store and run in a thread; the rest belongs to the event loop. Knows
nothing about requests, or about when it is called (sync.py).
"""

from __future__ import annotations

import time
from typing import NamedTuple

from contracts.keys import ApiKey
from serve.router.keys import KeyTable
from serve.router.windows import MINUTE_S
from serve.state.keys import KeyState, MinuteUsage, Spent

_FOLD_EVERY_S = 3600.0
_FOLD_AFTER_HOURS = 48
"""Counts by minute are kept this long; older ones are summed by hour."""


class SeenKeys(NamedTuple):
    """One look at the store."""

    keys: dict[str, ApiKey]
    spent: dict[str, dict[int, Spent]]


class KeySync:
    """Carries between a KeyTable and a KeyState."""

    def __init__(self, replica: str, table: KeyTable) -> None:
        self.table = table
        self._replica = replica
        self._keys: dict[str, ApiKey] = {}
        self._fold_at = 0.0

    def read(self, state: KeyState) -> SeenKeys:
        """All keys, and what the other processes counted in this minute and the one before."""
        minute = int(time.time() // MINUTE_S)
        return SeenKeys(state.keys(), state.spent_by_others(self._replica, minute - 1))

    def apply(self, seen: SeenKeys) -> None:
        """Take over what was read."""
        self.table.book.take_others(seen.spent)
        if seen.keys != self._keys or not self.table.loaded:
            self._keys = seen.keys
            self.table.apply(seen.keys.values())

    def unwritten(self) -> list[MinuteUsage]:
        """Counts that are not in the store yet."""
        return self.table.book.unwritten()

    def write(self, state: KeyState, counted: list[MinuteUsage]) -> list[MinuteUsage]:
        """Store counts; returns them."""
        state.put_usage(self._replica, counted)
        now = time.monotonic()
        if now >= self._fold_at:
            self._fold_at = now + _FOLD_EVERY_S
            state.fold_usage(int(time.time() // 3600) - _FOLD_AFTER_HOURS)
        return counted

    def stored(self, counted: list[MinuteUsage]) -> None:
        """These counts are in the store."""
        self.table.book.stored(counted, time.time())
