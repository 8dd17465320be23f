"""The plan before a rollout: what the request log says, and what the shipped rules would make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from contracts.errors import ConfigError, DataError, NotFoundError
from contracts.metrics import GRADE, LATENCY_BUCKETS_S, ArmCounts, MetricKind, MetricSpec, pass_fail
from contracts.rollout import RolloutSpec, Step
from contracts.traffic import Upstream
from serve.rollout import cli, cli_plan
from serve.rollout.cli_stack import StackHandle
from serve.rollout.plan import Traffic, expected, make_plan, read_traffic
from serve.state.outbox import OutboxState
from tests.unit.rollout_world import World, demo_policy

NOW = 1_790_000_000.0
ERRORS = MetricSpec(kind=MetricKind.ERRORS, margin=0.02)
RAMP = (Step(weight=0.05, min_samples=20), Step(weight=0.5, min_samples=50))


def row(**changes: Any) -> dict[str, Any]:
    """What the plan reads of a request-log row."""
    plain = {
        "ts": NOW - 60,
        "route": "support",
        "arm": "stable",
        "outcome": "ok",
        "ttft_s": 0.09,
        "e2e_s": 0.5,
    }
    grade = changes.pop("grade", None)
    scores = {} if grade is None else {GRADE: float(grade)}
    return {**plain, "scores": scores, **changes}


def write(folder: Path, rows: list[dict[str, Any]], name: str = "requests-1.jsonl") -> None:
    """A segment."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def spec(*metrics: MetricSpec, **changes: Any) -> RolloutSpec:
    """A rollout to plan."""
    fields: dict[str, Any] = {
        "id": "plan",
        "route": "support",
        "model_ref": "student:1",
        "candidate": Upstream(name="s", model="s", url="http://s"),
        "created_at": 0.0,
        "steps": RAMP,
        "metrics": metrics or (ERRORS,),
        **changes,
    }
    return RolloutSpec(**fields)


def test_the_log_is_counted_as_the_ledger_counts(tmp_path: Path) -> None:
    """Errors, latencies of answered requests, grades; nobody's fault, other arms and routes do not count."""
    write(
        tmp_path,
        [
            row(grade=True),
            row(grade=False, ttft_s=0.11),
            row(outcome="timeout"),
            row(outcome="client_closed"),
            row(arm="canary"),
            row(arm="shadow"),
            row(route="other"),
        ],
    )
    seen = read_traffic(tmp_path, "support", NOW)
    assert (seen.counts.n, seen.counts.errors) == (3, 1)
    assert seen.counts.scores == {GRADE: pass_fail(1, 1)}
    assert seen.counts.ttft[LATENCY_BUCKETS_S.index(0.1)] == 1
    assert seen.counts.ttft[LATENCY_BUCKETS_S.index(0.15)] == 1
    assert sum(seen.counts.e2e) == 2


def test_requests_a_minute_are_counted_up_to_now(tmp_path: Path) -> None:
    """A route that fell silent half an hour ago has little traffic, however busy it was before."""
    write(tmp_path, [row(ts=NOW - 3600 + i) for i in range(120)])
    assert read_traffic(tmp_path, "support", NOW).per_minute == pytest.approx(2.0)


def test_a_torn_last_line_and_old_rows_are_left_out(tmp_path: Path) -> None:
    """The open segment is being written while it is read."""
    write(tmp_path, [row(ts=NOW - 100_000), row()], "requests-2.open.jsonl")
    with (tmp_path / "requests-2.open.jsonl").open("a") as file:
        file.write('{"ts": 17900')
    assert read_traffic(tmp_path, "support", NOW).counts.n == 1


def test_a_log_without_the_route_says_what_to_do(tmp_path: Path) -> None:
    """No traffic seen is not zero traffic planned."""
    write(tmp_path, [row(route="other")])
    with pytest.raises(DataError, match=r"no row of route 'support' in the last 24 h.*--per-minute"):
        read_traffic(tmp_path, "support", NOW)


@pytest.mark.parametrize(
    ("per_minute", "errors"), [(0.0, 0.01), (-1.0, 0.01), (float("inf"), 0.01), (9.0, 1.0)]
)
def test_impossible_expectations_are_refused(per_minute: float, errors: float) -> None:
    """The message names both options."""
    with pytest.raises(ConfigError, match="--per-minute must be positive and --errors a share"):
        expected(per_minute, errors)


def test_the_plan_finds_what_it_would_catch() -> None:
    """Equal students are promoted; the larger the difference, the more are thrown back, and sooner."""
    made = make_plan(spec(), expected(600, 0.01), minutes=60, runs=30)
    assert made.promoted >= 0.9
    assert made.rolled_back <= 0.1
    assert made.median_min is not None
    assert made.p90_min is None or made.p90_min >= made.median_min
    (errors,) = made.metrics
    assert errors.base == pytest.approx(0.01)
    shares = [c.rolled_back for c in errors.tried]
    assert shares[-1] == 1.0
    assert shares[0] < shares[-1]
    assert errors.detectable in [c.excess for c in errors.tried]
    assert next(c.promoted for c in errors.tried if c.excess == errors.detectable) <= 0.1


