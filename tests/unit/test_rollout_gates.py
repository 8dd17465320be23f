"""What holds a step although its evidence is there: people, schedule, hooks, a skewed split, an objective."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import ConflictError
from contracts.gates import Verdict
from contracts.hooks import HookPoint, HookSpec
from contracts.metrics import MetricKind, MetricSpec, Role
from contracts.rollout import Phase, SrmRule, Step
from serve.rollout.observation import Observation
from serve.rollout.policy import RolloutPolicy, make_spec
from serve.rollout.replay import replay
from serve.rollout.schedule import next_opening
from serve.rollout.simulate import ArmModel
from serve.rollout.start import _check_cooldown, ask
from serve.rollout.stats import srm
from serve.rollout.webhook import Reply
from tests.unit.rollout_world import BROKEN, T0, World, demo_policy, record

# T0 is a Monday, 1970-01-12 13:46:40 UTC.
ASK_STEP = HookSpec(name="desk", confirm=HookPoint.BEFORE_STEP, url="http://127.0.0.1:1/", retries=2)
ASK_PROMOTE = ASK_STEP.model_copy(update={"confirm": HookPoint.BEFORE_PROMOTE})
ASK_START = ASK_STEP.model_copy(update={"confirm": HookPoint.BEFORE_START})
TWO = (Step(weight=0.2, min_samples=5, evidence=0.1), Step(weight=0.5, min_samples=5))


def gated(folder: Path, canary: ArmModel | None = None, **changes: object) -> World:
    """A world of two steps, whose policy has the changes."""
    models = {} if canary is None else {"canary": canary}
    values = {"steps": TWO, "srm_unit_requests": 1.0, **changes}  # these routers assign every request alone
    return World(folder, demo_policy(**values), per_s=60.0, **models)


def steps(world: World, n: int) -> None:
    """Let n seconds pass."""
    for _ in range(n):
        world.step()


def exact(world: World) -> None:
    """The trail replays."""
    again = replay(world.stored, world.rollouts.audit(world.spec.id))
    assert again.exact, again.mismatches


# manual gates -----------------------------------------------------------------------------------

APPROVED = (Step(weight=0.2, min_samples=5, evidence=0.1, approval=True), Step(weight=0.5, min_samples=5))


def test_a_step_with_a_manual_gate_waits_for_approval_and_then_goes_on(tmp_path: Path) -> None:
    """However good the evidence, the weight stays; 'approve' lets it go on, and the audit names who."""
    world = gated(tmp_path, steps=APPROVED)
    world.until(Phase.HELD)
    steps(world, 30)
    assert (world.status.phase, world.status.weight) == (Phase.HELD, 0.2)
    assert "it waits for a person ('stillhouse rollout approve')" in world.status.reason
    world.ask("approve", "looks fine")
    world.step()
    assert (world.status.phase, world.status.weight) == (Phase.RAMPING, 0.5)
    notes = [n for e in world.rollouts.audit(world.spec.id) for n in e.body.get("notes", [])]
    assert "approved (step:0) by ann: looks fine" in notes
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    exact(world)


def test_harm_rolls_back_while_a_person_is_waited_for(tmp_path: Path) -> None:
    """Flagger #1801: a canary that goes bad while it waits for approval is thrown back."""
    world = gated(tmp_path, steps=APPROVED)
    world.until(Phase.HELD)
    world.routers.canary = BROKEN
    assert world.until(Phase.ROLLED_BACK).phase is Phase.ROLLED_BACK


def test_an_approval_counts_for_its_step_only_and_can_come_early(tmp_path: Path) -> None:
    """Approved before the evidence was there: not asked again; a step without a gate: nothing to approve."""
    world = gated(tmp_path, steps=APPROVED)
    world.until(Phase.RAMPING)
    world.ask("approve")
    world.step()
    assert world.status.approved == ("step:0",)
    while world.status.step == 0:
        assert world.step().phase is not Phase.HELD or "person" not in world.status.reason
    world.ask("approve")
    world.step()
    notes = world.rollouts.audit(world.spec.id)[-1].body.get("notes", [])
    assert any("changed nothing" in n for n in notes) or world.status.decision is not None


