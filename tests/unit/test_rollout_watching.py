"""After a promotion: the former stable is the control arm, and late harm brings it back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from contracts.errors import ConflictError, EngineError
from contracts.metrics import GRADE, ArmCounts, MetricKind, MetricSpec, Role, pass_fail
from contracts.rollout import Phase, Step, WatchStatus
from registry.fake import FakeRegistry
from serve.rollout import evidence, late
from serve.rollout.aliases import promoted_hook, restored_hook
from serve.rollout.controller import Controller
from serve.rollout.observation import SeenWindow
from serve.rollout.policy import make_spec
from serve.rollout.replay import replay
from serve.rollout.rules.watching import swapped
from serve.rollout.simulate import ArmModel
from serve.rollout.start import _check_free
from tests.unit.rollout_world import BROKEN, T0, TEACHER, World, demo_policy, record

QUICK = (Step(weight=0.5, min_samples=50),)


def watched(folder: Path, **changes: object) -> World:
    """A world that is promoted and being watched for 200 s with a fifth held back."""
    values: dict[str, object] = {"steps": QUICK, "watch_s": 200.0, "holdback": 0.2, "watch_arl": 1000.0}
    world = World(folder, demo_policy(**{**values, **changes}), per_s=60.0)
    assert world.until(Phase.WATCHING).phase is Phase.WATCHING
    return world


def exact(world: World) -> None:
    """The trail replays."""
    again = replay(world.stored, world.rollouts.audit(world.spec.id))
    assert again.exact, again.mismatches


def test_the_watch_swaps_the_arms_and_moves_the_champion(tmp_path: Path) -> None:
    """The student is stable, the former stable keeps the holdback under a salt of its own; told at once."""
    world = watched(tmp_path)
    split = world.split
    assert (split.stable, split.canary, split.weight) == (world.spec.candidate, TEACHER, 0.2)
    assert (split.rollout_id, split.window, split.salt) == (world.spec.id, "watch", f"{world.spec.id}.watch")
    assert world.status.decision == "promoted"
    world.step()
    assert (world.told, world.status.champion) == (["promoted"], "promoted")
    assert ("retire", "teacher") not in world.deployer.calls


def test_a_healthy_watch_ends_in_promoted(tmp_path: Path) -> None:
    """No false alarm: after watch_s the former stable drains; the champion is not told twice."""
    world = watched(tmp_path)
    began = world.now
    status = world.until(Phase.PROMOTED)
    assert (status.phase, status.decision) == (Phase.PROMOTED, "promoted")
    assert 200 <= world.now - began <= 204
    assert "no late harm in 200 s of watch" in status.reason
    assert (world.split.stable, world.split.canary) == (world.spec.candidate, None)
    assert world.told == ["promoted"]
    assert status.watch is not None
    assert status.watch.counts["canary"].n > 3 * status.watch.counts["stable"].n
    exact(world)


def test_late_harm_restores_the_former_champion(tmp_path: Path) -> None:
    """The student goes bad after its promotion: split back, student drained, retired and quarantined."""
    world = watched(tmp_path)
    for _ in range(40):
        world.step()
    world.routers.canary = BROKEN
    status = world.until(Phase.ROLLED_BACK)
    assert (status.phase, status.decision) == (Phase.ROLLED_BACK, "rolled_back")
    assert status.reason.startswith("after the promotion: late harm on quality: canary got")
    assert status.reason.endswith("the former stable is restored")
    assert (world.split.stable, world.split.canary, world.split.weight) == (TEACHER, None, 0.0)
    assert world.rollouts.quarantined("digest-1") == status.reason
    assert world.told == ["promoted", "restored", "rolled_back"]
    assert world.deployer.calls.count(("retire", "student-v1")) == 1
    exact(world)


def test_harm_on_the_held_back_arm_is_not_the_students(tmp_path: Path) -> None:
    """GrowthBook #6020: with the arms mistaken, the *former stable* going bad would restore it."""
    world = watched(tmp_path)
    world.routers.stable = BROKEN
    status = world.until(Phase.PROMOTED)
    assert status.phase is Phase.PROMOTED
    assert status.watch is not None
    assert status.watch.log_alarm < math.log(10)


def test_the_kill_switch_works_in_the_watch(tmp_path: Path) -> None:
    """Half of the student's requests failing needs no detector, and the stable arm is the student."""
    world = watched(tmp_path, look_s=50.0, no_data_deadline_s=600.0)
    world.routers.canary = ArmModel(errors=0.9)
    for _ in range(3):
        world.step()
    assert world.status.decision == "rolled_back"
    assert "after the promotion: kill switch: canary failed" in world.status.reason


def test_promote_ends_the_watch_and_abort_takes_the_promotion_back(tmp_path: Path) -> None:
    """promote: done now; abort: the former stable is back, without quarantine, and the registry knows."""
    world = watched(tmp_path)
    world.ask("promote", "sure")
    assert world.until(Phase.PROMOTED).reason == "the watch was ended early by ann: sure"
    assert world.told == ["promoted"]
    (tmp_path / "abort").mkdir()
    other = watched(tmp_path / "abort")
    other.step()
    other.ask("pause")
    other.ask("abort", "wrong one")
    status = other.until(Phase.ABORTED)
    assert (status.phase, status.reason) == (Phase.ABORTED, "the promotion was taken back by ann: wrong one")
    assert other.split.stable == TEACHER
    assert other.told == ["promoted", "restored"]
    assert other.rollouts.quarantined("digest-1") is None
    exact(other)


