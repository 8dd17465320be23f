"""Which students a cluster runs: those that the store's splits and rollouts need, whoever put them there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from contracts.config import parse_config
from contracts.metrics import MetricKind, MetricSpec
from contracts.rollout import Phase, RolloutSpec, RolloutStatus, Step
from contracts.traffic import Split, Upstream
from serve import students as module
from serve.config import ServeConfig
from serve.state.rollouts import RolloutState, Tick
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from serve.students import Students
from tests.unit.cluster_world import Cluster

TEACHER = Upstream(name="teacher", model="teacher", app="upstream-teacher")
OLD, NEW = (Upstream(name=f"s-v{n}", model=f"s-v{n}", app=f"s-v{n}", digest=f"d{n}") for n in (1, 2))


class Store:
    """A state store that several clusters share."""

    def __init__(self, folder: Path) -> None:
        data = {"run_dir": str(folder), "upstreams": {"teacher": {"engine": {"model": "m"}}}}
        self.config = parse_config({**data, "routes": {"support": "teacher"}}, ServeConfig)
        self.engine = open_state(self.config.state_url)
        self.traffic, self.rollouts = TrafficState(self.engine), RolloutState(self.engine)
        self.version = 0

    def students(self, cluster: Cluster) -> Students:
        """What keeps the students of a cluster."""
        return Students(self.config, self.engine, cluster)

    def split(self, stable: Upstream, canary: Upstream | None = None) -> None:
        """Write the route's split."""
        self.version += 1
        more = {} if canary is None else {"canary": canary, "weight": 0.3, "rollout_id": "r"}
        self.traffic.put_split(
            Split(route="support", version=self.version, salt="s", stable=stable, **more)  # type: ignore[arg-type]
        )

    def rollout(self, candidate: Upstream, phase: Phase, stable: Upstream | None = None) -> None:
        """A rollout in some phase; a route has one that has not ended at most."""
        spec = RolloutSpec(
            id=f"r-{candidate.name}",
            route="support",
            model_ref="s:1",
            candidate=candidate,
            artifact_uri=f"/models/{candidate.name}",
            steps=(Step(weight=0.5),),
            metrics=(MetricSpec(kind=MetricKind.ERRORS, margin=0.1),),
            created_at=0.0,
        )
        self.rollouts.create(spec, RolloutStatus(id=spec.id))
        before = self.rollouts.get_many([spec.id])[0]
        self.rollouts.save_tick(Tick(before, RolloutStatus(id=spec.id, phase=phase, stable=stable)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return Store(tmp_path)


@pytest.mark.parametrize("phase", [Phase.WARMING, Phase.RAMPING, Phase.HELD, Phase.PAUSED, Phase.WATCHING])
def test_a_fresh_cluster_deploys_the_students_of_a_running_rollout(store: Store, phase: Phase) -> None:
    """A new cluster beside the old, or after it was lost, has nothing but the store: it deploys the rollout's
    student and the champion that the rollout would restore, with their artifacts, once."""
    store.rollout(OLD, Phase.PROMOTED)
    store.split(OLD, NEW)
    store.rollout(NEW, phase, stable=OLD)
    cluster = Cluster()
    students = store.students(cluster)
    assert not students.settled()
    students.look()
    assert students.settled()
    assert cluster.artifacts == {"s-v1": "/models/s-v1", "s-v2": "/models/s-v2"}
    students.look()
    assert cluster.deleted == []


def test_a_promoted_student_comes_back_and_declared_upstreams_are_the_files(store: Store) -> None:
    """What a split names and no rollout deployed is deployed with the stack, by its configuration."""
    store.rollout(OLD, Phase.PROMOTED)
    store.split(OLD, TEACHER)
    cluster = Cluster()
    store.students(cluster).look()
    assert cluster.artifacts == {"s-v1": "/models/s-v1"}


def test_a_pending_student_is_its_controllers_to_deploy(store: Store) -> None:
    """It may wait for consent, so only the leading controller starts it; where it runs it stays."""
    store.split(TEACHER)
    store.rollout(NEW, Phase.PENDING)
    cluster = Cluster()
    students = store.students(cluster)
    students.look()
    assert cluster.artifacts == {}
    cluster.status["s-v2"] = "DEPLOYING"
    students.look()
    assert cluster.deleted == []


@pytest.mark.parametrize("phase", [Phase.ROLLING_BACK, Phase.PROMOTING])
def test_a_loser_that_drains_is_kept_and_never_started_again(store: Store, phase: Phase) -> None:
    """Its last requests run; the leading controller deletes it, and nobody deploys it in that moment."""
    store.split(TEACHER)
    store.rollout(NEW, phase, stable=OLD)
    cluster = Cluster()
    students = store.students(cluster)
    cluster.status["s-v2"] = "RUNNING"
    students.look()
    assert (cluster.deleted, cluster.artifacts) == ([], {})


def test_a_student_that_nobody_needs_is_deleted_and_strangers_are_left_alone(store: Store) -> None:
    """The leader of the other cluster deletes its own copy only; what no rollout deployed is not ours."""
    store.split(TEACHER)
    store.rollout(NEW, Phase.ROLLED_BACK)
    cluster = Cluster()
    cluster.status = {
        "s-v2": "RUNNING", "upstream-teacher": "RUNNING", "stillhouse-router": "RUNNING", "x": "RUNNING"
    }  # fmt: skip
    students = store.students(cluster)
    students.look()
    students.look()
    assert cluster.deleted == ["s-v2"]


def test_one_that_cannot_be_deployed_holds_up_nobody_and_is_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal costs the others nothing; a failed deployment counts as settled, and begins again when its
    time has come."""
    store.rollout(OLD, Phase.PROMOTED)
    store.split(OLD, NEW)
    store.rollout(NEW, Phase.RAMPING, stable=OLD)
    cluster = Cluster()
    cluster.refuses = {"s-v1"}
    students = store.students(cluster)
    students.look()
    assert cluster.artifacts == {"s-v2": "/models/s-v2"}
    cluster.refuses = set()
    cluster.status["s-v1"] = "DEPLOY_FAILED"
    students.look()
    assert students.wait_settled(60, threading.Event())
    assert cluster.deleted == []
    monkeypatch.setattr(module, "RETRY_S", -1.0)
    students.look()
    assert cluster.deleted == ["s-v1"]
    students.look()
    assert cluster.status == {"s-v1": "RUNNING", "s-v2": "RUNNING"}