def test_more_traffic_is_faster() -> None:
    """Evidence is requests, not time: ten times the traffic promotes sooner."""
    slow, fast = (make_plan(spec(), expected(rate, 0.01), 60, 20).median_min for rate in (400, 4000))
    assert slow is not None
    assert fast is not None
    assert fast < slow


def test_every_kind_of_metric_is_made_worse_in_its_own_way() -> None:
    """Latency above its threshold, failed grades, lower scores: each is caught when it is large."""
    counts = ArmCounts(
        n=1000,
        errors=10,
        ttft=tuple(990 if e == 0.1 else 0 for e in (*LATENCY_BUCKETS_S, 99.0)),
        scores={GRADE: pass_fail(900, 90)},
    )
    of = spec(
        MetricSpec(kind=MetricKind.TTFT, margin=0.1, thresholds_s=(0.4,)),
        MetricSpec(kind=MetricKind.QUALITY, margin=0.1),
        MetricSpec(kind=MetricKind.SCORE, margin=0.1),
    )
    made = make_plan(of, Traffic(per_minute=600, counts=counts, source="test"), 60, 20)
    assert [m.metric for m in made.metrics] == ["ttft", "quality", "score"]
    assert [round(m.base, 3) for m in made.metrics] == [0.0, 0.091, 0.909]
    assert all(m.detectable is not None and m.detectable <= 0.5 for m in made.metrics)


def test_metrics_without_data_are_named_and_left_out() -> None:
    """The rollout would wait for a grader for ever; the plan says so and goes on without it."""
    made = make_plan(
        spec(ERRORS, MetricSpec(kind=MetricKind.QUALITY, margin=0.05)), expected(600, 0.01), 30, 20
    )
    assert made.unknown == ("quality",)
    assert [m.metric for m in made.metrics] == ["errors"]
    with pytest.raises(ConfigError, match=r"nothing is known about any metric of the policy \(quality\)"):
        make_plan(spec(MetricSpec(kind=MetricKind.QUALITY, margin=0.05)), expected(600, 0.01), 30, 20)


def test_a_silent_first_step_is_foreseen() -> None:
    """One request an hour at 1 %: the no-data deadline would throw it back, and the plan says it before."""
    of = spec(steps=(Step(weight=0.01, min_samples=20),), no_data_deadline_s=600.0)
    made = make_plan(of, expected(1, 0.01), minutes=60, runs=20)
    assert made.silent > 0.9
    assert any("no request before no_data_deadline_s" in line for line in cli_plan.sentences(made))


def test_the_same_seed_gives_the_same_plan() -> None:
    """A plan can be repeated."""
    one, two = (make_plan(spec(), expected(300, 0.01), 30, 20, seed=7) for _ in range(2))
    assert one == two


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands bound to a world with a split and a request log."""
    world = World(tmp_path)
    folder = tmp_path / "requests"
    handle = StackHandle(
        world.rollouts,
        world.traffic,
        OutboxState(world.engine),
        {"demo": demo_policy()},
        lambda: pytest.fail("not needed"),
        request_log=folder,
    )
    monkeypatch.setattr(cli_plan, "open_stack", lambda config: handle)
    return folder


def test_the_command_reads_the_log_and_prints_json(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines: the whole plan; nothing is started by it."""
    write(desk, [row(ts=NOW - 600 + i / 2, grade=True) for i in range(1200)])
    monkeypatch.setattr(cli_plan.time, "time", lambda: NOW)
    result = CliRunner().invoke(cli.app, ["plan", "support", "--json", "--runs", "20", "--minutes", "1"])
    assert result.exception is None, result.output
    made = json.loads(result.output)
    assert made["traffic"]["per_minute"] == pytest.approx(120.0)
    assert made["runs"] == 20
    assert {m["metric"] for m in made["metrics"]} == {"errors", "ttft", "e2e", "quality"}


def test_the_command_refuses_unknown_routes_and_missing_logs(desk: Path) -> None:
    """Each says what there is, or what to give instead."""
    unknown = CliRunner().invoke(cli.app, ["plan", "billing"])
    assert isinstance(unknown.exception, NotFoundError)
    assert "there are: support" in str(unknown.exception)
    missing = CliRunner().invoke(cli.app, ["plan", "support"])
    assert isinstance(missing.exception, ConfigError)
    assert "--per-minute" in str(missing.exception)


def test_the_command_tells_people(desk: Path) -> None:
    """Expected traffic instead of a log; the answer is in sentences and a table."""
    args = ["plan", "support", "--per-minute", "600", "--errors", "0.02", "--runs", "20", "--minutes", "1"]
    result = CliRunner().invoke(cli.app, args)
    assert result.exception is None, result.output
    said = " ".join(result.output.split())
    assert "600 requests a minute (as said)" in said
    assert "Nothing is known about" in said
    assert "detectable" in said
