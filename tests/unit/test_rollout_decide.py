"""The rules and the evidence behind them, as pure functions."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.gates import Verdict
from contracts.metrics import GRADE, LATENCY_BUCKETS_S, ArmCounts, MetricKind, MetricSpec, pass_fail
from contracts.rollout import MetricStatus, Phase, RolloutSpec, RolloutStatus, Step
from contracts.traffic import Split
from serve.rollout import evidence, sentences
from serve.rollout.decide import decide, initial, step_evidence
from serve.rollout.observation import Action, Asked, Observation, SeenWindow
from serve.rollout.policy import make_spec
from serve.rollout.simulate import ArmModel, World, simulate
from tests.unit.rollout_world import BROKEN, GOOD, STABLE, T0, TEACHER, demo_policy, record

SPLIT = Split(route="support", version=1, salt="s", stable=TEACHER)


def spec(**changes: object) -> RolloutSpec:
    """The demo's spec with changes."""
    made = make_spec(demo_policy(), "support", record(), now=T0)
    return RolloutSpec(**{**dict(made), "id": "the-one", **changes})  # type: ignore[arg-type]


def ramping(of: RolloutSpec) -> tuple[RolloutStatus, Split]:
    """Status and split at the first step."""
    status = decide(of, initial(of), Observation(now=T0, split=SPLIT, ready=True)).status
    decision = decide(of, status, Observation(now=T0, split=SPLIT, warmed=True))
    assert decision.split is not None
    return decision.status, decision.split


def buckets(**at: int) -> tuple[int, ...]:
    """Bucket counts from `ms_200=3`: three requests in the bucket that ends at 200 ms."""
    counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
    for name, n in at.items():
        counts[LATENCY_BUCKETS_S.index(int(name.removeprefix("ms_")) / 1000)] = n
    return tuple(counts)


def test_the_first_step_writes_a_split_of_its_own_salt() -> None:
    """Version + 1, the candidate as canary at 1 %, the rollout's id as salt and label, the step as window."""
    status, split = ramping(spec())
    assert (split.version, split.weight, split.salt) == (2, 0.01, "the-one")
    assert (split.rollout_id, split.window, split.stable) == ("the-one", "step-1-of-5", TEACHER)
    assert (status.phase, status.step, status.weight, status.stable) == (Phase.RAMPING, 0, 0.01, TEACHER)


def test_the_ladder_rises_from_one_to_the_full_evidence() -> None:
    """Default: (1/alpha)^(i/(k-1)); a step's own value replaces it, but never lowers the last one."""
    plain = spec(steps=tuple(Step(weight=w) for w in (0.01, 0.05, 0.1)))
    assert [step_evidence(plain, i) for i in range(3)] == pytest.approx([1.0, math.sqrt(20), 20.0])
    lax = spec(steps=(Step(weight=0.01, evidence=0.2), Step(weight=0.5, evidence=0.2)))
    assert [step_evidence(lax, i) for i in range(2)] == [0.2, 20.0]
    assert step_evidence(spec(steps=(Step(weight=0.1),)), 0) == 20.0


@pytest.mark.parametrize(("errors", "n", "killed"), [(10, 20, True), (9, 20, False), (19, 19, False)])
def test_kill_switch_boundary(errors: int, n: int, killed: bool) -> None:
    """Exactly the stated share of at least 20 requests trips it, at a tick before the next look is due."""
    of = spec(alpha_harm=1e-12, look_s=60.0)
    status, split = ramping(of)
    window = SeenWindow(
        split_version=2, stable=ArmCounts(n=50, errors=25), canary=ArmCounts(n=n, errors=errors)
    )
    decision = decide(of, status, Observation(now=T0 + 1, split=split, windows=(window,)))
    assert (decision.status.decision == "rolled_back") is killed
    assert (decision.quarantine is not None) is killed


def test_a_tick_before_the_next_look_changes_nothing() -> None:
    """Windows are left in the ledger until the look is due; such a tick is not stored."""
    of = spec()
    status, split = ramping(of)
    window = SeenWindow(split_version=2, stable=ArmCounts(n=30), canary=ArmCounts(n=1))
    decision = decide(of, status, Observation(now=T0 + 1, split=split, windows=(window,), cursor={"a": 1}))
    assert decision.status == status
    assert not decision.looked


def test_counts_of_an_older_split_are_evidence_but_not_samples_of_the_step() -> None:
    """Late ledger entries join the totals and the tests; min_samples counts the current weight only."""
    of = spec()
    status, split = ramping(of)
    old = SeenWindow(split_version=1, stable=ArmCounts(n=30), canary=ArmCounts(n=7))
    new = SeenWindow(split_version=2, stable=ArmCounts(n=30), canary=ArmCounts(n=2))
    seen = Observation(now=T0 + 3, split=split, windows=(old, new), cursor={"a": 4})
    status = decide(of, status, seen).status
    assert (status.total_counts["canary"].n, status.step_counts["canary"].n) == (9, 2)
    assert status.cursor == {"a": 4}


