"""A/B/n tests: several students on one route, a rollout each, decided each by its own evidence."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import func, select

from contracts.errors import ConfigError, ConflictError, GateError, NotFoundError
from contracts.gates import Verdict
from contracts.metrics import ArmCounts, MetricKind, MetricSpec
from contracts.model import ModelRecord
from contracts.rollout import Phase, RolloutSpec, RolloutStatus, Step
from contracts.traffic import Arm, Slot, Split, Upstream
from registry.digest import digest_folder
from registry.fake import FakeRegistry
from serve.rollout.decide import initial
from serve.rollout.draft import Draft
from serve.rollout.observation import Observation, SeenWindow
from serve.rollout.policy import make_spec
from serve.rollout.replay import replay
from serve.rollout.report import requests, trail
from serve.rollout.rules.looking import look
from serve.rollout.start import ask, start_rollout
from serve.rollout.start_abn import abn_policy, as_student, start_abn
from serve.state.rollouts import StoredRollout
from serve.state.tables import rollouts as rollout_table
from tests.unit import report_log
from tests.unit.rollout_world import BROKEN, GOOD, T0, TEACHER, Routers, World, demo_policy, record

WEIGHT = 0.2


class Test3(World):
    """A route with an A/B/n test of three students of 20 %; the second may behave badly."""

    __test__ = False

    def __init__(self, folder: Path, **routers: object) -> None:
        super().__init__(folder, **routers)
        self.ask("abort")
        self.until(Phase.ABORTED)
        policy = abn_policy(demo_policy(cooldown_s=0.0), 3, WEIGHT)
        self.specs = [
            as_student(make_spec(policy, "support", record(10 + n), now=self.now), "test-1", n, n * WEIGHT)
            for n in range(3)
        ]
        self.rollouts.create_all([(spec, initial(spec)) for spec in self.specs])

    def at(self, n: int) -> RolloutStatus:
        """The status of the n-th student's rollout."""
        return self.rollouts.get(self.specs[n].id).status

    def phases(self) -> list[Phase]:
        """All three phases."""
        return [self.at(n).phase for n in range(3)]

    def steps(self, count: int) -> None:
        """Let seconds pass."""
        for _ in range(count):
            self.step()

    def all_replay(self) -> bool:
        """Every rollout's trail gives its decisions again."""
        ids = [spec.id for spec in self.specs]
        return all(replay(self.rollouts.get(i), self.rollouts.audit(i)).exact for i in ids)


def test_three_students_share_one_split(tmp_path: Path) -> None:
    """Each gets its own interval under one salt; a start of three costs three versions, none of them lost."""
    world = Test3(tmp_path)
    before = world.split.version
    world.steps(4)
    split = world.split
    assert (split.version, split.salt, split.weight) == (before + 3, "test-1", WEIGHT)
    assert split.canary is not None
    assert [split.canary.name, *(s.upstream.name for s in split.others)] == [
        "student-v10",
        "student-v11",
        "student-v12",
    ]
    assert [(s.start, s.weight) for s in split.others] == [(WEIGHT, WEIGHT), (2 * WEIGHT, WEIGHT)]
    assert split.rollouts == tuple(spec.id for spec in world.specs)


def test_a_canary_set_by_hand_is_no_part_of_it(tmp_path: Path) -> None:
    """Its weight would overlap the slots; the first student that enters takes it away."""
    world = Test3(tmp_path)
    by_hand = world.split.model_copy(
        update={"version": world.split.version + 1, "canary": TEACHER, "weight": 0.5}
    )
    world.traffic.put_split(by_hand)
    world.rollouts.add_command(world.specs[0].id, "pause", "ann")  # so a slot enters first
    world.steps(4)
    split = world.split
    assert (split.canary, split.weight, [s.start for s in split.others]) == (
        None,
        0.0,
        [WEIGHT, 2 * WEIGHT],
    )


