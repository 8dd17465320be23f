"""`stillhouse rollout …` against a real state store and a fake registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contracts.errors import ConflictError, GateError, NotFoundError
from contracts.model import ModelRecord
from contracts.rollout import Phase
from registry.digest import digest_folder
from registry.fake import FakeRegistry
from serve.rollout import cli
from serve.rollout.aliases import promoted_hook, rolled_back_hook
from serve.rollout.cli_stack import StackHandle
from serve.rollout.start import start_rollout
from serve.state.outbox import OutboxState
from tests.unit.rollout_world import BROKEN, World, demo_policy, record

runner = CliRunner()


class Desk:
    """A world, a registry with one model, and the commands bound to both."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **world: object) -> None:
        self.world = World(folder, **world)  # type: ignore[arg-type]
        self.registry = FakeRegistry()
        self.folder = folder
        handle = StackHandle(
            self.world.rollouts,
            self.world.traffic,
            OutboxState(self.world.engine),
            {"demo": demo_policy(cooldown_s=0.0)},
            lambda: self.registry,
        )
        monkeypatch.setattr(cli, "open_stack", lambda config: handle)
        monkeypatch.setattr(cli.console, "_width", 140)

    def publish(self, passed: bool = True, overridden_by: str | None = None, text: str = "w") -> ModelRecord:
        """Put a model into the registry."""
        files = self.folder / f"model-{text}"
        files.mkdir()
        (files / "weights").write_text(text)
        made = record(passed=passed, overridden_by=overridden_by).model_copy(update={"version": None})
        artifact = made.artifact.model_copy(update={"digest": digest_folder(files)})
        return self.registry.publish(made.model_copy(update={"artifact": artifact}), files)

    def end_first(self) -> None:
        """Get the world's own rollout out of the way."""
        self.world.ask("abort")
        self.world.until(Phase.ABORTED)

    def run(self, *args: str) -> str:
        """Run a command; its error propagates as the CLI's main would see it."""
        result = runner.invoke(cli.app, list(args))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk with a healthy rollout that has not begun."""
    return Desk(tmp_path, monkeypatch)


def test_start_creates_a_rollout_of_the_named_model(desk: Desk) -> None:
    """The controller finds a pending rollout with the registry's digest, and the alias says challenger."""
    desk.end_first()
    made = desk.publish()
    out = desk.run("start", "support", "student:1", "--reason", "smaller")
    assert "Ramp 1 → 5 → 10 → 25 → 50 → 100 %" in out
    (stored,) = desk.world.rollouts.active("support")
    assert (stored.spec.digest, stored.status.phase) == (made.artifact.digest, Phase.PENDING)
    assert stored.spec.artifact_uri == made.artifact.uri
    assert "(smaller)" in stored.spec.created_by
    assert desk.registry.aliases("student") == {"challenger": 1}


def test_start_is_refused_while_one_is_active(desk: Desk) -> None:
    """One active rollout a route; the message names the commands that help."""
    desk.publish()
    with pytest.raises(ConflictError, match="already has an active rollout"):
        desk.run("start", "support", "student:1")


def test_start_is_refused_for_unknown_routes_and_models(desk: Desk) -> None:
    """The messages list what there is."""
    desk.publish()
    with pytest.raises(NotFoundError, match="no route 'billing'; there are: support"):
        desk.run("start", "billing", "student:1")
    with pytest.raises(NotFoundError, match="nobody"):
        desk.run("start", "support", "nobody:1")


def test_a_failed_gate_needs_a_named_override(desk: Desk) -> None:
    """No silent way from a failed offline gate into live traffic."""
    desk.end_first()
    desk.publish(passed=False)
    with pytest.raises(GateError, match=r"accuracy = 0\.5 is below 0\.9"):
        desk.run("start", "support", "student:1")
    desk.publish(passed=False, overridden_by="demo: on purpose", text="x")
    assert "accepted" in desk.run("start", "support", "student:2")