def test_abort_wins_over_later_commands_in_the_same_tick() -> None:
    """All commands are consumed; none survives the rollout's end."""
    of = spec()
    status, split = ramping(of)
    commands = (Asked(id=1, verb="abort", by="ann"), Asked(id=2, verb="promote", by="bob"))
    decision = decide(of, status, Observation(now=T0 + 1, split=split, commands=commands))
    assert decision.status.decision == "aborted"
    assert decision.done_commands == (1, 2)


def test_actions_come_with_the_terminal_status_and_not_before() -> None:
    """While draining nothing is retired; the tick that ends it names what must be done first."""
    of = spec()
    status, split = ramping(of)
    abort = Observation(now=T0 + 1, split=split, commands=(Asked(id=1, verb="abort", by="ann"),))
    first = decide(of, status, abort)
    assert (first.status.phase, first.actions) == (Phase.ROLLING_BACK, ())
    waiting = decide(
        of, first.status, Observation(now=T0 + 2, split=first.split, in_flight=1, acknowledged=True)
    )
    assert waiting.status == first.status
    last = decide(of, first.status, Observation(now=T0 + 3, split=first.split, acknowledged=True))
    assert (last.status.phase, last.actions) == (Phase.ABORTED, (Action.RETIRE_CANDIDATE,))


def test_a_terminal_rollout_never_moves_again() -> None:
    """Whatever is observed, the same status comes back."""
    of = spec()
    done = initial(of).model_copy(update={"phase": Phase.PROMOTED, "decision": "promoted"})
    assert decide(of, done, Observation(now=T0 + 9, split=SPLIT, ready=True)).status == done


def test_thresholds_count_what_is_slower_than_a_bucket_edge() -> None:
    """A request in the bucket that ends at the threshold is fast enough; the overflow bucket is slow."""
    counts = (*buckets(ms_200=5, ms_400=3, ms_600=2)[:-1], 1)
    assert evidence.above(counts, 0.4) == 3
    assert evidence.above(counts, 0.2) == 6
    assert evidence.above((), 0.4) == 0


def test_noninferiority_of_latency_needs_every_threshold() -> None:
    """Faster at the median and slower in the tail is harm at one threshold, and not non-inferior."""
    metric = MetricSpec(kind=MetricKind.TTFT, margin=0.05, thresholds_s=(0.1, 1.0))
    of = spec(metrics=(metric,))
    stable = ArmCounts(n=400, ttft=buckets(ms_80=200, ms_300=200))
    canary = ArmCounts(n=100, ttft=buckets(ms_80=75, ms_2000=25))
    found = evidence.fresh(of)
    for _ in range(6):
        found = evidence.update(of, found, window(stable, canary))
    assert found[0].log_harm > math.log(20)
    assert found[0].log_noninferior < 0
    assert found[0].verdict is Verdict.FAIL


def window(stable: ArmCounts, canary: ArmCounts) -> SeenWindow:
    """Both arms under the first split of a ramp."""
    return SeenWindow(split_version=2, stable=stable, canary=canary)


def graded(n: int, passed: int, failed: int, errors: int = 0) -> ArmCounts:
    """Counts with verdicts of the grader."""
    return ArmCounts(n=n, errors=errors, scores={GRADE: pass_fail(passed, failed)})


def metric(kind: MetricKind, harm: float, good: float) -> MetricStatus:
    """Evidence made up."""
    return MetricStatus(
        name=kind.value,
        kind=kind,
        log_harm=math.log(harm),
        log_noninferior=math.log(good),
        state={"rates:0": [1.0, 0.0, 1.0, 0.0]},
    )


def test_family_of_tests() -> None:
    """Harm: one at J/alpha, or the mean at 1/alpha. Promotion: all at 1/alpha, one less is not enough."""
    kinds = [m.kind for m in spec().metrics]

    def family(harms: list[float], goods: list[float]) -> evidence.Family:
        made = tuple(metric(k, h, g) for k, h, g in zip(kinds, harms, goods, strict=True))
        return evidence.combine(spec(), made)

    assert not family([79.0, 0.1, 0.1, 0.1], [1.0] * 4).harm
    assert family([81.0, 0.1, 0.1, 0.1], [1.0] * 4).harm
    assert family([21.0] * 4, [1.0] * 4).harm
    assert not family([19.0] * 4, [1.0] * 4).harm
    assert family([1.0] * 4, [21.0] * 4).noninferior
    assert not family([1.0] * 4, [21.0, 21.0, 21.0, 19.0]).noninferior


