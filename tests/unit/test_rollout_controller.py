"""Whole rollouts on a fake deployer and scripted routers, through the real controller and state store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from contracts.errors import ConflictError, EngineError
from contracts.gates import Verdict
from contracts.rollout import Phase, Step
from contracts.traffic import Split, Upstream
from serve.rollout.controller import Controller
from serve.rollout.decide import initial
from serve.rollout.policy import make_spec
from serve.rollout.replay import replay
from serve.rollout.simulate import ArmModel
from serve.rollout.sweep import KEPT_S, LedgerSweep
from serve.state.rollouts import Tick
from tests.unit.rollout_world import BROKEN, GOOD, STABLE, TEACHER, World, demo_policy, record


def weights_seen(world: World) -> list[float]:
    """The weights the rollout went through, in order."""
    found = [0.0]
    for entry in world.rollouts.audit(world.spec.id):
        if entry.body["weight"] != found[-1]:
            found.append(entry.body["weight"])
    return found[1:]


def test_a_healthy_student_climbs_every_step_and_is_promoted(tmp_path: Path) -> None:
    """pending → warming → each step once → promoted; the split ends with the student as stable, alone."""
    world = World(tmp_path)
    status = world.until(Phase.PROMOTED)
    assert status.phase is Phase.PROMOTED
    assert weights_seen(world) == [0.01, 0.05, 0.10, 0.25, 0.50, 1.0]
    assert world.split.stable == world.spec.candidate
    assert (world.split.canary, world.split.weight, world.split.rollout_id) == (None, 0.0, None)
    assert world.told == ["promoted"]
    assert all(m.log_noninferior >= math.log(20) for m in status.metrics)
    assert all(m.verdict is Verdict.PASS for m in status.metrics)
    assert ("retire", "teacher") not in world.deployer.calls
    assert "no worse than stable by its margin" in status.reason


def test_a_broken_student_is_thrown_back_before_the_ten_percent_step_is_left(tmp_path: Path) -> None:
    """Wrong answers are found in live traffic: weight zero, digest quarantined, application retired."""
    world = World(tmp_path, canary=BROKEN)
    status = world.until(Phase.ROLLED_BACK)
    assert status.phase is Phase.ROLLED_BACK
    assert status.max_weight <= 0.10
    assert (world.split.stable, world.split.canary, world.split.weight) == (TEACHER, None, 0.0)
    assert "quality: canary got" in status.reason
    assert "harm e-value" in status.reason
    assert world.rollouts.quarantined("digest-1") == status.reason
    assert world.told == ["rolled_back"]
    assert world.deployer.calls.count(("retire", "student-v1")) == 1


def test_errors_charged_to_the_canary_roll_it_back(tmp_path: Path) -> None:
    """A fallback hides the canary's failures from clients; the ledger still charges the canary."""
    world = World(tmp_path, canary=ArmModel(errors=0.3, wrong=0.02, ttft_s=0.04, e2e_s=0.3))
    status = world.until(Phase.ROLLED_BACK)
    assert status.phase is Phase.ROLLED_BACK
    assert status.reason.startswith("errors: canary failed")


def test_the_kill_switch_needs_no_statistics(tmp_path: Path) -> None:
    """Half of twenty requests failed is enough, between two looks too."""
    world = World(tmp_path, demo_policy(look_s=50.0, no_data_deadline_s=600.0), per_s=400.0)
    world.until(Phase.RAMPING)
    world.routers.canary = ArmModel(errors=0.9)
    for _ in range(12):
        world.step()
    assert world.status.decision == "rolled_back"
    assert world.status.reason.startswith("kill switch: canary failed")


def test_an_incident_that_hits_both_arms_is_not_the_students_fault(tmp_path: Path) -> None:
    """Ten times the errors and wrong answers on both arms: held or promoted, never rolled back."""
    world = World(tmp_path, per_s=60.0)
    world.until(Phase.RAMPING)
    for _ in range(15):
        world.step()
    world.routers.stable = ArmModel(errors=0.15, wrong=0.2, ttft_s=0.12, e2e_s=0.9)
    world.routers.canary = ArmModel(errors=0.15, wrong=0.2, ttft_s=0.04, e2e_s=0.3)
    for _ in range(40):
        world.step()
    assert world.status.decision in (None, "promoted")
    world.routers.stable, world.routers.canary = STABLE, GOOD
    assert world.until(Phase.PROMOTED).decision == "promoted"


