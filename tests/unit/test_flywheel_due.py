"""What starts a distillation, and what holds it back: schedules, cooldown, quiet hours, triggers."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from contracts.config import load_config, parse_config
from contracts.errors import ConfigError
from distill_jobs.flywheel.cli import app
from distill_jobs.flywheel.config import FlywheelConfig, RouteConfig
from distill_jobs.flywheel.drift import Look
from distill_jobs.flywheel.due import HOUR_S, Decision, Observation, RouteState, cooldown_s, due
from distill_jobs.flywheel.job import resolve
from distill_jobs.flywheel.schedule import is_due, parse_hours, parse_schedule, quiet_until

ROOT = Path(__file__).resolve().parents[2]
UTC, BERLIN = ZoneInfo("UTC"), ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = UTC) -> float:
    """Unix seconds of a local time."""
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


NOW = at("2026-11-26T12:00")  # a Thursday


def route(**changes: Any) -> RouteConfig:
    """A route that distils after 1,000 rows, at least 200 of them, six hours apart."""
    return parse_config({"distill": "d.yaml", "triggers": {"rows": 1000}} | changes, RouteConfig)


def decide(
    config: RouteConfig, seen: Observation, now: float = NOW, zone: ZoneInfo = UTC, **state: Any
) -> Decision:
    """The decision about a route that is watched since the epoch."""
    return due(config, RouteState(watching_since=0.0, **state), seen, now, zone)


@pytest.mark.parametrize(
    ("text", "since", "now", "expected"),
    [
        ("every 6h", "2026-11-26T06:00", "2026-11-26T12:00", True),
        ("every 6h", "2026-11-26T06:01", "2026-11-26T12:00", False),
        ("every 30m", "2026-11-26T11:30", "2026-11-26T12:00", True),
        ("every 2d", "2026-11-24T12:00", "2026-11-26T12:00", True),
        ("03:00 daily", "2026-11-25T04:00", "2026-11-26T02:59", False),
        ("03:00 daily", "2026-11-25T04:00", "2026-11-26T03:00", True),
        ("03:00 daily", "2026-11-26T03:00", "2026-11-26T12:00", False),
        ("03:00 mon,thu", "2026-11-23T03:00", "2026-11-25T23:59", False),
        ("03:00 mon,thu", "2026-11-23T03:00", "2026-11-26T03:00", True),
    ],
)
def test_a_schedule_is_due_once_for_each_of_its_instants(
    text: str, since: str, now: str, expected: bool
) -> None:
    """An instant counts from its very second, and only when it lies after the last run."""
    assert is_due(parse_schedule(text), at(since), at(now), UTC) is expected


def test_a_time_of_day_is_the_zones_across_a_clock_change() -> None:
    """03:00 in Berlin is 01:00 UTC in summer and 02:00 in winter; 02:30 is left out on 28 March 2027 and
    happens once, and on 25 October 2026, when it comes twice, the first counts.
    """
    daily = parse_schedule("03:00 daily")
    assert is_due(daily, at("2026-07-01T00:00"), at("2026-07-01T01:00"), BERLIN)
    assert not is_due(daily, at("2026-12-01T00:00"), at("2026-12-01T01:59"), BERLIN)
    assert is_due(daily, at("2026-12-01T00:00"), at("2026-12-01T02:00"), BERLIN)
    left_out = parse_schedule("02:30 daily")
    assert is_due(left_out, at("2027-03-28T00:00", BERLIN), at("2027-03-28T03:31", BERLIN), BERLIN)
    first = at("2026-10-25T00:30")  # 02:30 CEST
    assert is_due(left_out, first - 1, first, BERLIN)
    assert not is_due(left_out, first, first + HOUR_S, BERLIN)


@pytest.mark.parametrize("text", ["", "6h", "every 0h", "25:00 daily", "03:00", "03:00 moon", "3:00 daily"])
def test_what_is_no_schedule_is_refused_with_the_forms(text: str) -> None:
    """A schedule that would never run is found when the file is read, and the message shows how to write
    one."""
    with pytest.raises(ConfigError, match=r"triggers.schedule: .*(03:00 daily|HH:MM)"):
        route(triggers={"schedule": text})


def test_quiet_hours_may_cross_midnight() -> None:
    """A span holds its start and not its end; the end is told."""
    assert quiet_until(["09:00-18:00"], at("2026-11-26T09:00"), UTC) == "18:00"
    assert quiet_until(["09:00-18:00"], at("2026-11-26T18:00"), UTC) is None
    night = ["22:00-02:00"]
    assert quiet_until(night, at("2026-11-26T23:00"), UTC) == "02:00"
    assert quiet_until(night, at("2026-11-26T01:59"), UTC) == "02:00"
    assert quiet_until(night, at("2026-11-26T02:00"), UTC) is None
    with pytest.raises(ValueError, match="no span"):
        parse_hours("09:00")


def test_rows_start_a_run_at_their_bound() -> None:
    """One row less does nothing."""
    assert decide(route(), Observation(rows=999)).start is False
    found = decide(route(), Observation(rows=1000))
    assert (found.start, found.trigger) == (True, "rows")
    assert found.reason == "1000 usable rows since the last run (bound 1000)"


def test_nothing_configured_starts_nothing_by_itself() -> None:
    """Without triggers a route is a person's only."""
    assert decide(route(triggers={}), Observation(rows=10**9)).start is False