def test_verdicts_without_canary_data_are_no_data() -> None:
    """Stable traffic alone never passes anything: no data is not a pass."""
    of = spec()
    found = evidence.update(of, evidence.fresh(of), window(graded(5000, 5000, 0), ArmCounts()))
    assert {m.verdict for m in found} == {Verdict.NO_DATA}
    assert all((m.log_harm, m.log_noninferior) == (0.0, 0.0) for m in found)


def test_a_metric_that_never_gets_data_holds_the_rollout() -> None:
    """No grader: everything else may be proven, the rollout still waits and says for what."""
    found = simulate(spec(), World(per_s=30, stable=STABLE, canary=GOOD, graded=0.0), seed=1, max_s=400)
    assert (found.status.phase, found.status.decision) == (Phase.HELD, None)
    assert "no canary data on quality yet" in found.status.reason


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 40)] * 4), min_size=1, max_size=8))
def test_status_survives_json_to_the_last_bit(windows: list[tuple[int, int, int, int]]) -> None:
    """Evidence stored as JSON and read again continues exactly as if it had never been stored."""
    of = spec()
    found = evidence.fresh(of)
    for n_b, k_b, n_c, k_c in windows:
        stable, canary = (
            ArmCounts(n=n, errors=min(k, n), scores={GRADE: pass_fail(n, 0)})
            for n, k in ((n_b, k_b), (n_c, k_c))
        )
        found = evidence.update(of, found, window(stable, canary))
        status = initial(of).model_copy(update={"metrics": found})
        again = RolloutStatus.model_validate_json(status.model_dump_json())
        assert again == status
        assert RolloutStatus.model_validate(json.loads(json.dumps(status.model_dump(mode="json")))) == status


def test_the_rollback_sentence_has_the_numbers() -> None:
    """A person reads counts of both arms, the e-value and its threshold."""
    of = spec()
    found, stable, canary = (
        evidence.fresh(of),
        graded(240, 237, 3),
        ArmCounts(),
    )
    found = evidence.update(of, found, window(stable, canary))
    canary = graded(14, 5, 9)
    found = evidence.update(of, found, window(stable, canary))
    said = sentences.harm(of, evidence.combine(of, found), {"stable": stable.plus(stable), "canary": canary})
    head = "quality: canary got 9 of 14 (64.3 %) graded answers wrong against 6 of 480 (1.2 %) on stable"
    assert said.startswith(f"{head}: harm e-value ")
    assert said.endswith(">= 80.0 (4 guardrails / alpha 0.05)")


def test_simulated_a_a_and_boundary_errors_stay_within_their_alphas() -> None:
    """Whole decide() on the demo's ramp: equal is hardly ever thrown back, at a margin promoted."""
    equal = ArmModel(errors=0.01, wrong=0.05, ttft_s=0.12, e2e_s=0.9)
    worse = ArmModel(errors=0.01, wrong=0.05 + 0.06, ttft_s=0.12, e2e_s=0.9)
    of = spec(look_s=4.0)
    ends = Counter(
        simulate(of, World(per_s=40, stable=equal, canary=equal), s, 300).status.decision for s in range(60)
    )
    assert ends["rolled_back"] <= 4
    assert ends["promoted"] >= 40
    wrong = Counter(
        simulate(of, World(per_s=40, stable=equal, canary=worse), s, 300).status.decision for s in range(50)
    )
    assert wrong["promoted"] <= 5


def test_simulated_broken_students_never_pass_the_ten_percent_step() -> None:
    """From half wrong to all wrong: always thrown back, at the 1, 5 or 10 % step."""
    for wrong in (0.5, 0.9, 1.0):
        canary = ArmModel(wrong=wrong, ttft_s=BROKEN.ttft_s, e2e_s=BROKEN.e2e_s)
        for seed in range(40):
            found = simulate(spec(), World(per_s=30, stable=STABLE, canary=canary), seed, 600)
            assert found.status.decision == "rolled_back"
            assert found.status.max_weight <= 0.10


def test_low_traffic_does_not_throw_a_healthy_student_back() -> None:
    """Three requests a minute at 10 %: Flagger rolls back 74 % of such canaries; here nothing happens."""
    of = spec(steps=(Step(weight=0.1, min_samples=30),), look_s=60.0, no_data_deadline_s=24 * 3600.0)
    healthy = ArmModel(errors=0.0, wrong=0.02, ttft_s=0.12, e2e_s=0.9)
    for seed in range(5):
        found = simulate(of, World(per_s=0.05, stable=healthy, canary=healthy), seed, 6 * 3600)
        assert found.status.decision != "rolled_back"