def test_without_data_nothing_happens_before_the_deadline(tmp_path: Path) -> None:
    """Never promoted, thrown back only after the deadline, and not quarantined for it."""
    world = World(tmp_path, per_s=0.0)
    world.until(Phase.RAMPING)
    began = world.now
    while world.status.decision is None and world.now < began + 300:
        world.step()
        if world.now - began < 60:
            assert world.status.phase in (Phase.RAMPING, Phase.HELD)
    assert 60 <= world.now - began <= 64
    assert world.status.decision == "rolled_back"
    assert "no counted request" in world.status.reason
    assert world.rollouts.quarantined("digest-1") is None
    assert all(m.verdict is Verdict.NO_DATA for m in world.status.metrics)


def test_time_without_a_controller_does_not_count_as_time_without_data(tmp_path: Path) -> None:
    """A stack that was down overnight does not throw its canary back in the morning."""
    world = World(tmp_path, per_s=0.0)
    world.until(Phase.RAMPING)
    world.step(8 * 3600)
    assert world.status.decision is None
    world.step(30)
    assert world.status.decision is None


def test_pause_keeps_the_weight_and_resume_goes_on(tmp_path: Path) -> None:
    """Paused: no step is left however good the evidence; resumed: it goes on to promotion."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    world.ask("pause", "lunch")
    world.step()
    assert (world.status.phase, world.status.reason) == (Phase.PAUSED, "paused by ann: lunch")
    for _ in range(60):
        world.step()
    assert (world.status.phase, world.status.weight) == (Phase.PAUSED, 0.01)
    world.ask("resume")
    world.step()
    assert world.status.phase is not Phase.PAUSED
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED


def test_harm_rolls_back_a_paused_rollout(tmp_path: Path) -> None:
    """Flagger #1801: waiting for a person must not shield a bad canary."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    world.ask("pause")
    world.step()
    world.routers.canary = BROKEN
    assert world.until(Phase.ROLLED_BACK).phase is Phase.ROLLED_BACK


def test_abort_gives_the_traffic_back_without_blame(tmp_path: Path) -> None:
    """Aborted: the route is as before, the student's application is gone, its digest is free."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    world.ask("abort", "wrong model")
    status = world.until(Phase.ABORTED)
    assert (status.phase, status.reason) == (Phase.ABORTED, "aborted by ann: wrong model")
    assert (world.split.stable, world.split.canary) == (TEACHER, None)
    assert world.rollouts.quarantined("digest-1") is None
    assert ("retire", "student-v1") in world.deployer.calls
    assert world.told == []


def test_promote_skips_the_tests_but_not_the_harm(tmp_path: Path) -> None:
    """A person may promote without evidence; shown harm wins over the command."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    world.ask("promote", "hurry")
    world.step()
    assert world.status.phase in (Phase.PROMOTING, Phase.PROMOTED)
    assert "by ann: hurry" in world.status.reason

    (tmp_path / "harm").mkdir()
    bad = World(tmp_path / "harm", demo_policy(look_s=40.0, no_data_deadline_s=600.0), canary=BROKEN)
    bad.until(Phase.RAMPING)
    for _ in range(30):
        bad.step()
    bad.ask("promote")
    bad.step()
    assert bad.status.decision == "rolled_back"


def test_promote_before_the_student_is_warm_is_ignored_and_noted(tmp_path: Path) -> None:
    """A command that cannot be obeyed is consumed and said in the audit, not kept for later."""
    world = World(tmp_path)
    world.deployer.ready_after = 3
    world.ask("promote")
    world.step()
    assert world.status.phase is Phase.PENDING
    assert world.rollouts.pending_commands(world.spec.id) == []
    assert "has not been warmed" in world.rollouts.audit(world.spec.id)[0].body["notes"][0]


def test_no_traffic_before_it_is_ready_and_probed(tmp_path: Path) -> None:
    """The first step's weight is written only after readiness and a successful probe."""
    world = World(tmp_path)
    world.deployer.ready_after = 3
    world.deployer.fail["probe"] = "connection refused"
    for _ in range(5):
        world.step()
    assert (world.status.phase, world.split.canary) == (Phase.WARMING, None)
    assert "engine error 1 of 6" in world.status.reason
    del world.deployer.fail["probe"]
    world.until(Phase.RAMPING)
    assert world.split.weight == 0.01
    assert world.status.engine_errors == 0


