"""`rollout watch`: what is drawn at which width, countdowns, the guess of the end, lines into a pipe."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from contracts.metrics import MetricKind, MetricSpec
from contracts.rollout import Phase, RolloutSpec, RolloutStatus, Step
from serve.rollout import cli_watch, view
from serve.rollout.cli_stack import StackHandle
from serve.rollout.decide import initial
from serve.rollout.pace import pace
from serve.rollout.policy import make_spec
from serve.state.outbox import OutboxState
from serve.state.rollouts import AuditEntry
from tests.unit.rollout_world import T0, TEACHER, World, demo_policy, record


def drawn(world: World, look: view.Look, replicas: dict[str, list[str]] | None = None) -> str:
    """A world's rollout as a terminal shows it."""
    stored = world.rollouts.get(world.spec.id)
    live = view.Live(world.rollouts.audit(world.spec.id), replicas or {})
    console = Console(width=look.width, file=io.StringIO(), force_terminal=False)
    console.print(view.rollout_panel(stored, world.now, live, look))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def ramping(tmp_path: Path) -> World:
    """A rollout on its second step."""
    world = World(tmp_path, demo_policy(look_s=4.0))
    while world.status.step < 1:
        world.step()
    world.step(1.0)
    return world


def test_the_tree_has_both_arms_with_shares_and_replicas(ramping: World) -> None:
    """Stable and canary under the route, each with its replicas and its counts so far."""
    out = drawn(ramping, view.Look(140), {"student-v1": ["http://10.0.0.1:1", "http://10.0.0.2:1"]})
    counts = ramping.status.total_counts
    assert "├─ stable teacher" in out
    assert "└─ canary student-v1" in out
    assert out.count("http://10.0.0.") == 2
    assert str(TEACHER.url) in out
    assert "95 %" in out
    assert f"{counts['canary'].n:,}" in out
    assert "◉ 5 %" in out


def test_countdowns_are_what_the_rules_wait_for(ramping: World) -> None:
    """The next look, the dwell that is left, the samples that are missing: from status and policy."""
    stored = ramping.rollouts.get(ramping.spec.id)
    coming = view.upcoming(stored, view.Live(), ramping.now)
    status, step = stored.status, stored.spec.steps[1]
    assert coming[0] == f"look in {status.next_look_at - ramping.now:.0f} s"
    assert coming[1] == f"step lasts {step.min_dwell_s - (ramping.now - status.step_since):.0f} s more"
    assert coming[2] == f"0 of {step.min_samples} canary requests"
    assert coming[3] == "too few canary requests to tell"


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40])
def test_nothing_is_wider_than_the_terminal(ramping: World, width: int) -> None:
    """Narrow terminals lose columns, not legibility."""
    out = drawn(ramping, view.Look(width))
    assert max(len(line) for line in out.splitlines()) <= width
    assert "no worse" in out
    assert ("ttft p50" in out) == (width >= 96)
    assert ("roll back" in out) == (width >= 64)
    assert "RAMPING" in out


def test_a_terminal_without_unicode_gets_ascii(ramping: World) -> None:
    """Every sign has an ASCII form, whatever a reason quotes."""
    assert drawn(ramping, view.Look(110, ascii=True)).isascii()
    look = view.look_of(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), width=77))
    assert (look.width, look.ascii) == (77, True)
    assert look.plain("pending → ok ✔") == "pending -> ok ?"


def test_a_pipe_gets_a_line_for_every_change(
    ramping: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No cursor movements in a log: one line a change of phase, step or weight, at last the picture."""
    no_registry: Any = None
    stack = StackHandle(ramping.rollouts, ramping.traffic, OutboxState(ramping.engine), {}, no_registry)
    monkeypatch.setattr(cli_watch, "open_stack", lambda config: stack)
    monkeypatch.setattr(cli_watch, "console", Console(width=120, force_terminal=False, no_color=True))
    monkeypatch.setattr(cli_watch.time, "sleep", lambda seconds: ramping.step())
    cli_watch.watch("support", interval=1.0)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " support student:1 " in line]
    weights = ["5 %", "10 %", "25 %", "50 %", "100 %"]
    assert [w for w in weights if any(f" {w} step" in line for line in lines)] == weights
    assert "promoted" in lines[-1]
    assert "\x1b" not in out
    assert "✔ PROMOTED" in out


def look_at(spec: RolloutSpec, at: float, stable: int, canary: int, logs: dict[str, float]) -> AuditEntry:
    """A look as the audit trail has it, as far as a pace needs it."""
    body = {
        "counts": {"stable": {"n": stable}, "canary": {"n": canary}},
        "metrics": [{"metric": name, "log_noninferior": value} for name, value in logs.items()],
    }
    return AuditEntry(rollout_id=spec.id, tick=1, at=at, kind="look", body=body)


Steady = tuple[RolloutSpec, RolloutStatus, list[AuditEntry]]


def steady(errors: float, at_step: int = 1) -> Steady:
    """10 requests a second, 10 % canary, evidence of 0.01 a canary request; two steps of 10 and 50 %."""
    policy = demo_policy(
        steps=(Step(weight=0.1, min_dwell_s=60), Step(weight=0.5, min_samples=100, min_dwell_s=60)),
        metrics=(MetricSpec(kind=MetricKind.ERRORS, margin=0.03),),
        look_s=10.0,
    )
    spec = make_spec(policy, "support", record(), now=T0)
    begun = initial(spec)
    metric = begun.metrics[0].model_copy(update={"log_noninferior": errors})
    values = {"phase": Phase.RAMPING, "step": at_step, "step_since": T0, "metrics": (metric,)}
    trail = [
        look_at(spec, T0, 0, 0, {"errors": errors - 1.0}),
        look_at(spec, T0 + 100, 900, 100, {"errors": errors}),
    ]
    return spec, begun.model_copy(update=values), trail


def test_the_pace_is_missing_evidence_over_its_growth() -> None:
    """ln 20 from 0.5, at 0.01 a request and 5 canary requests a second: 49.9 s, at looks every 10 s: 50 s."""
    spec, status, trail = steady(0.5)
    found = pace(spec, status, trail, T0 + 100)
    assert (math.log(20) - 0.5) / (0.01 * 5) == pytest.approx(49.9, abs=0.05)
    assert (found.seconds, found.said) == (50.0, "errors")


def test_the_pace_counts_dwell_and_samples_of_every_step_left() -> None:
    """Enough evidence already: what is left of this step's dwell, then the whole of the next one's."""
    spec, status, trail = steady(5.0, at_step=0)
    assert pace(spec, status, trail, T0 + 25).seconds == 40 + 60
    late = status.model_copy(update={"step": 1, "step_since": T0})
    assert pace(spec, late, trail, T0 + 200).seconds == 20  # 100 requests at 5 a second


def test_there_is_no_pace_without_growth() -> None:
    """Evidence that falls has no end to guess; nor has a paused rollout, nor one without traffic."""
    spec, status, trail = steady(0.5)
    falling = [trail[0], look_at(spec, T0 + 100, 900, 100, {"errors": -3.0})]
    assert pace(spec, status, falling, T0 + 100).said == "evidence on errors does not grow"
    assert pace(spec, status, trail[:1], T0).said == "too few canary requests to tell"
    paused = status.model_copy(update={"phase": Phase.PAUSED})
    assert pace(spec, paused, trail, T0 + 100).seconds is None