def test_a_harmful_student_is_thrown_back_alone(tmp_path: Path) -> None:
    """Its slot is freed and its digest quarantined; the others keep their units and go on."""
    world = Test3(tmp_path, students={"student-v11": BROKEN})
    while world.at(1).phase is not Phase.ROLLED_BACK and world.now < T0 + 400:
        world.step()
    assert world.at(1).phase is Phase.ROLLED_BACK
    assert "quality" in world.at(1).reason
    assert world.rollouts.quarantined("digest-11") is not None
    assert world.rollouts.quarantined("digest-10") is None
    kept = world.split
    assert (kept.weight, [(s.upstream.name, s.start) for s in kept.others]) == (
        WEIGHT,
        [("student-v12", 2 * WEIGHT)],
    )
    world.steps(150)
    assert [world.phases()[n] for n in (0, 2)] == [Phase.HELD, Phase.HELD]
    for n in (0, 2):
        assert "A/B test holds its last step until a person decides" in world.at(n).reason
        assert all(m.verdict is Verdict.PASS for m in world.at(n).metrics)
        assert world.at(n).srm is Verdict.PASS  # although the stable arm's share grew in between
    assert world.all_replay()


def test_promoting_one_ends_the_test(tmp_path: Path) -> None:
    """The promoted student is the stable arm; the others were compared with another one, and abort."""
    world = Test3(tmp_path)
    world.steps(60)
    ask(world.rollouts, "support", "promote", by="ann", model="student:12")
    world.steps(3)
    assert world.phases() == [Phase.ABORTED, Phase.ABORTED, Phase.PROMOTED]
    assert world.at(0).reason == world.at(1).reason == "the test is over: student-v12 became the stable arm"
    split = world.split
    assert (split.stable.name, split.canary, split.weight, split.others, split.rollouts) == (
        "student-v12",
        None,
        0.0,
        (),
        (),
    )
    assert world.deployer.running == {"student-v12"}
    assert world.all_replay()


def test_the_canary_may_go_while_the_slots_stay(tmp_path: Path) -> None:
    """Aborting slot 0 leaves a split without a canary whose slots still collect; then one of them wins."""
    world = Test3(tmp_path)
    world.steps(10)
    ask(world.rollouts, "support", "abort", by="ann", model="student:10")
    world.steps(3)
    assert world.at(0).phase is Phase.ABORTED
    split = world.split
    assert (split.canary, split.weight, split.rollout_id, len(split.others)) == (None, 0.0, None, 2)
    before = world.at(1).total_counts["stable"].n
    world.steps(6)
    assert world.at(1).total_counts["stable"].n > before
    ask(world.rollouts, "support", "promote", by="ann", model="student:11")
    world.steps(3)
    assert world.phases() == [Phase.ABORTED, Phase.PROMOTED, Phase.ABORTED]
    assert world.all_replay()


def test_a_student_still_warming_does_not_join_after_the_test(tmp_path: Path) -> None:
    """A late starter would be compared with the winner, which nobody asked for."""
    world = Test3(tmp_path)
    world.rollouts.add_command(world.specs[2].id, "pause", "ann")
    world.steps(6)
    assert world.phases()[2] in (Phase.PENDING, Phase.WARMING)
    ask(world.rollouts, "support", "promote", by="ann", model="student:10")
    world.steps(4)
    assert world.phases() == [Phase.PROMOTED, Phase.ABORTED, Phase.ABORTED]
    assert world.at(2).max_weight == 0.0
    assert world.all_replay()


def test_a_lost_race_on_the_split_is_retried(tmp_path: Path) -> None:
    """Somebody writes the split between reading and writing it: the roll-back comes at the next tick."""
    world = Test3(tmp_path)
    world.steps(10)
    world.rollouts.add_command(world.specs[1].id, "abort", "ann")
    state, save = world.controller._rollouts, world.controller._rollouts.save_tick
    raced: list[str] = []

    def race(tick: object) -> StoredRollout:
        if not raced:
            raced.append("once")
            split = world.split
            world.traffic.put_split(split.model_copy(update={"version": split.version + 1}))
        return save(tick)  # type: ignore[arg-type]

    state.save_tick = race  # type: ignore[method-assign]
    world.step()
    assert raced == ["once"]
    assert [s.rollout_id for s in world.split.others] == [world.specs[1].id, world.specs[2].id]
    world.steps(3)
    assert world.phases()[1] is Phase.ABORTED
    assert [s.rollout_id for s in world.split.others] == [world.specs[2].id]
    assert world.all_replay()


