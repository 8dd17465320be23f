"""Times of day: "every 6h", "03:00 daily", "03:00 mon,thu", and spans in which nothing starts.

Pure, over Unix seconds and a time zone. A time that a clock change leaves out happens as much later, one that
happens twice counts the first time. Knows nothing about what is scheduled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_EVERY = re.compile(r"^every (\d{1,4}) ?(m|h|d)$")
_AT = re.compile(r"^(\d{2}:\d{2}) (daily|(?:[a-z]{3})(?:,[a-z]{3})*)$")
_UNIT_S = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_WEEK = 7


@dataclass(frozen=True)
class Schedule:
    """Either an interval in seconds, or a time of day on some weekdays (Monday is 0)."""

    every_s: float | None = None
    at: time | None = None
    days: frozenset[int] = frozenset()


def parse_schedule(text: str) -> Schedule:
    """Raises: ValueError with the forms."""
    if (found := _EVERY.match(text.strip())) and int(found[1]) > 0:
        return Schedule(every_s=int(found[1]) * _UNIT_S[found[2]])
    if found := _AT.match(text.strip()):
        names = _DAYS if found[2] == "daily" else tuple(found[2].split(","))
        if set(names) <= set(_DAYS):
            return Schedule(at=_time(found[1]), days=frozenset(_DAYS.index(n) for n in names))
    raise ValueError(
        f"{text!r} is no schedule; write 'every 6h', 'every 30m', '03:00 daily' or '03:00 mon,thu'"
    )


def parse_hours(text: str) -> tuple[time, time]:
    """A span of the day, over midnight when it ends before it begins. Raises: ValueError with the form."""
    start, dash, end = text.partition("-")
    if not dash or start == end:
        raise ValueError(f"{text!r} is no span of the day; write e.g. '09:00-18:00'")
    return _time(start), _time(end)


def latest(schedule: Schedule, now: float, zone: ZoneInfo) -> float | None:
    """The last scheduled instant at or before `now`; None for an interval, which has no fixed instants."""
    if schedule.at is None:
        return None
    today = datetime.fromtimestamp(now, zone).date()
    for back in range(_WEEK + 1):
        day = today - timedelta(days=back)
        at = datetime.combine(day, schedule.at, zone).timestamp()
        if day.weekday() in schedule.days and at <= now:
            return at
    return None


def is_due(schedule: Schedule, since: float, now: float, zone: ZoneInfo) -> bool:
    """True when a scheduled instant lies in (since, now]; an interval counts from `since`."""
    if schedule.every_s is not None:
        return now - since >= schedule.every_s
    at = latest(schedule, now, zone)
    return at is not None and at > since


def quiet_until(spans: Iterable[str], now: float, zone: ZoneInfo) -> str | None:
    """The end, as HH:MM, of a quiet span that holds `now`; None outside. Spans hold their start, not their
    end.
    """
    clock = datetime.fromtimestamp(now, zone).time()
    for start, end in map(parse_hours, spans):
        inside = start <= clock < end if start < end else clock >= start or clock < end
        if inside:
            return end.strftime("%H:%M")
    return None


def _time(text: str) -> time:
    try:
        return time.fromisoformat(text)
    except ValueError as err:
        raise ValueError(f"{text!r} is no time of day; write HH:MM, e.g. 03:00") from err
