"""The real Deployer, with Ray Serve's status and the engines' HTTP replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from contracts.errors import EngineError
from contracts.traffic import Upstream
from serve.engine import deployer as module
from serve.engine.config import EngineOptions
from serve.engine.deployer import ServeDeployer
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

STUDENT = Upstream(name="s-v1", model="s-v1", app="s-v1")
HOSTED = Upstream(name="h", model="h", url="http://127.0.0.1:9")


class World:
    """What Ray Serve and the engines say, and what was asked of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        url = f"sqlite:///{folder}/state.db"
        self.traffic = TrafficState(open_state(url))
        self.deployer = ServeDeployer(self.traffic, EngineOptions(), url, str(folder))
        self.status: tuple[ApplicationStatus, str] | None = None
        self.deployed: list[str] = []
        self.deleted: list[str] = []
        self.asked: list[tuple[str, str]] = []
        monkeypatch.setattr(module, "application_status", lambda app: self.status)
        monkeypatch.setattr(module, "deploy_application", lambda app, target: self.deployed.append(app))
        monkeypatch.setattr(module.ray_serve, "delete", lambda app, _blocking: self.deleted.append(app))
        monkeypatch.setattr(module, "healthy", lambda url: True)
        monkeypatch.setattr(module, "ask_chat", self._ask)

    def _ask(self, url: str, model: str, **_: Any) -> str:
        self.asked.append((url, model))
        return "yes"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A deployer on a state store of its own."""
    return World(tmp_path, monkeypatch)


def test_deploy_is_idempotent(world: World) -> None:
    """The controller calls it at every tick until the student is ready."""
    world.deployer.deploy(STUDENT, "/some/folder")
    assert world.deployed == ["s-v1"]
    for status in (ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY):
        world.status = (status, "")
        world.deployer.deploy(STUDENT, "/some/folder")
    assert world.deployed == ["s-v1"]


def test_deploy_waits_for_a_deletion(world: World) -> None:
    """An application that is on its way out is not the one that was asked for."""
    world.status = (ApplicationStatus.DELETING, "")
    with pytest.raises(EngineError, match="still being deleted"):
        world.deployer.deploy(STUDENT, "/some/folder")


def test_ready_needs_a_registered_replica(world: World) -> None:
    """Running is not enough: the router can only reach what is registered."""
    world.status = (ApplicationStatus.RUNNING, "")
    assert world.deployer.ready(STUDENT) is False
    world.traffic.put_endpoint("s-v1", "r1", "http://127.0.0.1:1", 1)
    assert world.deployer.ready(STUDENT) is True


def test_a_failed_deployment_is_an_error_with_its_cause(world: World) -> None:
    """A bad checkpoint must end the rollout with the engine's own words."""
    world.status = (ApplicationStatus.DEPLOY_FAILED, "ValueError: no such architecture")
    with pytest.raises(EngineError, match="no such architecture"):
        world.deployer.ready(STUDENT)


def test_probe_asks_every_replica_and_fails_without_one(world: World) -> None:
    """No user may be a replica's first request."""
    with pytest.raises(EngineError, match="no replica to probe"):
        world.deployer.probe(STUDENT)
    world.traffic.put_endpoint("s-v1", "r1", "http://127.0.0.1:1", 1)
    world.traffic.put_endpoint("s-v1", "r2", "http://127.0.0.1:2", 2)
    world.deployer.probe(STUDENT)
    assert {url for url, _ in world.asked} == {"http://127.0.0.1:1", "http://127.0.0.1:2"}
    assert {model for _, model in world.asked} == {"s-v1"}


def test_in_flight_adds_up_and_ignores_the_dead(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that does not answer must not keep a rollout from draining."""
    world.traffic.put_endpoint("s-v1", "r1", "http://127.0.0.1:1", 1)
    world.traffic.put_endpoint("s-v1", "r2", "http://127.0.0.1:2", 2)
    assert world.deployer.in_flight(HOSTED) == 0

    def load(url: str) -> int:
        if url.endswith(":2"):
            raise EngineError("gone")
        return 3

    monkeypatch.setattr(module, "requests_in_engine", load)
    assert world.deployer.in_flight(STUDENT) == 3


def test_retire_deletes_once_and_clears_the_registrations(world: World) -> None:
    """Called again after a crash it does nothing; rows of killed replicas go with the application."""
    world.traffic.put_endpoint("s-v1", "r1", "http://127.0.0.1:1", 1)
    world.status = (ApplicationStatus.RUNNING, "")
    world.deployer.retire(STUDENT)
    world.status = (ApplicationStatus.DELETING, "")
    world.deployer.retire(STUDENT)
    world.status = None
    world.deployer.retire(STUDENT)
    assert world.deleted == ["s-v1"]
    assert world.traffic.endpoints() == {}


def test_what_is_not_ours_is_refused(world: World) -> None:
    """A URL upstream belongs to somebody else."""
    for action in (world.deployer.retire, lambda u: world.deployer.deploy(u, "x")):
        with pytest.raises(EngineError, match="not ours"):
            action(HOSTED)