def test_a_student_lost_while_it_warms_is_deployed_again_and_waited_for(tmp_path: Path) -> None:
    """Its node or its whole cluster went: that is no engine error, of which six would end the rollout."""
    world = World(tmp_path)
    world.until(Phase.WARMING)
    world.deployer.running.clear()
    world.deployer.ready_after = 1_000
    for _ in range(45):
        world.step()
    assert (world.status.phase, world.status.engine_errors) == (Phase.WARMING, 0)
    assert "student-v1" in world.deployer.running
    assert ("probe", "student-v1") not in world.deployer.calls
    world.deployer.ready_after = 0
    assert world.until(Phase.RAMPING).phase is Phase.RAMPING


def test_an_engine_that_never_comes_up_is_not_a_failed_student(tmp_path: Path) -> None:
    """Errors spend a budget of their own; when it is gone the rollout aborts, without quarantine."""
    world = World(tmp_path)
    world.deployer.fail["deploy"] = "no GPU left"
    status = world.until(Phase.ABORTED)
    assert status.phase is Phase.ABORTED
    assert status.reason.startswith("engine error, not the student's failure")
    assert "no GPU left" in status.reason
    assert world.deployer.calls.count(("deploy", "student-v1")) == 6
    assert world.rollouts.quarantined("digest-1") is None
    assert world.split.version == 1


def test_an_application_that_is_never_ready_times_out(tmp_path: Path) -> None:
    """Waiting has an end, counted from the phase's begin."""
    world = World(tmp_path)
    world.deployer.ready_after = 10_000
    assert "did not come up within 120 s" in world.until(Phase.ABORTED).reason


@pytest.mark.parametrize("canary", [GOOD, BROKEN])
def test_the_loser_drains_before_it_is_retired(tmp_path: Path, canary: ArmModel) -> None:
    """No end while a router has not acknowledged the split or still has requests on the loser."""
    world = World(tmp_path, canary=canary)
    draining = Phase.PROMOTING if canary is GOOD else Phase.ROLLING_BACK
    world.routers.follow = False
    world.until(draining)
    for _ in range(5):
        assert world.step().phase is draining
    world.routers.follow = True
    world.routers.busy = {"teacher" if canary is GOOD else "student-v1": 2}
    for _ in range(5):
        assert world.step().phase is draining
    assert ("retire", "student-v1") not in world.deployer.calls
    world.routers.busy = {}
    assert world.step().phase.terminal


def test_the_drain_gives_up_after_its_timeout(tmp_path: Path) -> None:
    """One stuck request must not keep a rollout open for ever; the reason says how many were left."""
    world = World(tmp_path)
    world.routers.busy = {"teacher": 1}
    status = world.until(Phase.PROMOTED)
    assert status.phase is Phase.PROMOTED
    assert "2 requests still ran after 30 s" in status.reason


def test_the_second_promotion_retires_the_first_student(tmp_path: Path) -> None:
    """A stable arm that a rollout deployed is ours to delete; the teacher was not."""
    world = World(tmp_path)
    world.until(Phase.PROMOTED)
    world.now += 10
    world.spec = world.start(demo_policy(), version=2)
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    retired = [name for what, name in world.deployer.calls if what == "retire"]
    assert retired == ["student-v1"]
    assert world.split.stable.name == "student-v2"


def test_an_application_that_another_route_uses_is_not_retired(tmp_path: Path) -> None:
    """Two routes may share one student; ending a rollout on one must not take it from the other."""
    world = World(tmp_path, canary=BROKEN)
    world.traffic.put_split(Split(route="other", version=1, salt="o", stable=world.spec.candidate))
    world.until(Phase.ROLLED_BACK)
    assert ("retire", "student-v1") not in world.deployer.calls


def test_a_candidate_that_already_runs_is_never_deployed_nor_retired(tmp_path: Path) -> None:
    """An upstream with a URL belongs to somebody else."""
    world = World(tmp_path, canary=BROKEN)
    spec = world.spec.model_copy(
        update={
            "id": "other-one",
            "candidate": Upstream(name="theirs", model="m", url="http://x"),
            "artifact_uri": None,
        }
    )
    world.ask("abort")
    world.until(Phase.ABORTED)
    world.deployer.calls.clear()
    world.rollouts.create(spec, initial(spec))
    world.spec = spec
    assert world.until(Phase.ROLLED_BACK).phase is Phase.ROLLED_BACK
    assert {what for what, _ in world.deployer.calls} <= {"ready", "probe"}