# schedules and cooldown -------------------------------------------------------------------------


def test_outside_its_windows_no_step_begins_and_nothing_is_promoted(tmp_path: Path) -> None:
    """Each move waits for the next opening, and the sentence says when that is."""
    windows = ("Mon-Fri 14:00-14:01",)
    slow = (Step(weight=0.2, min_dwell_s=20, evidence=0.1), Step(weight=0.5))
    world = gated(tmp_path, windows=windows, steps=slow)
    steps(world, 30)
    assert (world.status.phase, world.split.canary) == (Phase.WARMING, None)
    assert (
        "the first step waits for the schedule, which opens Mon 1970-01-12 14:00 UTC" in world.status.reason
    )
    world.now = next_opening(windows, T0) - 1
    steps(world, 3)
    assert (world.status.phase, world.status.weight) == (Phase.RAMPING, 0.2)
    world.now += 60
    steps(world, 30)
    assert (world.status.phase, world.status.weight) == (Phase.HELD, 0.2)
    assert "step 2 of 2 waits for the schedule, which opens Tue 1970-01-13 14:00 UTC" in world.status.reason
    world.ask("promote")
    world.step()
    assert (world.status.phase, world.status.weight) == (Phase.HELD, 0.2)
    notes = [n for e in world.rollouts.audit(world.spec.id) for n in e.body.get("notes", [])]
    assert any(n.startswith("promote by ann was ignored: outside the schedule") for n in notes)
    exact(world)


def test_a_rollback_needs_no_window(tmp_path: Path) -> None:
    """Harm is judged and acted on at any time."""
    windows = ("Mon-Fri 13:40-13:47",)
    world = gated(tmp_path, windows=windows, canary=BROKEN)
    world.until(Phase.RAMPING)
    world.now += 3600
    assert world.until(Phase.ROLLED_BACK).phase is Phase.ROLLED_BACK


def test_a_rollback_is_followed_by_a_cooldown(tmp_path: Path) -> None:
    """No new rollout on the route for a while; the refusal says what happened and how long is left."""
    world = gated(tmp_path, canary=BROKEN, cooldown_s=300.0)
    world.until(Phase.ROLLED_BACK)
    ended = world.status.phase_since
    with pytest.raises(ConflictError, match=r"cools down for another 200 s: .*thrown back.*--force"):
        _check_cooldown(world.rollouts, "support", ended + 100)
    _check_cooldown(world.rollouts, "support", ended + 300)
    _check_cooldown(world.rollouts, "billing", ended)


def test_an_aborted_rollout_needs_no_cooldown(tmp_path: Path) -> None:
    """Nothing failed: a person changed their mind."""
    world = gated(tmp_path, cooldown_s=300.0)
    world.ask("abort")
    world.until(Phase.ABORTED)
    _check_cooldown(world.rollouts, "support", world.now)


# sample ratio -----------------------------------------------------------------------------------


class _Skewed:
    """Routers that lose every second canary request on the way to the ledger."""

    def __init__(self, world: World) -> None:
        self._append = world.routers._append
        world.routers._append = self.append  # type: ignore[method-assign]

    def append(self, replica: str, split: object, arm: str, counts: object, now: float) -> None:
        """Half the canary's entries do not arrive."""
        if arm != "canary" or replica == "router-a":
            self._append(replica, split, arm, counts, now)  # type: ignore[arg-type]