def test_a_killed_controller_goes_on(tmp_path: Path) -> None:
    """A new process finds the test in the store and ends it the same way."""
    world = Test3(tmp_path)
    world.steps(3)
    world.controller = world.new_controller("one")
    world.steps(60)
    ask(world.rollouts, "support", "promote", by="ann", model="student:10")
    world.controller = world.new_controller("one")
    world.steps(3)
    assert world.phases() == [Phase.PROMOTED, Phase.ABORTED, Phase.ABORTED]
    assert world.all_replay()


def test_the_ratio_is_that_of_the_student_and_stable(tmp_path: Path) -> None:
    """20 % beside two others of 20 % is a third of what its evidence sees; the report promises the same."""
    world = Test3(tmp_path)
    world.steps(40)
    for spec in world.specs:
        assert world.split.share_of(spec.id) == pytest.approx(WEIGHT / (1 - 2 * WEIGHT))
        seen = [s for s in trail.windows(spec, world.rollouts.audit(spec.id)) if s.weight is not None]
        assert seen[-1].weight == pytest.approx(1 / 3)
        assert world.rollouts.get(spec.id).status.srm is Verdict.PASS
    counts = world.at(0).step_counts
    assert counts["canary"].n / (counts["canary"].n + counts["stable"].n) == pytest.approx(1 / 3, abs=0.06)


def test_a_skewed_student_is_seen_beside_others() -> None:
    """A student that gets 20 % of what it and stable share, not a third, has a shown mismatch."""
    spec = as_student(make_spec(abn_policy(demo_policy(), 3, WEIGHT), "support", record()), "t", 0, 0.0)
    other = Slot(upstream=Upstream(name="b", model="b", app="b"), start=0.2, weight=0.4, rollout_id="b")
    split = Split(
        route="support", version=2, salt="t", stable=TEACHER, canary=spec.candidate, weight=WEIGHT,
        rollout_id=spec.id, others=(other,),
    )  # fmt: skip
    verdicts = []
    for canary in (3_330, 2_000):
        window = SeenWindow(split_version=2, stable=ArmCounts(n=10_000 - canary), canary=ArmCounts(n=canary))
        draft = Draft(spec, initial(spec), Observation(now=T0, split=split, windows=(window,)))
        draft.set(phase=Phase.RAMPING, weight=WEIGHT)
        look(draft)
        verdicts.append(draft.status.srm)
    assert verdicts == [Verdict.PASS, Verdict.FAIL]


def test_a_report_has_the_stable_rows_of_the_whole_test(tmp_path: Path) -> None:
    """A stable answer's row names the first rollout only; every student's report must see it."""
    policy = abn_policy(demo_policy(), 2, WEIGHT)
    first, second = (
        as_student(make_spec(policy, "support", record(n), now=T0), "t", n, n * WEIGHT) for n in range(2)
    )
    lines = [
        report_log.row(1, first.id, Arm.STABLE),
        report_log.row(2, first.id, Arm.CANARY),
        report_log.row(3, second.id, Arm.CANARY),
        report_log.row(4, "t2-00", Arm.STABLE),
    ]
    folder = report_log.write(tmp_path / "log", lines)
    found = {
        spec.id: [r.request_id for r in requests.rows(folder, spec, T0 + 100, requests.Scan())]
        for spec in (first, second)
    }
    assert found == {first.id: ["req-1", "req-2"], second.id: ["req-1", "req-3"]}


# what a split and a spec may be ------------------------------------------------------------------


