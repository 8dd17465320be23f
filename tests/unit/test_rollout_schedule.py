"""Windows in which a rollout may move forward."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.rollout.schedule import is_open, next_opening, parse_window, said_opening

OFFICE = ("Mon-Fri 09:00-17:00 Europe/Berlin",)


def at(text: str, zone: str = "Europe/Berlin") -> float:
    """Unix time of a local one."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("when", "open_"),
    [
        ("2026-11-26T08:59:59", False),
        ("2026-11-26T09:00:00", True),
        ("2026-11-26T16:59:59", True),
        ("2026-11-26T17:00:00", False),
        ("2026-11-28T12:00:00", False),  # Saturday
    ],
)
def test_a_window_is_open_from_its_begin_to_just_before_its_end(when: str, open_: bool) -> None:
    """Local time of the named zone, weekdays only."""
    assert is_open(OFFICE, at(when)) is open_


def test_daylight_saving_moves_the_window_with_the_people() -> None:
    """09:00 in Berlin is 08:00 UTC in winter and 07:00 UTC in summer."""
    assert is_open(OFFICE, at("2026-01-15T08:00:00", "UTC"))
    assert not is_open(OFFICE, at("2026-01-15T07:30:00", "UTC"))
    assert is_open(OFFICE, at("2026-07-15T07:30:00", "UTC"))


def test_a_night_window_belongs_to_the_day_it_begins_on() -> None:
    """Friday 22:00 to 06:00 covers Saturday morning and not Friday morning."""
    night = ("Fri 22:00-06:00",)
    assert is_open(night, at("2026-11-28T05:59:00", "UTC"))
    assert not is_open(night, at("2026-11-27T05:59:00", "UTC"))
    assert not is_open(night, at("2026-11-28T06:00:00", "UTC"))


def test_the_next_opening_is_the_first_of_several() -> None:
    """Friday evening: Monday in Berlin, unless a weekend window opens before; said on its own clock."""
    friday = at("2026-11-27T18:00:00")
    assert next_opening(OFFICE, friday) == at("2026-11-30T09:00:00")
    assert said_opening(OFFICE, friday) == "Mon 2026-11-30 09:00 Europe/Berlin"
    both = (*OFFICE, "Sat,Sun 10:00-11:00 America/New_York")
    assert said_opening(both, friday) == "Sat 2026-11-28 10:00 America/New_York"


def test_without_windows_it_is_always_open() -> None:
    """No schedule holds nothing."""
    assert is_open((), 0.0)


def test_days_wrap_around_the_week_and_zone_and_days_may_be_left_out() -> None:
    """Sat-Mon is three days; '08:00-09:00' is every day in UTC."""
    assert parse_window("Sat-Mon 00:00-23:59").days == {5, 6, 0}
    plain = parse_window("08:00-09:00")
    assert (len(plain.days), plain.zone.key) == (7, "UTC")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("", "cannot be read"),
        ("Mon-Fri", "cannot be read"),
        ("Mon 9-17", "cannot be read"),
        ("Mon 09:00-25:00", "hour must be in 0..23"),
        ("Moon 09:00-17:00", "no day 'Moon'"),
        ("Mon 09:00-17:00 Europe/Atlantis", "Atlantis"),
        ("Mon 09:00-17:00 ../../etc/passwd", "write 'Mon-Fri 09:00-17:00 Europe/Berlin'"),
    ],
)
def test_a_window_that_cannot_be_read_says_how_it_is_written(wrong: str, says: str) -> None:
    """Typos fail when the policy is read, never while a rollout waits."""
    with pytest.raises(ValueError, match="windows") as err:
        parse_window(wrong)
    assert says in str(err.value)


@given(st.floats(1.7e9, 1.9e9), st.sampled_from([*OFFICE, "Fri 22:00-06:00", "01:30-04:00 Europe/Berlin"]))
def test_the_next_opening_is_open_and_lies_ahead(now: float, window: str) -> None:
    """Whatever the time: the promised moment is later than now and inside the window."""
    found = next_opening((window,), now)
    assert found > now
    assert is_open((window,), found)