def test_drift_and_feedback_start_a_run_and_say_their_evidence() -> None:
    """A look that fired is named with its figures; one that did not fire starts nothing."""
    look = Look(kind="words", value=0.3, bound=0.02, p=0.001, alpha=0.005, reference=500, recent=400)
    found = decide(route(), Observation(rows=300, looks=(look,)))
    assert (found.start, found.trigger) == (True, "drift")
    assert "words diverge by 0.300 bits (bound 0.02, p 0.001" in found.reason
    quiet = look.model_copy(update={"p": 0.01})
    assert decide(route(), Observation(rows=300, looks=(quiet,))).trigger is None
    small = look.model_copy(update={"value": 0.01})
    assert decide(route(), Observation(rows=300, looks=(small,))).trigger is None
    grades = look.model_copy(update={"kind": "grades"})
    assert decide(route(), Observation(rows=300, looks=(grades,))).trigger == "grades"
    said = Look(kind="feedback", value=0.3, bound=0.2, p=0.05, alpha=0.05, reference=40, recent=100)
    assert decide(route(), Observation(rows=300, looks=(said,))).trigger == "feedback"


def test_too_few_new_rows_hold_every_trigger_back() -> None:
    """Drift found among few rows waits for the rows, and says so."""
    look = Look(kind="words", value=0.3, bound=0.02, p=0.001, alpha=0.005, reference=500, recent=400)
    found = decide(route(), Observation(rows=199, looks=(look,)))
    assert (found.start, found.trigger) == (False, "drift")
    assert found.waits == ("199 new rows, min_rows is 200",)


def test_cooldown_is_counted_from_the_end_and_doubles_with_failures() -> None:
    """Six hours after a run; after failures 12, 24, …, a week at most, so that a broken route does not eat
    the budget.
    """
    seen = Observation(rows=5000)
    assert not decide(route(), seen, last_ended_at=NOW - 6 * HOUR_S + 1).start
    assert decide(route(), seen, last_ended_at=NOW - 6 * HOUR_S).start
    assert not decide(route(), seen, last_ended_at=NOW - 12 * HOUR_S + 1, failures=1).start
    assert [cooldown_s(route(), n) / HOUR_S for n in (0, 1, 2, 3, 9, 10_000)] == [6, 12, 24, 48, 168, 168]


def test_a_schedule_counts_from_the_last_run_or_from_when_watching_began() -> None:
    """A flywheel that is started at noon does not make up for this night's 03:00."""
    config = route(triggers={"schedule": "03:00 daily"}, min_rows=0)
    fresh = RouteState(watching_since=NOW)
    assert not due(config, fresh, Observation(), NOW + 15 * HOUR_S - 1, UTC).start
    assert due(config, fresh, Observation(), NOW + 15 * HOUR_S, UTC).start
    ran = RouteState(watching_since=NOW, last_queued_at=NOW + 15 * HOUR_S)
    assert not due(config, ran, Observation(), NOW + 20 * HOUR_S, UTC).start


def test_quiet_hours_and_pause_hold_a_run_back_and_are_told() -> None:
    """Everything that stands in the way is said at once."""
    config = route(quiet_hours=["09:00-18:00"])
    found = decide(config, Observation(rows=5000), paused=True)
    assert not found.start
    assert found.waits == ("the route is paused", "quiet hours until 18:00")


def test_a_person_waits_for_nothing_but_a_run_that_is_active() -> None:
    """`trigger` overrules rows, cooldown and quiet hours; never one run a route."""
    config = route(quiet_hours=["09:00-18:00"])
    found = decide(config, Observation(), requested_by="ann", last_ended_at=NOW)
    assert (found.start, found.trigger, found.reason) == (True, "manual", "asked for by ann")
    assert not decide(config, Observation(), requested_by="ann", active=True).start
    assert not decide(route(), Observation(rows=9999), active=True).start


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("flywheel*.yaml")), ids=lambda f: f.name)
def test_every_configuration_here_is_valid(file: Path) -> None:
    """And the distillation that each of its routes names is one."""
    config = load_config(file, FlywheelConfig)
    for name, route in config.routes.items():
        distill = route.model_copy(update={"distill": ROOT / route.distill})
        assert resolve(name, distill).collect.route == name


def test_the_guides_examples_are_valid() -> None:
    """A stale key in the guide would break a reader's first file; its commands are ones that there are."""
    text = (ROOT / "docs" / "flywheel.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    parse_config(yaml.safe_load(example), FlywheelConfig)
    said = set(re.findall(r"stillhouse flywheel (\w+)", text))
    assert said == {command.callback.__name__ for command in app.registered_commands if command.callback}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routes": {}}, "routes"),
        ({"routes": {"a/b": {"distill": "d", "triggers": {}}}}, "cannot be routes"),
        ({"timezone": "Mars/Olympus"}, "timezone: .*not a time zone"),
        ({"poll_s": 0}, "poll_s"),
        ({"pressure": {"metrics_url": "localhost:1"}}, "metrics_url"),
        ({"surprise": 1}, "unknown key"),
    ],
)
def test_a_wrong_configuration_names_its_field(changes: dict[str, Any], message: str) -> None:
    """What would fail at night is refused when the file is read."""
    good = {"dir": "runs/f", "routes": {"support": {"distill": "d.yaml", "triggers": {}}}}
    parse_config(good, FlywheelConfig)
    with pytest.raises(ConfigError, match=message):
        parse_config(good | changes, FlywheelConfig)
