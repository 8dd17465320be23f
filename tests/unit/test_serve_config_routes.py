"""What `up` does to the routes: first start, restart, a changed file, a reset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contracts.config import parse_config
from contracts.errors import StateError
from contracts.metrics import MetricKind, MetricSpec
from contracts.rollout import RolloutSpec, RolloutStatus, Step
from contracts.traffic import Slot, Split, Upstream
from serve.app import write_routes
from serve.config import ServeConfig
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from serve.students import Students, check_students
from tests.unit.cluster_world import Cluster

STUDENT = Upstream(name="s-v1", model="s-v1", app="s-v1", digest="d")


def config_for(folder: Path, **teacher: Any) -> ServeConfig:
    """A stack with one route to a teacher."""
    data = {"run_dir": str(folder), "upstreams": {"teacher": teacher or {"engine": {"model": "m"}}}}
    return parse_config({**data, "routes": {"support": "teacher"}}, ServeConfig)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[TrafficState, RolloutState]:
    """The state of a fresh run folder."""
    engine = open_state(config_for(tmp_path).state_url)
    return TrafficState(engine), RolloutState(engine)


def promoted(traffic: TrafficState) -> Split:
    """The route after a student took it over."""
    before = traffic.get_split("support")
    assert before is not None
    after = before.model_copy(update={"version": before.version + 1, "stable": STUDENT})
    traffic.put_split(after)
    return after


def test_first_start_writes_version_1(tmp_path: Path, stores: tuple[TrafficState, RolloutState]) -> None:
    """Every configured route answers from its configured upstream."""
    write_routes(config_for(tmp_path), stores[0])
    split = stores[0].get_split("support")
    assert split is not None
    assert (split.version, split.stable.app, split.weight) == (1, "upstream-teacher", 0.0)


def test_restart_keeps_a_promoted_student(tmp_path: Path, stores: tuple[TrafficState, RolloutState]) -> None:
    """A restart is not a rollback."""
    write_routes(config_for(tmp_path), stores[0])
    after = promoted(stores[0])
    write_routes(config_for(tmp_path), stores[0])
    assert stores[0].get_split("support") == after


def test_a_changed_upstream_is_taken_over(tmp_path: Path, stores: tuple[TrafficState, RolloutState]) -> None:
    """The file is the truth about declared upstreams."""
    write_routes(config_for(tmp_path), stores[0])
    write_routes(config_for(tmp_path, url="http://127.0.0.1:9", model="big"), stores[0])
    split = stores[0].get_split("support")
    assert split is not None
    assert (split.version, split.stable.url, split.stable.model) == (2, "http://127.0.0.1:9", "big")


def test_reset_goes_back_to_the_file(tmp_path: Path, stores: tuple[TrafficState, RolloutState]) -> None:
    """`up --reset-routes` is the way out when a student's artifact is gone."""
    write_routes(config_for(tmp_path), stores[0])
    promoted(stores[0])
    write_routes(config_for(tmp_path), stores[0], reset=True)
    split = stores[0].get_split("support")
    assert split is not None
    assert (split.version, split.stable.name, split.canary) == (3, "teacher", None)


def test_the_students_of_a_test_are_the_splits_too(
    tmp_path: Path, stores: tuple[TrafficState, RolloutState]
) -> None:
    """A restart must bring the slots' applications back, or say who nobody knows; a reset drops them."""
    config, (traffic, _) = config_for(tmp_path), stores
    students = Students(config, open_state(config.state_url), Cluster())
    write_routes(config, traffic)
    before = traffic.get_split("support")
    assert before is not None
    slot = Slot(upstream=STUDENT, start=0.2, weight=0.2, rollout_id="r-01")
    traffic.put_split(before.model_copy(update={"version": 2, "others": (slot,)}))
    with pytest.raises(StateError, match="points to application 's-v1'"):
        check_students(students)
    write_routes(config, traffic, reset=True)
    after = traffic.get_split("support")
    assert after is not None
    assert (after.version, after.others, after.stable.name) == (3, (), "teacher")
    assert check_students(students) == []


def test_students_of_splits_are_redeployed(tmp_path: Path, stores: tuple[TrafficState, RolloutState]) -> None:
    """A split names an application, its rollout knows the artifact; without one the error says what to do."""
    traffic, rollouts = stores
    config = config_for(tmp_path)
    students = Students(config, open_state(config.state_url), Cluster())
    write_routes(config, traffic)
    assert check_students(students) == []
    promoted(traffic)
    with pytest.raises(StateError, match="--reset-routes"):
        check_students(students)
    spec = RolloutSpec(
        id="r1",
        route="support",
        model_ref="s:1",
        candidate=STUDENT,
        artifact_uri="/models/s",
        steps=(Step(weight=0.5),),
        metrics=(MetricSpec(kind=MetricKind.ERRORS, margin=0.1),),
        created_at=0.0,
    )
    rollouts.create(spec, RolloutStatus(id="r1"))
    assert check_students(students) == ["s-v1"]
    assert students.needs().deploy == {"s-v1": (STUDENT, "/models/s")}