def test_a_sample_ratio_mismatch_holds_and_a_person_may_go_on(tmp_path: Path) -> None:
    """Half the canary's requests vanish: held with the shares, in status and audit; 'approve' goes on."""
    slow = (Step(weight=0.2, min_dwell_s=40), Step(weight=0.5, min_dwell_s=40))
    world = gated(tmp_path, steps=slow)
    _Skewed(world)
    world.until(Phase.HELD)
    assert world.status.srm is Verdict.FAIL
    status = world.status
    assert (status.phase, status.weight) == (Phase.HELD, 0.2)
    assert "sample-ratio mismatch: the canary got" in status.reason
    assert "instead of 20 %" in status.reason
    assert "'stillhouse rollout approve' goes on" in status.reason
    looks = [e for e in world.rollouts.audit(world.spec.id) if e.kind == "look"]
    assert looks[-1].body["sample_ratio"] == {"log_e": status.log_srm, "verdict": "FAIL"}
    steps(world, 10)
    assert world.status.weight == 0.2
    world.ask("approve")
    world.step()
    assert "srm:0" in world.status.approved
    steps(world, 40)
    assert world.status.weight == 0.5
    assert world.status.srm is Verdict.FAIL
    assert world.status.phase is Phase.HELD
    exact(world)


@pytest.mark.parametrize(("rule", "end"), [(SrmRule.ROLLBACK, "rolled_back"), (SrmRule.IGNORE, "promoted")])
def test_a_sample_ratio_mismatch_does_what_the_policy_says(tmp_path: Path, rule: SrmRule, end: str) -> None:
    """rollback: thrown back, without blame; ignore: it is not even counted."""
    world = gated(tmp_path, srm=rule, steps=(Step(weight=0.2, min_samples=600), Step(weight=0.5)))
    _Skewed(world)
    status = world.until(Phase.ROLLED_BACK)
    assert status.decision == end
    assert world.rollouts.quarantined("digest-1") is None
    assert (status.srm is Verdict.NO_DATA) is (rule is SrmRule.IGNORE)


def test_a_sound_split_passes_the_sample_ratio_check(tmp_path: Path) -> None:
    """The share that was given is the share that came: PASS, also at the last step."""
    world = gated(tmp_path)
    assert world.until(Phase.PROMOTED).srm is Verdict.PASS


def test_whole_conversations_do_not_look_like_a_mismatch() -> None:
    """A sound split of conversations of 3 requests, 200 hours of them: undivided many are said to be skewed,
    with the policy's default none is."""
    rng = np.random.default_rng(7)
    spec = make_spec(RolloutPolicy(), "support", record(), now=T0)
    conversations = rng.poisson(100, (200, 60))
    canary = 3 * rng.binomial(conversations, 0.1).cumsum(axis=1)
    other = 3 * conversations.cumsum(axis=1) - canary
    shown = {
        unit: sum(
            any(
                srm.block_log_e(srm.Block(0.1, c / unit, o / unit)) >= math.log(1 / spec.alpha_srm)
                for c, o in zip(hour[0], hour[1], strict=True)
            )
            for hour in zip(canary, other, strict=True)
        )
        for unit in (1.0, spec.srm_unit_requests)
    }
    assert shown[1.0] >= 10
    assert shown[spec.srm_unit_requests] == 0


# roles ------------------------------------------------------------------------------------------


def test_an_objective_that_got_worse_holds_and_is_not_rolled_back(tmp_path: Path) -> None:
    """Quality as an objective: the answers got much worse, the errors did not; a person decides."""
    metrics = (
        MetricSpec(kind=MetricKind.ERRORS, margin=0.05),
        MetricSpec(kind=MetricKind.QUALITY, margin=0.06, role=Role.OBJECTIVE),
    )
    world = gated(tmp_path, canary=BROKEN, metrics=metrics)
    world.until(Phase.HELD)
    steps(world, 30)
    status = world.status
    assert (status.phase, status.weight, status.decision) == (Phase.HELD, 0.2, None)
    assert "objective quality got worse: canary got" in status.reason
    world.ask("approve")
    steps(world, 20)
    assert world.status.decision is None
    assert world.status.approved == ("objective:0",)
    exact(world)


# confirming hooks -------------------------------------------------------------------------------


