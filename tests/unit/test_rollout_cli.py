"""`stillhouse rollout …` against a real state store and a fake registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update
from typer.testing import CliRunner

from contracts.errors import ConfigError, ConflictError, GateError, NotFoundError
from contracts.hooks import HookSpec
from contracts.metrics import MetricKind, MetricSpec
from contracts.model import ModelRecord
from contracts.rollout import Phase
from contracts.traffic import Cascade, Upstream
from registry.digest import digest_folder
from registry.fake import FakeRegistry
from serve.rollout import cli, cli_report, cli_watch
from serve.rollout.aliases import promoted_hook, rolled_back_hook
from serve.rollout.cli_stack import StackHandle
from serve.rollout.courier import Courier
from serve.rollout.replay import replay
from serve.rollout.sources import Sources
from serve.rollout.start import start_rollout
from serve.state.outbox import OutboxState
from serve.state.tables import audit
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
            reports=folder / "reports",
        )
        for module in (cli, cli_watch, cli_report):
            monkeypatch.setattr(module, "open_stack", lambda config: handle)
            monkeypatch.setattr(module.console, "_width", 140)

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


def test_an_ab_test_is_one_step_that_holds(desk: Desk) -> None:
    """--ab 0.5: the policy's metrics and margins at one fixed weight, until a person decides."""
    desk.end_first()
    desk.publish()
    assert "A/B test at 50 %" in desk.run("start", "support", "student:1", "--ab", "0.5")
    spec = desk.world.rollouts.active("support")[0].spec
    assert ([s.weight for s in spec.steps], spec.hold_final) == ([0.5], True)
    assert spec.metrics == desk.world.spec.metrics
    desk.world.spec = spec
    desk.world.ask("abort")
    desk.world.until(Phase.ABORTED)
    with pytest.raises(ConfigError, match=r"--ab: the weight must be between 0 and 1"):
        desk.run("start", "support", "student:1", "--ab", "1")


def test_start_cools_down_after_a_rollback_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal says how long; --force starts all the same."""
    desk = Desk(tmp_path, monkeypatch, policy=demo_policy(cooldown_s=300.0), canary=BROKEN)
    desk.world.until(Phase.ROLLED_BACK)
    ended = desk.world.status.phase_since
    desk.publish()
    monkeypatch.setattr("serve.rollout.start.time.time", lambda: ended + 60)
    with pytest.raises(ConflictError, match="cools down for another 240 s"):
        desk.run("start", "support", "student:1")
    assert "accepted" in desk.run("start", "support", "student:1", "--force")


def test_replay_says_exact_or_the_first_difference(desk: Desk) -> None:
    """Exit code 0 and 1; --json has the same for machines; a rollout that still runs replays too."""
    world = desk.world
    world.until(Phase.RAMPING)
    rollout_id = world.spec.id
    assert "all 2 stored decisions replay bit for bit, to ramping" in desk.run("replay", rollout_id)
    world.until(Phase.PROMOTED)
    found = json.loads(desk.run("replay", rollout_id, "--json"))
    assert (found["exact"], found["phase"], found["ticks"]) == (True, "promoted", world.status.ticks)
    with world.engine.begin() as db:
        body = db.execute(select(audit.c.body).where(audit.c.tick == 1)).scalar_one()
        forged = body.replace('"ready":true', '"ready":false')
        assert forged != body
        db.execute(update(audit).where(audit.c.tick == 1).values(body=forged))
    result = runner.invoke(cli.app, ["replay", rollout_id])
    assert result.exit_code == 1
    assert "the first: tick 1: replay says pending" in result.output
    with world.engine.begin() as db:
        db.execute(delete(audit).where(audit.c.tick == world.status.ticks))
    assert runner.invoke(cli.app, ["replay", rollout_id]).exit_code == 1


def test_a_trail_without_its_end_does_not_replay(desk: Desk) -> None:
    """Lines cut off at the end leave the stored status unexplained."""
    desk.world.until(Phase.PROMOTED)
    stored, trail = desk.world.stored, desk.world.rollouts.audit(desk.world.spec.id)
    assert replay(stored, trail).exact
    cut = replay(stored, trail[:-1])
    assert cut.mismatches == (
        f"the trail ends at tick {stored.status.ticks - 1}, the rollout is at {stored.status.ticks}",
    )


def test_history_shows_what_webhooks_were_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead letters with their words, and no URL, whose path may be a secret."""
    hook = HookSpec(name="pager", on=("*",), url="http://127.0.0.1:1/T0/s3cret", retries=0)
    desk = Desk(tmp_path, monkeypatch, policy=demo_policy(hooks=(hook,)))
    desk.world.step()
    Courier(desk.world.engine, clock=lambda: desk.world.now).deliver()
    out = desk.run("history", "--id", desk.world.spec.id)
    assert "pager" in out
    assert "dead letter: cannot be reached" in out
    assert "s3cret" not in out
    full = desk.run("history", "--id", desk.world.spec.id, "--json")
    (message,) = json.loads(full)["messages"]
    assert (message["event"], message["dead"], message["tries"]) == ("warming", True, 1)


