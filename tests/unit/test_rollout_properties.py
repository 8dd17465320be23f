"""Random observations through decide(): what must hold whatever is seen, asked and answered."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.hooks import HookPoint, HookSpec
from contracts.metrics import GRADE, ArmCounts, MetricKind, MetricSpec, pass_fail
from contracts.rollout import Phase, RolloutSpec, RolloutStatus, Step
from contracts.traffic import Split, Upstream
from serve.rollout.decide import decide, initial
from serve.rollout.observation import Answer, Asked, Decision, Observation, SeenWindow
from serve.rollout.policy import make_spec
from serve.rollout.replay import audit_entries, canonical, replay
from serve.rollout.schedule import is_open
from serve.state.rollouts import StoredRollout
from tests.unit.rollout_world import T0, TEACHER, demo_policy, record

HOOK = HookSpec(name="desk", confirm=HookPoint.BEFORE_PROMOTE, url="http://127.0.0.1:1/", retries=1)
STEPS = (
    Step(weight=0.1, min_samples=5, evidence=0.5),
    Step(weight=0.3, min_samples=5, approval=True, evidence=0.5),
    Step(weight=0.5),
)
VERBS = ("pause", "resume", "approve", "abort", "promote")


def spec_of(windows: bool, watch: bool, hook: bool) -> RolloutSpec:
    """A rollout with whatever can hold it."""
    metrics = (
        MetricSpec(kind=MetricKind.ERRORS, margin=0.1),
        MetricSpec(kind=MetricKind.QUALITY, margin=0.1),
    )
    policy = demo_policy(
        steps=STEPS,
        metrics=metrics,
        windows=("Mon-Fri 13:47-13:52",) if windows else (),
        watch_s=20.0 if watch else 0.0,
        hooks=(HOOK,) if hook else (),
        look_s=2.0,
    )
    return make_spec(policy, "support", record(), now=T0).model_copy(update={"id": "the-one"})


@st.composite
def arms(draw: st.DrawFn) -> ArmCounts:
    """Counts of one arm in one window; errors and wrong answers from none to all."""
    n = draw(st.sampled_from([0, 1, 40, 200]))
    errors = draw(st.sampled_from([0, 0, n // 50, n // 2, n]))
    passed = draw(st.sampled_from([0, n - errors, (n - errors) // 2]))
    return ArmCounts(n=n, errors=errors, scores={GRADE: pass_fail(passed, n - errors - passed)})


@st.composite
def worlds(draw: st.DrawFn) -> tuple[float, ArmCounts, ArmCounts, str | None, str | None, str]:
    """What one tick sees: seconds passed, both arms, a command, an answer, what the engine says."""
    return (
        draw(st.sampled_from([0.5, 2.0, 2.0, 2.0, 60.0])),
        draw(arms()),
        draw(arms()),
        draw(st.sampled_from([None, None, None, None, "approve", *VERBS])),
        draw(st.sampled_from([None, "yes", "yes", "no", "error"])),
        draw(st.sampled_from(["fine", "fine", "fine", "fine", "error", "slow"])),
    )


class Walk:
    """One rollout through random ticks, with the split and the trail kept as the store would."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec, self.status, self.now = spec, initial(spec), T0
        self.split = Split(route="support", version=1, salt="s", stable=TEACHER)
        self.trail: list[object] = []
        self.commands = self.seq = 0

    def tick(self, seen: tuple[float, ArmCounts, ArmCounts, str | None, str | None, str]) -> Decision:
        """One tick."""
        seconds, stable, canary, verb, answer, engine = seen
        self.now += seconds
        observation = self._observation(stable, canary, verb, answer, engine)
        before = self.status
        decision = decide(self.spec, before, observation)
        if decision.actions and engine == "error":
            observation = observation.model_copy(update={"engine_error": "away"})
            decision = decide(self.spec, before, observation)
        if decision.status.ticks != before.ticks:
            self.status = decision.status
            text = canonical(self.status)
            self.trail += audit_entries(self.spec, before, observation, decision, text)
            if decision.split is not None:
                assert decision.split.version == self.split.version + 1
                self.split = decision.split
        return decision

    def _observation(
        self, stable: ArmCounts, canary: ArmCounts, verb: str | None, answer: str | None, engine: str
    ) -> Observation:
        asked: tuple[Asked, ...] = ()
        if verb is not None:
            self.commands += 1
            asked = (Asked(id=self.commands, verb=verb, by="ann"),)
        waiting, answers = self.status.confirm, ()
        if waiting is not None and answer is not None:
            answers = (
                Answer(key=waiting.key, hook=0, accepted=answer == "yes", refused=answer == "no", words="w"),
            )
        self.seq += 1
        ours = self.split.rollout_id == self.spec.id
        window = SeenWindow(split_version=self.split.version, stable=stable, canary=canary)
        return Observation(
            now=self.now,
            split=self.split,
            windows=(window,) if ours else (),
            cursor={"b": self.seq, "a": self.seq} if ours else {},
            commands=asked,
            answers=answers,
            ready=engine == "fine",
            warmed=engine == "fine",
            engine_error="away" if engine == "error" and self.status.phase is Phase.PENDING else None,
            acknowledged=engine == "fine",
        )

    def replayed(self) -> bool:
        """The trail, through JSON, leads to the same status to the last bit."""
        stored = StoredRollout(
            spec=RolloutSpec.model_validate_json(self.spec.model_dump_json()),
            status=RolloutStatus.model_validate_json(canonical(self.status)),
            status_version=1,
        )
        entries = [type(e).model_validate_json(e.model_dump_json()) for e in self.trail]  # type: ignore[attr-defined]
        return replay(stored, entries).exact


def share(split: Split, candidate: Upstream) -> float:
    """The candidate's share of the traffic."""
    if split.stable == candidate:
        return 1.0 - split.weight
    return split.weight if split.canary == candidate else 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(worlds(), min_size=1, max_size=60),
)
def test_whatever_happens_the_rules_hold(
    windows: bool,
    watch: bool,
    hook: bool,
    seen: list[tuple[float, ArmCounts, ArmCounts, str | None, str | None, str]],
) -> None:
    """Never promoted without evidence (or a person), no share rises outside the schedule, terminal stays
    terminal, a step is left only in order, harm is never followed by a promotion, and the trail replays."""
    spec = spec_of(windows, watch, hook)
    walk = Walk(spec)
    for one in seen:
        before, split = walk.status, walk.split
        decision = walk.tick(one)
        after = walk.status
        if before.phase.terminal:
            assert decision.split is None
            assert not decision.actions
            assert after == before
        if share(walk.split, spec.candidate) > share(split, spec.candidate):
            assert is_open(spec.windows, walk.now)
        if after.decision == "promoted" and before.decision is None:
            by_hand = "promoted before the tests were done by ann" in after.reason
            assert by_hand or all(m.log_noninferior >= 2.99 for m in after.metrics)
            assert by_hand or (before.step == len(STEPS) - 1 and "step:1" in before.approved)
            assert by_hand or not hook or "before_promote" in after.confirmed
        if after.phase is Phase.RAMPING and after.step != before.step:
            assert after.step == before.step + 1
        if after.decision is not None and after.decision != "promoted":
            assert share(walk.split, spec.candidate) == 0.0
        assert after.reason
    assert walk.replayed()