def test_a_hook_that_fails_is_retried_and_then_left_to_people(tmp_path: Path) -> None:
    """The registry being away delays the terminal phase, within a budget; the reason says what is undone."""
    world = World(tmp_path)
    world.until(Phase.PROMOTING)
    calls: list[str] = []

    def fails(spec: object) -> None:
        calls.append("promoted")
        raise EngineError("registry is away")

    world.controller = Controller(
        world.engine, world.deployer, on_promoted=fails, holder="one", clock=lambda: world.now
    )
    status = world.until(Phase.PROMOTED)
    assert status.phase is Phase.PROMOTED
    assert len(calls) == 6
    assert "cleaning up failed, see to it: notify_promoted: registry is away" in status.reason


def test_a_split_changed_by_somebody_else_ends_the_rollout(tmp_path: Path) -> None:
    """Evidence about weights that are not ours is worthless; the other writer's split stays."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    other = Split(route="support", version=world.split.version + 1, salt="x", stable=TEACHER)
    world.traffic.put_split(other)
    assert world.until(Phase.ABORTED).phase is Phase.ABORTED
    assert world.split == other


def test_an_ab_test_holds_its_last_step_until_a_person_decides(tmp_path: Path) -> None:
    """hold_final: all tests passed, nothing moves; 'promote' ends it."""
    steps = (Step(weight=0.5, min_samples=50, min_dwell_s=5),)
    world = World(tmp_path, demo_policy(hold_final=True, steps=steps))
    world.until(Phase.RAMPING)
    for _ in range(120):
        world.step()
    assert world.status.phase is Phase.HELD
    assert world.status.reason.startswith("A/B test holds its last step")
    world.ask("promote")
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED


def test_a_restarted_controller_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    """A new controller at every tick takes the same decisions at the same ticks as a single one."""
    trails = []
    for restart in (False, True):
        folder = tmp_path / str(restart)
        folder.mkdir()
        world = World(folder)
        while not world.status.phase.terminal:
            if restart:
                world.controller = world.new_controller()
            world.step()
        trails.append([(e.tick, e.kind, e.at, e.body["reason"]) for e in world.rollouts.audit(world.spec.id)])
    assert trails[0] == trails[1]


@pytest.mark.parametrize("canary", [GOOD, BROKEN])
def test_the_audit_replays_to_the_same_decisions_bit_for_bit(tmp_path: Path, canary: ArmModel) -> None:
    """Every stored status follows from the stored observations, through JSON, to the last bit."""
    world = World(tmp_path, canary=canary)
    world.until(Phase.PROMOTED)
    again = replay(world.stored, world.rollouts.audit(world.spec.id))
    assert again.exact, again.mismatches
    assert again.ticks == world.status.ticks
    assert again.final == world.status


def test_a_tampered_audit_does_not_replay(tmp_path: Path) -> None:
    """One changed count is found: replay compares digests, not words."""
    world = World(tmp_path)
    world.until(Phase.PROMOTED)
    trail = world.rollouts.audit(world.spec.id)
    look = next(e for e in trail if e.kind == "look" and e.body["observation"].get("windows"))
    look.body["observation"]["windows"][0]["stable"]["n"] += 1
    assert not replay(world.stored, trail).exact


def test_only_the_lease_holder_acts(tmp_path: Path) -> None:
    """Two controllers: the second waits, and takes over when the first hands its lease back."""
    world = World(tmp_path)
    second = world.new_controller("two")
    assert world.controller.tick()
    assert not second.tick()
    world.rollouts.release_lease("rollout-controller", "one")
    assert second.tick()
    assert not world.controller.tick()


def test_a_controller_that_lost_its_lease_in_mid_tick_writes_nothing(tmp_path: Path) -> None:
    """The status version keeps a stale writer out even if it believes to be alone."""
    world = World(tmp_path)
    stale = world.stored
    world.step()
    before = world.rollouts.audit(world.spec.id)
    status = stale.status.model_copy(update={"ticks": 7, "reason": "late"})
    with pytest.raises(ConflictError, match="advanced by another controller"):
        world.rollouts.save_tick(Tick(stale, status, entries=before[:1]))
    assert world.rollouts.audit(world.spec.id) == before


def test_a_lease_that_lapses_in_mid_tick_is_renewed_and_costs_nobody_a_rollout(tmp_path: Path) -> None:
    """A tick slower than the lease: the view of the splits stays, nothing is mistaken for changed."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    world.controller = Controller(
        world.engine, world.deployer, holder="one", clock=lambda: world.now, lease_ttl_s=1e-6
    )
    for _ in range(20):
        world.step()
    assert world.status.decision in (None, "promoted")
    assert world.status.total_counts["canary"].n > 0


