"""How much a key used in the last minute, over all router processes: counts by minute and their arithmetic.

The window slides: the minute before counts by the share of it that is less than 60 s ago. This process's own
counts are exact at any moment; the other processes' are as old as their last write to the state store.
Owned by one event loop. Knows nothing about keys, limits or storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from serve.state.keys import MinuteUsage, Spent

MINUTE_S = 60
_NOTHING = Spent(0, 0)


def rate(previous: int, current: int, now: float) -> float:
    """What was used in the last 60 s, taking the previous minute's use as evenly spread."""
    return current + previous * (1 - now % MINUTE_S / MINUTE_S)


def wait_s(previous: int, current: int, limit: int, now: float) -> int:
    """Whole seconds until the rate is below the limit, if nothing is used until then; 0 when it is."""
    if rate(previous, current, now) < limit:
        return 0
    elapsed = now % MINUTE_S
    if current < limit:  # enough of the previous minute leaves the window before this minute ends
        at = MINUTE_S * (1 - (limit - current) / previous)
    else:
        at = MINUTE_S + MINUTE_S * (1 - limit / current)
    return max(1, math.floor(at - elapsed) + 1)


def reset_s(previous: int, current: int, now: float) -> int:
    """Whole seconds until nothing counts any more, if nothing is used until then."""
    minutes = 2 if current else 1 if previous else 0
    return max(0, math.ceil(minutes * MINUTE_S - now % MINUTE_S))


class UsageBook:
    """Counts of one router process by key and minute, and what the others said."""

    def __init__(self) -> None:
        self._own: dict[str, dict[int, list[int]]] = {}
        """Key id → minute → [requests, prompt tokens, completion tokens]."""
        self._others: dict[str, dict[int, Spent]] = {}
        self._dirty: set[tuple[str, int]] = set()

    def add(self, key_id: str, now: float, requests: int, prompt: int, completion: int) -> None:
        """Count something that was used now."""
        minute = int(now // MINUTE_S)
        minutes = self._own.setdefault(key_id, {})
        counts = minutes.get(minute)
        if counts is None:
            counts = minutes[minute] = [0, 0, 0]
        counts[0] += requests
        counts[1] += prompt
        counts[2] += completion
        self._dirty.add((key_id, minute))

    def take_others(self, spent: dict[str, dict[int, Spent]]) -> None:
        """What all other processes counted, by key and minute; replaces what they said before."""
        self._others = spent

    def spent(self, key_id: str, minute: int) -> Spent:
        """What all processes together counted in a minute."""
        requests, prompt, completion = self._own.get(key_id, {}).get(minute, (0, 0, 0))
        theirs = self._others.get(key_id, {}).get(minute, _NOTHING)
        return Spent(requests + theirs.requests, prompt + completion + theirs.tokens)

    def unwritten(self) -> list[MinuteUsage]:
        """Absolute counts of every key and minute that changed since they were last stored."""
        return [MinuteUsage(key, minute, *self._own[key][minute]) for key, minute in self._dirty]

    def stored(self, written: Iterable[MinuteUsage], now: float) -> None:
        """These counts are in the state store; forget minutes that no window reaches any more."""
        for one in written:
            if self._own[one.key_id][one.minute] == [*one[2:]]:
                self._dirty.discard((one.key_id, one.minute))
        oldest = int(now // MINUTE_S) - 1
        for key_id, minutes in list(self._own.items()):
            for minute in [m for m in minutes if m < oldest and (key_id, m) not in self._dirty]:
                del minutes[minute]
            if not minutes:
                del self._own[key_id]