def test_a_quarantined_digest_needs_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was thrown back is not tried again by accident; the refusal says why it was thrown back."""
    desk = Desk(tmp_path, monkeypatch, canary=BROKEN)
    desk.end_first()
    desk.publish()
    desk.run("start", "support", "student:1")
    desk.world.spec = desk.world.rollouts.active("support")[0].spec
    desk.world.until(Phase.ROLLED_BACK)
    with pytest.raises(ConflictError, match=r"quarantined because .* harm e-value"):
        desk.run("start", "support", "student:1")
    assert "accepted" in desk.run("start", "support", "student:1", "--force-quarantined")


def test_status_tells_the_story_and_json_the_numbers(desk: Desk) -> None:
    """Text for people: phase, ladder, counts, tests, reason; JSON for machines, without inner state."""
    desk.world.until(Phase.RAMPING)
    for _ in range(5):
        desk.world.step()
    out = desk.run("status", "support")
    for said in ("student:1", "◉ 1 %", "○ 100 %", "quality margin 6 pp", "graded", "why"):
        assert said in out
    (one,) = json.loads(desk.run("status", "--json"))
    assert one["status"]["weight"] == 0.01
    assert one["thresholds"]["log_promote"] == pytest.approx(2.9957, abs=1e-4)
    assert all("state" not in m for m in one["status"]["metrics"])


def test_status_without_a_rollout_says_so(desk: Desk) -> None:
    """Unknown routes list the known ones; a route whose rollout ended shows how."""
    with pytest.raises(NotFoundError, match="never had a rollout; routes: support"):
        desk.run("status", "billing")
    desk.end_first()
    assert "ABORTED" in desk.run("status", "support")
    assert "No active rollout" in desk.run("status")


def test_watch_returns_when_the_rollout_is_over(desk: Desk) -> None:
    """It draws until the terminal phase; here it is over already."""
    desk.world.until(Phase.PROMOTED)
    assert "PROMOTED" in desk.run("watch", "support")


def test_commands_reach_the_controller(desk: Desk) -> None:
    """pause, resume and abort with their reasons, as the audit repeats them."""
    desk.world.until(Phase.RAMPING)
    for verb, phase in (("pause", Phase.PAUSED), ("resume", Phase.RAMPING), ("abort", Phase.ROLLING_BACK)):
        assert "next tick" in desk.run(verb, "support", "--reason", "because")
        desk.world.step()
        assert desk.world.status.phase in (phase, Phase.HELD, Phase.ABORTED)
        assert (
            desk.world.status.phase is Phase.ABORTED
            or "because" in desk.world.status.reason
            or verb == "resume"
        )


def test_commands_that_cannot_work_are_refused_at_once(desk: Desk) -> None:
    """A person learns it now, not from an audit later."""
    with pytest.raises(ConflictError, match="promote is not possible: the rollout is pending"):
        desk.run("promote", "support")
    with pytest.raises(ConflictError, match="resume is not possible"):
        desk.run("resume", "support")
    with pytest.raises(NotFoundError, match="no active rollout"):
        desk.run("abort", "billing")


def test_history_lists_and_details(desk: Desk) -> None:
    """One line each; --id shows what moved and why; --json has the whole audit."""
    desk.world.until(Phase.PROMOTED)
    assert "promoted" in desk.run("history")
    detail = desk.run("history", "--id", desk.world.spec.id)
    assert "pending → warming" in detail
    assert "begins" in detail
    full = json.loads(desk.run("history", "--id", desk.world.spec.id, "--json"))
    assert full["status"]["decision"] == "promoted"
    assert {e["kind"] for e in full["audit"]} == {"look", "transition"}
    with pytest.raises(NotFoundError, match="no rollout 'nope'"):
        desk.run("history", "--id", "nope")


def test_hooks_move_the_aliases_once(desk: Desk) -> None:
    """Promotion moves champion and drops challenger; called again (after a kill) nothing more happens."""
    desk.end_first()
    desk.publish()
    world = desk.world
    spec = start_rollout(world.rollouts, world.traffic, desk.registry, demo_policy(), "support", "student:1")
    for _ in range(2):
        promoted_hook(desk.registry)(spec)
    assert desk.registry.aliases("student") == {"champion": 1}
    events = [(e.alias, e.version) for e in desk.registry.alias_events("student")]
    assert events == [("challenger", 1), ("champion", 1), ("challenger", None)]
    rolled_back_hook(desk.registry)(spec)
    assert desk.registry.aliases("student") == {"champion": 1}