def test_a_controller_reads_again_what_another_one_wrote(tmp_path: Path) -> None:
    """Leading again after somebody else: no count is consumed twice, none is lost."""
    world = World(tmp_path)
    world.until(Phase.RAMPING)
    controllers = [world.controller, world.new_controller("two")]
    for i in range(24):
        world.rollouts.release_lease("rollout-controller", world.controller.holder)
        world.controller = controllers[i % 2]
        world.step()
    entries = world.traffic.read_ledger("support", world.spec.id, {})
    consumed = [e for e in entries if e.seq <= world.status.cursor.get(e.replica, 0)]
    assert world.status.total_counts["canary"].n == sum(e.counts.n for e in consumed if e.arm == "canary")
    assert world.status.total_counts["stable"].n == sum(e.counts.n for e in consumed if e.arm == "stable")
    assert len(consumed) > len(entries) / 2


def test_a_rollout_that_is_not_due_is_not_touched(tmp_path: Path) -> None:
    """Between two looks nothing is observed, decided or written for it; a command makes it due."""
    world = World(tmp_path, demo_policy(look_s=50.0, no_data_deadline_s=600.0))
    world.until(Phase.RAMPING)
    version = world.stored.status_version
    calls = len(world.deployer.calls)
    for _ in range(10):
        world.step()
    assert (world.stored.status_version, len(world.deployer.calls)) == (version, calls)
    world.ask("pause")
    world.step()
    assert world.status.phase is Phase.PAUSED


def test_one_rollouts_conflict_does_not_cost_the_others_their_tick(tmp_path: Path) -> None:
    """A look of two rollouts is one transaction; one of them was written by somebody else in between."""
    world = World(tmp_path)
    world.traffic.put_split(Split(route="other", version=1, salt="o", stable=TEACHER))
    spec = make_spec(demo_policy(), "other", record(2), now=world.now)
    world.rollouts.create(spec, initial(spec))
    world.until(Phase.RAMPING)
    while world.rollouts.get(spec.id).status.phase is not Phase.RAMPING:
        world.step()
    save = world.controller._rollouts.save_ticks

    def raced(ticks: Sequence[Tick]) -> dict[str, ConflictError]:
        for tick in ticks:
            if tick.before.spec.id == world.spec.id:
                world.rollouts.save_tick(Tick(world.stored, world.status))
        return save(ticks)

    world.controller._rollouts.save_ticks = raced  # type: ignore[method-assign]
    before = world.rollouts.get(spec.id).status.ticks
    for _ in range(4):
        world.step()
    assert world.rollouts.get(spec.id).status.ticks > before
    world.controller._rollouts.save_ticks = save  # type: ignore[method-assign]
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    assert replay(world.stored, world.rollouts.audit(world.spec.id)).exact


def test_the_ledger_is_swept_of_what_was_consumed_and_nothing_else(tmp_path: Path) -> None:
    """After an hour a running rollout's consumed entries go, unread ones stay; after its end all go."""
    world = World(tmp_path)
    while not world.status.cursor:
        world.step()
    for _ in range(3):
        world.routers.serve(world.now, 1.0)
    cursor = world.status.cursor
    stored = world.traffic.read_ledger("support", world.spec.id, {})
    unread = [entry for entry in stored if entry.seq > cursor.get(entry.replica, 0)]
    assert 0 < len(unread) < len(stored)
    later = LedgerSweep(world.rollouts, world.traffic, lambda: world.now + KEPT_S + 1)
    assert later.sweep() == len(stored) - len(unread)
    assert world.traffic.read_ledger("support", world.spec.id, {}) == unread
    world.until(Phase.PROMOTED)
    world.now += KEPT_S + 1
    world.controller.tick()
    assert world.traffic.ledger_ends() == {}