def test_no_new_rollout_while_watching_and_the_refusal_says_the_way_out(tmp_path: Path) -> None:
    """One active rollout a route holds through the watch."""
    world = watched(tmp_path)
    with pytest.raises(ConflictError, match=r"promote' ends the watch now, .*abort' restores"):
        _check_free(world.rollouts, "support")
    _check_free(world.rollouts, "billing")


def test_outside_the_schedule_the_watch_goes_on(tmp_path: Path) -> None:
    """The end of the watch retires the former stable: that waits for people to be there."""
    world = watched(tmp_path, windows=("Mon 13:40-13:48", "Mon 14:30-14:40"))
    for _ in range(260):
        world.step()
    assert world.status.phase is Phase.WATCHING
    assert "the watch goes on until the schedule opens Mon 1970-01-12 14:30 UTC" in world.status.reason


def test_a_registry_that_is_away_does_not_stop_the_watch(tmp_path: Path) -> None:
    """Its errors have a budget of their own; harm is judged meanwhile, and the audit says what is undone."""
    world = watched(tmp_path)

    def fails(spec: object) -> None:
        raise EngineError("registry is away")

    world.controller = Controller(
        world.engine, world.deployer, on_promoted=fails, holder="one", clock=lambda: world.now
    )
    for _ in range(60):
        world.step()
    assert (world.status.phase, world.status.champion) == (Phase.WATCHING, "promoted")
    notes = [n for e in world.rollouts.audit(world.spec.id) for n in e.body.get("notes", [])]
    assert "engine error 1 of 6, trying again: notify_promoted: registry is away" in notes
    assert "the registry was not told of the champion, see to it: notify_promoted: registry is away" in notes
    exact(world)


def test_a_split_written_by_hand_ends_the_watch_as_it_stands(tmp_path: Path) -> None:
    """The student kept by hand: promoted; thrown out by hand: aborted, and the champion goes back."""
    world = watched(tmp_path)
    world.step()
    by_hand = {"rollout_id": None, "canary": None, "weight": 0.0, "version": world.split.version + 1}
    world.traffic.put_split(world.split.model_copy(update=by_hand))
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    (tmp_path / "out").mkdir()
    out = watched(tmp_path / "out")
    out.step()
    by_hand = {**by_hand, "version": out.split.version + 1, "stable": TEACHER}
    out.traffic.put_split(out.split.model_copy(update=by_hand))
    assert out.until(Phase.ABORTED).phase is Phase.ABORTED
    assert out.told == ["promoted", "restored"]


def test_the_aliases_go_to_the_student_and_back(tmp_path: Path) -> None:
    """champion: 1 → 2 → 1; a second call changes nothing, and another's later move is left alone."""
    registry = FakeRegistry()
    for version in ("one", "two", "three"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "weights").write_text(version)
        from registry.digest import digest_folder

        made = record().model_copy(update={"version": None})
        artifact = made.artifact.model_copy(update={"digest": digest_folder(folder)})
        registry.publish(made.model_copy(update={"artifact": artifact}), folder)
    registry.set_alias("student", "champion", 1, "ann", "first")
    spec = make_spec(demo_policy(), "support", registry.get("student:2"), now=T0)
    promoted_hook(registry)(spec)
    assert registry.aliases("student") == {"champion": 2}
    for _ in range(2):
        restored_hook(registry)(spec)
        assert registry.aliases("student") == {"champion": 1}
    promoted_hook(registry)(spec)
    registry.set_alias("student", "champion", 3, "bob", "mine")
    restored_hook(registry)(spec)
    assert registry.aliases("student") == {"champion": 3}


def test_only_guardrails_ring_and_the_mean_of_their_detectors_decides() -> None:
    """An objective's harm restores nobody; a detector starts again at every look, so health is no capital."""
    metrics = (
        MetricSpec(kind=MetricKind.ERRORS, margin=0.02),
        MetricSpec(kind=MetricKind.QUALITY, margin=0.06, role=Role.OBJECTIVE),
    )
    spec = make_spec(demo_policy(metrics=metrics, watch_arl=1000.0), "support", record(), now=T0)
    fine = ArmCounts(n=100, errors=1, scores={GRADE: pass_fail(100, 0)})
    wrong = ArmCounts(n=100, errors=1, scores={GRADE: pass_fail(10, 90)})
    failing = ArmCounts(n=100, errors=20, scores={GRADE: pass_fail(80, 0)})
    watch = WatchStatus(until=T0 + 100, split_version=3, metrics=evidence.fresh(spec))
    for _ in range(50):
        watch = late.update(spec, watch, SeenWindow(split_version=3, stable=fine, canary=wrong))
    assert not late.alarmed(spec, watch)
    assert watch.worst == "errors"
    looks = 0
    while not late.alarmed(spec, watch):
        watch = late.update(spec, watch, SeenWindow(split_version=3, stable=fine, canary=failing))
        looks += 1
    assert looks <= 2


def test_swapping_a_window_mirrors_its_pairs() -> None:
    """Pairs count the canary's side: a win of the split's canary is the student's loss."""
    window = SeenWindow(
        split_version=1,
        stable=ArmCounts(n=3),
        canary=ArmCounts(n=1),
        pairs=ArmCounts(scores={"judge": pass_fail(5, 2)}),
    )
    after = swapped(window)
    assert (after.stable.n, after.canary.n) == (1, 3)
    assert after.pairs.scores == {"judge": pass_fail(2, 5)}
    assert swapped(after) == window