def slot(name: str, start: float, weight: float) -> Slot:
    return Slot(
        upstream=Upstream(name=name, model=name, app=name), start=start, weight=weight, rollout_id=name
    )


def test_slots_must_not_overlap() -> None:
    """Every unit belongs to one student at most; a sum of floats that rounds up is no overlap."""
    base = {"route": "r", "version": 1, "salt": "s", "stable": TEACHER, "canary": TEACHER, "weight": 0.3}
    good = Split(**base, rollout_id="a", others=(slot("b", 0.1 + 0.2, 0.3), slot("c", 0.6, 0.1)))  # type: ignore[arg-type]
    assert [good.collects(r) for r in ("a", "b", "c", "d")] == [True, True, True, False]
    assert [u.name for u in good.upstreams] == ["teacher", "teacher", "b", "c"]
    for others, why in (
        ((slot("b", 0.29, 0.1),), "'b' begins at 0.29, inside the canary"),
        ((slot("b", 0.3, 0.2), slot("c", 0.45, 0.1)), "'c' begins at 0.45, inside 'b'"),
        ((slot("b", 0.8, 0.3),), "'b' ends at 1.1"),
        ((slot("a", 0.5, 0.1),), "rollout of its own"),
    ):
        with pytest.raises(ValidationError, match=why):
            Split(**base, rollout_id="a", others=others)  # type: ignore[arg-type]


def test_a_test_holds_one_step_until_a_person_decides() -> None:
    """A ramp, a watch or a place past 1 in a test's spec is refused; so is a slot without a test."""
    good = as_student(make_spec(abn_policy(demo_policy(), 3, WEIGHT), "support", record()), "t", 2, 0.4)
    assert (good.place, good.test) == ("support#2", "t")
    for changes in (
        {"hold_final": False},
        {"steps": (Step(weight=0.1), Step(weight=0.2))},
        {"watch_s": 60.0},
        {"mirror": 0.1},
        {"start": 0.9},
        {"test": None},
    ):
        with pytest.raises(ValidationError, match=r"test|start"):
            RolloutSpec(**{**dict(good), **changes})  # type: ignore[arg-type]


# starting ------------------------------------------------------------------------------------------


class Shop:
    """A free route and a registry with models."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.world.ask("abort")
        self.world.until(Phase.ABORTED)
        self.registry, self.folder = FakeRegistry(), folder

    def publish(self, text: str, passed: bool = True) -> ModelRecord:
        files = self.folder / f"model-{text}"
        files.mkdir(exist_ok=True)
        (files / "weights").write_text(text)
        made = record(passed=passed).model_copy(update={"version": None})
        artifact = made.artifact.model_copy(update={"digest": digest_folder(files)})
        return self.registry.publish(made.model_copy(update={"artifact": artifact}), files)

    def start(self, *models: str, weight: float = WEIGHT, **policy: object) -> list[RolloutSpec]:
        world = self.world
        return start_abn(
            world.rollouts, world.traffic, self.registry, demo_policy(**policy), "support", models, weight
        )


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Two good models and a free route."""
    made = Shop(tmp_path)
    made.publish("a")
    made.publish("b")
    return made


def test_a_start_makes_a_rollout_of_each(shop: Shop) -> None:
    """Places side by side, one test id, one error budget for all students together."""
    specs = shop.start("student:1", "student:2", watch_s=3600.0)
    assert [(s.slot, s.start, s.place) for s in specs] == [(0, 0.0, "support"), (1, WEIGHT, "support#1")]
    assert len({s.test for s in specs}) == 1
    assert specs[0].test is not None
    assert {(s.alpha_harm, s.alpha_promote, s.watch_s, s.hold_final) for s in specs} == {
        (0.025, 0.025, 0.0, True)
    }
    assert [s.spec.id for s in shop.world.rollouts.active("support")] == [s.id for s in specs]


