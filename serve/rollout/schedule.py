"""When a rollout may move forward: 'Mon-Fri 09:00-17:00 Europe/Berlin', several of them, any time zone.

Pure: the time is an argument. An opening is judged on the local clock of its zone, so daylight saving moves
it with the people who watch. Knows nothing about rollouts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_WINDOW = re.compile(
    r"^(?:(?P<days>[A-Za-z,\-]+) +)?(?P<from>\d\d:\d\d)-(?P<to>\d\d:\d\d)(?: +(?P<zone>\S+))?$"
)
_FORM = "write 'Mon-Fri 09:00-17:00 Europe/Berlin'; days and zone may be left out (every day, UTC)"


@dataclass(frozen=True)
class Opening:
    """One weekly window. `closes` not after `opens` means on the next day."""

    days: frozenset[int]
    opens: time
    closes: time
    zone: ZoneInfo

    def begins(self, local: datetime) -> datetime:
        """Its begin on the local day of `local`."""
        return local.replace(hour=self.opens.hour, minute=self.opens.minute, second=0, microsecond=0, fold=0)

    def covers(self, at: float) -> bool:
        """True when the Unix time falls into it; the end is not part of it."""
        local = datetime.fromtimestamp(at, self.zone)
        clock = local.time().replace(tzinfo=None)
        overnight = self.closes <= self.opens
        today, yesterday = local.weekday(), (local.weekday() - 1) % 7
        if not overnight:
            return today in self.days and self.opens <= clock < self.closes
        return (today in self.days and clock >= self.opens) or (
            yesterday in self.days and clock < self.closes
        )


@lru_cache(maxsize=1024)
def parse_window(text: str) -> Opening:
    """Read one window. Raises ValueError saying what is wrong and how it is written."""
    found = _WINDOW.match(text.strip())
    if found is None:
        raise ValueError(f"windows: {text!r} cannot be read; {_FORM}")
    try:
        zone = ZoneInfo(found["zone"] or "UTC")
        opens, closes = time.fromisoformat(found["from"]), time.fromisoformat(found["to"])
    except (ZoneInfoNotFoundError, ValueError, OSError) as err:
        raise ValueError(f"windows: {text!r}: {err}; {_FORM}") from err
    return Opening(_days(text, found["days"]), opens, closes, zone)


def is_open(windows: Sequence[str], at: float) -> bool:
    """True when a rollout may move forward at this Unix time; always without windows."""
    return not windows or any(parse_window(w).covers(at) for w in windows)


def next_opening(windows: Sequence[str], at: float) -> float:
    """Unix time of the next begin of a window after `at`."""
    return min(_next_of(parse_window(w), at) for w in windows)


def said_opening(windows: Sequence[str], at: float) -> str:
    """The next opening for people, on the clock of its own zone: 'Mon 2026-11-30 09:00 Europe/Berlin'."""
    first = min((parse_window(w) for w in windows), key=lambda o: _next_of(o, at))
    local = datetime.fromtimestamp(_next_of(first, at), first.zone)
    return f"{DAYS[local.weekday()]} {local:%Y-%m-%d %H:%M} {first.zone.key}"


def _next_of(opening: Opening, at: float) -> float:
    local = datetime.fromtimestamp(at, opening.zone)
    for days in range(9):
        begin = opening.begins(local + timedelta(days=days))
        if begin.weekday() in opening.days and begin.timestamp() > at:
            return begin.timestamp()
    raise AssertionError("a weekly window opens within eight days")


def _days(text: str, given: str | None) -> frozenset[int]:
    if given is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in given.split(","):
        first, dash, last = part.partition("-")
        try:
            a = DAYS.index(first.capitalize())
            b = DAYS.index(last.capitalize()) if dash else a
        except ValueError:
            raise ValueError(f"windows: {text!r}: no day {part!r}; days are {', '.join(DAYS)}") from None
        found.update((a + i) % 7 for i in range((b - a) % 7 + 1))
    return frozenset(found)