def test_starting_is_told_to_webhooks_with_the_rollout_itself(desk: Desk) -> None:
    """'started' is in the outbox in the transaction that creates the rollout, with who asked for it."""
    desk.end_first()
    desk.publish()
    hook = HookSpec(on=("started",), url="http://127.0.0.1:1/")
    spec = start_rollout(
        desk.world.rollouts, desk.world.traffic, desk.registry, demo_policy(hooks=(hook,)), "support",
        "student:1", by="ann",
    )  # fmt: skip
    (message,) = OutboxState(desk.world.engine).of(spec.id)
    body = json.loads(message.body)
    assert (body["event"], body["by"], body["model"]) == ("started", "ann", "student:1")


def test_a_cascade_is_rolled_out_like_any_student(desk: Desk) -> None:
    """--on NAME: the candidate is the declared cascade, nothing is deployed, gates and digest are MODEL's."""
    desk.end_first()
    desk.publish()
    teacher, student = (Upstream(name=n, model=n, url=f"http://{n}") for n in ("big", "small"))
    smart = Upstream(
        name="smart", model="smart", cascade=Cascade(first=student, then=teacher, threshold=-0.1)
    )
    world = desk.world
    policy = demo_policy(metrics=(MetricSpec(kind=MetricKind.ERRORS, margin=0.02),))
    args = (world.rollouts, world.traffic, desk.registry, policy, "support", "student:1")
    with pytest.raises(NotFoundError, match="--on: there is no upstream 'nobody'; there are: smart"):
        start_rollout(*args, sources=Sources(upstreams={"smart": smart}), on="nobody")
    spec = start_rollout(*args, sources=Sources(upstreams={"smart": smart}), on="smart")
    assert (spec.candidate, spec.artifact_uri) == (smart, None)
    assert spec.digest == desk.registry.get("student:1").artifact.digest
    with pytest.raises(ConfigError, match="--on: names the upstream of one MODEL"):
        desk.run("start", "support", "student:1", "student:2", "--ab", "0.2", "--on", "smart")


def test_an_abn_test_from_the_terminal(desk: Desk) -> None:
    """Several models and --ab start a test; verbs say which student with --model; status shows them all."""
    desk.end_first()
    for text in ("a", "b", "c"):
        desk.publish(text=text)
    models = ("student:1", "student:2", "student:3")
    with pytest.raises(ConfigError, match="say --ab WEIGHT"):
        desk.run("start", "support", *models)
    with pytest.raises(ConfigError, match=r"--ab: 3 students of 0.3 leave the stable arm 0.1, less"):
        desk.run("start", "support", *models, "--ab", "0.3")
    out = desk.run("start", "support", *models, "--ab", "0.2", "--reason", "which size")
    assert "A/B/n test of 3 students at 20 % each, 40 % stay with the stable arm" in out
    assert all(model in out for model in models)
    for _ in range(6):
        desk.world.step()
    shown = json.loads(desk.run("status", "support", "--json"))
    assert [one["spec"]["model_ref"] for one in shown] == list(models)
    assert all(model in desk.run("status", "support") for model in models)
    with pytest.raises(ConflictError, match="say --model with one of: student:1, student:2, student:3"):
        desk.run("promote", "support")
    desk.run("promote", "support", "--model", "student:2", "--reason", "best")
    for _ in range(3):
        desk.world.step()
    ended = {r.spec.model_ref: r.status.phase for r in desk.world.rollouts.history("support")[1:]}
    assert ended == {"student:1": Phase.ABORTED, "student:2": Phase.PROMOTED, "student:3": Phase.ABORTED}
