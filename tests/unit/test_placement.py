"""Placement by named resources: what a configuration may say, and what Ray is told for it."""

from __future__ import annotations

from typing import Any

import pytest

from contracts.config import parse_config
from contracts.errors import ConfigError
from distill_jobs.training.config import TrainConfig
from serve.app import build_controller_app, engine_applications
from serve.config import ServeConfig
from serve.router.deployment import build_router_app


def parse(**changes: Any) -> ServeConfig:
    """A stack of two nodes with changes."""
    data = {
        "run_dir": "/tmp/x",
        "ray": {
            "resources": {"routers": 1, "controller": 1},
            "nodes": {"second": {"resources": {"routers": 1, "engines": 2}}},
        },
        "upstreams": {"teacher": {"engine": {"model": "m"}}},
        "routes": {"support": "teacher"},
    }
    return parse_config({**data, **changes}, ServeConfig)


def test_each_part_reserves_what_its_section_says() -> None:
    """Ray gets the resources of a replica's section, and how many of them one node may have."""
    placed = parse(
        router={"num_cpus": 0.5, "resources": {"routers": 1}, "max_replicas_per_node": 1},
        controller={"resources": {"controller": 1}},
        upstreams={"teacher": {"engine": {"model": "m", "resources": {"engines": 0.5}, "num_gpus": 1}}},
    )
    router = build_router_app(placed.router_config(), 2, "/tmp/x/metrics", placement=placed.router)
    engine = engine_applications(placed)["upstream-teacher"]
    found = [_options(app) for app in (router, build_controller_app(placed), engine)]
    assert [options["resources"] for options, _ in found] == [
        {"routers": 1},
        {"controller": 1},
        {"engines": 0.5},
    ]
    assert [options["num_cpus"] for options, _ in found] == [0.5, 0.1, 0.1]
    assert [most for _, most in found] == [1, None, None]
    assert found[2][0]["num_gpus"] == 1


def _options(app: Any) -> tuple[dict[str, Any], int | None]:
    """What Ray Serve holds of an application's one deployment."""
    replica = app._bound_deployment._replica_config
    return replica.ray_actor_options, replica.max_replicas_per_node


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": {"resources": {"students": 1}}}, "students.resources: no node has 'students'"),
        ({"router": {"resources": {"router": 1}}}, "router.resources: no node has 'router'"),
        (
            {"upstreams": {"teacher": {"engine": {"model": "m", "resources": {"gpu-a": 1}}}}},
            "upstreams.teacher.engine.resources: no node has 'gpu-a'",
        ),
        ({"ray": {"address": "auto", "nodes": {"b": {}}}}, "not with ray.address"),
        ({"ray": {"nodes": {"b": {"resources": {"x": 0}}}}}, "ray.nodes.b.resources.x"),
        ({"ray": {"nodes": {"a b": {}}}}, "ray.nodes"),
        ({"router": {"max_replicas_per_node": 0}}, "router.max_replicas_per_node"),
    ],
)
def test_what_could_never_be_placed_is_refused(changes: dict[str, Any], message: str) -> None:
    """A replica that no node has room for would wait forever without a word; the error names the field."""
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


def test_on_a_cluster_the_resources_are_the_clusters() -> None:
    """Its worker groups say what they have; one may be scaled to zero at the moment."""
    config = parse(ray={"address": "auto"}, students={"resources": {"students": 1}})
    assert config.students.options().reserved()["resources"] == {"students": 1}


def test_training_reserves_its_resources_and_brings_them_where_it_starts_ray() -> None:
    """Workers run on the nodes of training; a Ray of the job's own has what they ask for. The student is the
    same wherever it was trained."""
    config = TrainConfig(workers=2, cpus_per_worker=0.5, resources_per_worker={"train": 1})
    assert config.worker_resources == {"CPU": 0.5, "train": 1}
    assert TrainConfig(use_gpu=True).worker_resources == {"CPU": 1, "GPU": 1}
    assert config.ray_resources == {"train": 3}
    assert "resources_per_worker" in TrainConfig.OPERATIONAL
