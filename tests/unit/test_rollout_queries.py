"""Rollouts judged by an external Prometheus and by mirrored pairs, through the real controller and store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.gates import Verdict
from contracts.metrics import PAIR, SCORE_VALUES, ArmCounts, MetricKind, MetricSpec, QuerySpec, score_bin
from contracts.rollout import LedgerEntry, Phase
from serve.rollout.queries import QueryReader
from serve.rollout.replay import replay
from tests.unit.rollout_world import T0, World, demo_policy
from tests.unit.test_queries import FakePrometheus, config, vector

ERRORS = MetricSpec(kind=MetricKind.ERRORS, margin=0.05)
BOUNCED = MetricSpec(
    kind=MetricKind.QUERY, name="bounced", margin=0.05, tolerance=0.02,
    query=QuerySpec(bad='bad{arm="{{arm}}"}', total='all{arm="{{arm}}"}'),
)  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePrometheus]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = FakePrometheus()
    yield made
    made.close()


class QueriedWorld(World):
    """A world whose controllers ask a Prometheus."""

    def __init__(self, folder: Path, fake: FakePrometheus, *metrics: MetricSpec, **policy: Any) -> None:
        self.prometheus = fake
        super().__init__(folder, demo_policy(metrics=metrics, **policy))

    def new_controller(self, holder: str = "one") -> Any:
        controller = super().new_controller(holder)
        controller._observer._queries = QueryReader(config(self.prometheus, lag_s=0.0))
        return controller


def counters(bad_stable: float, bad_canary: float) -> Any:
    """Counters since T0: 50 requests a second and arm, with these shares of bad ones."""

    def answer(query: str, at: float) -> Any:
        total = int(50 * max(0.0, at - T0))
        share = bad_canary if "canary" in query else bad_stable
        return vector(total if query.startswith("all") else int(share * total))

    return answer


def test_what_prometheus_says_rolls_a_student_back(tmp_path: Path, fake: FakePrometheus) -> None:
    """Every request succeeds, yet users of the canary bounce: harm, by name; and the trail replays exactly,
    with Prometheus gone.
    """
    fake.answer = counters(0.02, 0.30)
    world = QueriedWorld(tmp_path, fake, ERRORS, BOUNCED)
    status = world.until(Phase.ROLLED_BACK)
    assert status.phase is Phase.ROLLED_BACK
    assert "bounced" in status.reason
    fake.answer = lambda _query, _at: b"gone"
    again = replay(world.stored, world.rollouts.audit(world.spec.id))
    assert again.exact, again.mismatches
    assert again.final == world.status


def test_a_healthy_student_is_promoted_on_both(tmp_path: Path, fake: FakePrometheus) -> None:
    """The query must be shown no worse like every other guardrail."""
    fake.answer = counters(0.02, 0.02)
    status = QueriedWorld(tmp_path, fake, ERRORS, BOUNCED).until(Phase.PROMOTED)
    assert status.phase is Phase.PROMOTED
    assert {m.name: m.verdict for m in status.metrics} == {"errors": Verdict.PASS, "bounced": Verdict.PASS}


def test_no_count_is_lost_or_doubled_by_controllers_that_die(tmp_path: Path, fake: FakePrometheus) -> None:
    """A new controller at every tick: what the tests have seen is what the counters gained, to the last
    one."""
    fake.answer = counters(0.02, 0.02)
    world = QueriedWorld(tmp_path, fake, ERRORS, BOUNCED)
    world.until(Phase.RAMPING)
    since = world.status.step_since
    for _ in range(7):
        world.controller = world.new_controller()
        world.step()
        if world.status.step > 0:
            break
    (bounced,) = (m for m in world.status.metrics if m.name == "bounced")
    until = world.status.cursor["prometheus"] / 1000
    gained = int(50 * (until - T0)) - int(50 * (since - T0))
    assert gained > 100
    assert bounced.state["counts"][0] == bounced.state["counts"][2] == gained


def test_a_query_without_data_never_promotes(tmp_path: Path, fake: FakePrometheus) -> None:
    """All else is proven; the rollout holds, the verdict is NO_DATA, and the audit says what Prometheus
    said."""
    fake.answer = lambda query, _at: vector() if "bad" in query else vector(5)
    world = QueriedWorld(tmp_path, fake, ERRORS, BOUNCED)
    for _ in range(120):
        world.step()
    status = world.status
    assert (status.phase, status.decision) == (Phase.HELD, None)
    assert {m.name: m.verdict for m in status.metrics}["bounced"] is Verdict.NO_DATA
    looks = [e for e in world.rollouts.audit(world.spec.id) if e.kind == "look"]
    problem = looks[-1].body["observation"]["queries"]["bounced"]["problem"]
    assert 'bad{arm="stable"}` returned nothing' in problem


def test_a_value_out_of_bounds_three_looks_in_a_row_is_harm(tmp_path: Path, fake: FakePrometheus) -> None:
    """Two are not, and a look without data in between neither counts nor forgives."""
    slow = MetricSpec(
        kind=MetricKind.QUERY, name="slow", margin=0.1, query=QuerySpec(value="p99", at_most=2.0, failures=3)
    )
    said = [1.0, 5.0, 5.0, 1.0, 5.0, "NaN", 5.0, 5.0]
    fake.answer = lambda _query, _at: vector(said.pop(0) if len(said) > 1 else said[0])
    world = QueriedWorld(tmp_path, fake, ERRORS, slow)
    status = world.until(Phase.ROLLED_BACK)
    assert status.phase is Phase.ROLLED_BACK
    assert "slow" in status.reason
    assert len(said) == 1


def test_the_ramp_writes_the_mirror_and_the_end_takes_it_back(tmp_path: Path) -> None:
    """Splits of every step carry the policy's share; without a canary there is none."""
    world = World(tmp_path, demo_policy(metrics=(ERRORS,), mirror=0.25))
    world.until(Phase.RAMPING)
    assert (world.split.weight, world.split.mirror) == (0.01, 0.25)
    world.ask("abort")
    world.step()
    assert (world.split.canary, world.split.mirror) == (None, 0.0)


@pytest.mark.parametrize(("value", "phase"), [(0.5, Phase.PROMOTED), (0.25, Phase.ROLLED_BACK)])
def test_mirrored_pairs_decide(tmp_path: Path, value: float, phase: Phase) -> None:
    """Ties promote, losses roll back; both on what the ledger holds under `pair` alone."""
    judged = MetricSpec(kind=MetricKind.PAIRS, grader="helpful", margin=0.1)
    world = World(tmp_path, demo_policy(metrics=(ERRORS, judged), mirror=0.5))
    scores = [0] * len(SCORE_VALUES)
    scores[score_bin(value)] = 5
    seq = 0
    while not world.status.phase.terminal and world.now < T0 + 900:
        split = world.split
        if split.rollout_id is not None:
            seq += 1
            entry = LedgerEntry(
                replica="judge", seq=seq, route="support", rollout_id=split.rollout_id, arm=PAIR,
                split_version=split.version, at=world.now,
                counts=ArmCounts(scores={"helpful": tuple(scores)}),
            )  # fmt: skip
            world.traffic.append_ledger([entry])
        world.step()
    assert world.status.phase is phase
    assert replay(world.stored, world.rollouts.audit(world.spec.id)).exact