def test_a_step_begins_only_when_its_hook_confirms_it(tmp_path: Path) -> None:
    """Refused with words: held, and said; asked again later; confirmed: it begins, each step asked once."""
    world = gated(tmp_path, hooks=(ASK_STEP,))
    world.reply = Reply(409, "change freeze")
    steps(world, 10)
    assert (world.status.phase, world.split.canary) == (Phase.WARMING, None)
    assert "warm; the first step is not confirmed: desk refused: change freeze" in world.status.reason
    assert len(world.asked) == 1
    world.reply = Reply(204, "")
    steps(world, 35)
    assert world.status.phase is not Phase.WARMING
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    ids = [event_id.removeprefix(world.spec.id) for _, event_id in world.asked]
    assert ids == [".before_step:0.0", ".before_step:0.0", ".before_step:1.0"]
    assert world.status.confirmed == ("before_step:0", "before_step:1")
    exact(world)


def test_a_promotion_waits_for_its_hook_and_harm_does_not(tmp_path: Path) -> None:
    """Held by a refusal the canary goes bad: it is thrown back all the same."""
    world = gated(tmp_path, hooks=(ASK_PROMOTE,))
    world.reply = Reply(403, "not on a Friday")
    while "not on a Friday" not in world.status.reason:
        world.step()
    assert world.status.reason == (
        "step 2 of 2 (50 %): its evidence is there; the promotion is not confirmed: "
        "desk refused: not on a Friday"
    )
    steps(world, 5)
    assert world.status.weight == 0.5
    world.routers.canary = BROKEN
    assert world.until(Phase.ROLLED_BACK).phase is Phase.ROLLED_BACK
    exact(world)


def test_a_hook_that_errs_is_retried_within_a_budget_of_its_own_and_then_pauses(tmp_path: Path) -> None:
    """Three tries (retries: 2), none of them the student's fault; 'resume' asks afresh."""
    world = gated(tmp_path, hooks=(ASK_PROMOTE,))
    world.reply = Reply(None, "cannot be reached (refused)")
    world.until(Phase.PAUSED)
    assert len(world.asked) == 3
    assert world.status.reason == (
        "the next move could not be confirmed: desk failed, try 3 of 3: cannot be reached (refused); "
        "'stillhouse rollout resume' asks again"
    )
    steps(world, 30)
    assert len(world.asked) == 3
    world.reply = Reply(200, "")
    world.ask("resume")
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    exact(world)


def test_nothing_is_deployed_before_the_start_is_confirmed(tmp_path: Path) -> None:
    """before_start: no engine call; when the budget is gone it ends as it began, without blame."""
    world = gated(tmp_path, hooks=(ASK_START,))
    world.reply = Reply(503, "busy")
    status = world.until(Phase.ABORTED)
    assert "the start could not be confirmed: desk failed, try 3 of 3: busy" in status.reason
    assert "deploy" not in {what for what, _ in world.deployer.calls}
    assert world.rollouts.quarantined("digest-1") is None
    exact(world)


def test_several_hooks_must_all_confirm(tmp_path: Path) -> None:
    """Two before_start hooks: both are asked, and it starts after the second yes."""
    other = ASK_START.model_copy(update={"name": "pager"})
    world = gated(tmp_path, hooks=(ASK_START, other))
    steps(world, 3)
    assert {name for name, _ in world.asked} == {"desk", "pager"}
    assert world.status.confirmed == ("before_start",)
    assert world.status.phase is not Phase.PENDING


def test_an_answer_to_another_question_confirms_nothing(tmp_path: Path) -> None:
    """An answer that comes late, for a move that is no longer wanted, is not heard."""
    from serve.rollout.decide import decide
    from serve.rollout.observation import Answer

    world = gated(tmp_path, hooks=(ASK_START,))
    stale = Answer(key="before_step:1", hook=0, accepted=True)
    found = decide(
        world.spec, world.status, Observation(now=T0, split=world.split, answers=(stale,), ready=True)
    )
    assert found.status.phase is Phase.PENDING
    assert found.status.confirmed == ()


# asking -----------------------------------------------------------------------------------------


def test_approve_is_refused_at_once_where_it_cannot_work(tmp_path: Path) -> None:
    """Before there is traffic nothing waits for a person."""
    world = gated(tmp_path)
    with pytest.raises(ConflictError, match="approve is not possible: the rollout is pending"):
        ask(world.rollouts, "support", "approve")
    assert time.time() > T0  # the world's clock is its own