def test_a_start_is_refused_before_anything_is_stored(shop: Shop) -> None:
    """One student that may not run stops all; nothing of the test exists then, no alias moved."""
    shop.publish("bad", passed=False)
    refusals: list[tuple[type[Exception], str, tuple[str, ...], dict[str, object]]] = [
        (GateError, "offline gates", ("student:1", "student:3"), {}),
        (NotFoundError, "student", ("student:1", "student:9"), {}),
        (ConflictError, "same artifact as student:1", ("student:1", "student:1"), {}),
        (ConfigError, "two students at least", ("student:1",), {}),
        (ConfigError, "may be 0.333 at most", ("student:1", "student:2"), {"weight": 0.34}),
        (ConfigError, "between 0 and 1", ("student:1", "student:2"), {"weight": 0.0}),
        (ConfigError, "no pairs", ("student:1", "student:2"), {"mirror": 0.1}),
        (
            ConfigError,
            "feedback on a stable answer counts for one rollout",
            ("student:1", "student:2"),
            {"metrics": (MetricSpec(kind=MetricKind.QUALITY, margin=0.1, grader="feedback"),)},
        ),
    ]
    for error, why, models, changes in refusals:
        with pytest.raises(error, match=why):
            shop.start(*models, **changes)  # type: ignore[arg-type]
    assert shop.world.rollouts.active("support") == []
    assert shop.registry.aliases("student") == {}


def test_a_third_of_the_traffic_each_is_allowed(shop: Shop) -> None:
    """Two students and stable in equal parts is the most there can be."""
    assert [s.steps[0].weight for s in shop.start("student:1", "student:2", weight=1 / 3)] == [1 / 3, 1 / 3]


def test_all_of_a_test_are_stored_or_none(shop: Shop) -> None:
    """A conflict on the last of them leaves no half test behind."""
    policy = abn_policy(demo_policy(), 2, WEIGHT)
    specs = [as_student(make_spec(policy, "support", record(n)), "t", n, n * WEIGHT) for n in range(2)]
    clash = specs[1].model_copy(update={"id": specs[0].id})
    with shop.world.engine.connect() as db:
        before = db.execute(select(func.count()).select_from(rollout_table)).scalar()
    with pytest.raises(ConflictError, match="already has an active rollout"):
        shop.world.rollouts.create_all([(specs[0], initial(specs[0])), (clash, initial(clash))])
    with shop.world.engine.connect() as db:
        assert db.execute(select(func.count()).select_from(rollout_table)).scalar() == before


def test_a_route_with_a_test_takes_no_other_rollout(shop: Shop) -> None:
    """Not even when the student in the canary's place is gone; verbs must say which student they mean."""
    shop.start("student:1", "student:2")
    world, third = shop.world, shop.publish("c")
    with pytest.raises(ConflictError, match="say --model with one of: student:1, student:2"):
        ask(world.rollouts, "support", "abort")
    with pytest.raises(NotFoundError, match="no active rollout of 'student:7'; it has: student:1, student:2"):
        ask(world.rollouts, "support", "abort", model="student:7")
    ask(world.rollouts, "support", "abort", model="student:1")
    for _ in range(4):
        world.step()
    assert [s.spec.model_ref for s in world.rollouts.active("support")] == ["student:2"]
    with pytest.raises(ConflictError, match="already has an active rollout"):
        start_rollout(
            world.rollouts, world.traffic, shop.registry, demo_policy(), "support", third.ref, force=True
        )
    assert ask(world.rollouts, "support", "pause").spec.model_ref == "student:2"


def test_routers_of_the_world_draw_all_students(tmp_path: Path) -> None:
    """The world these tests stand on: stable counts are the same for every rollout."""
    world = Test3(tmp_path)
    world.steps(6)
    assert isinstance(world.routers, Routers)
    assert GOOD != BROKEN
    version = world.split.version
    sums = []
    for spec in world.specs:
        found = [e for e in world.traffic.read_ledger("support", spec.id, {}) if e.split_version == version]
        sums.append(sum(e.counts.n for e in found if e.arm == "stable"))
    assert sums[0] > 0
    assert len(set(sums)) == 1
