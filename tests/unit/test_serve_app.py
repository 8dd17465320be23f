"""The Serve config file that `stillhouse up` and a RayService run, and the builder that Ray calls for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from contracts.config import load_config
from contracts.errors import ConfigError, ConflictError, NotFoundError
from contracts.model import Artifact, ModelRecord
from contracts.traffic import Split
from registry.digest import digest_folder
from registry.fake import FakeRegistry
from serve import app as module
from serve.app import build, declare_routes, make_deployer, revision_of, serve_config, wait_for_revision
from serve.config import ServeConfig
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

STACK = """
run_dir: {run_dir}
http: {{host: 0.0.0.0, port: 8123}}
upstreams:
  teacher: {{engine: {{model: some/model, num_replicas: 2, num_cpus: 3}}}}
  hosted: {{url: "http://127.0.0.1:9", model: big}}
routes: {{support: teacher}}
router: {{replicas: 3, num_cpus: 0.5}}
"""


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    """A stack's configuration as it lies in a pod."""
    file = tmp_path / "stillhouse.yaml"
    file.write_text(STACK.format(run_dir=tmp_path / "run"))
    return file


def built(file: Path, application: str, **more: str) -> Any:
    """What Ray deploys for one application."""
    return build({"config": str(file), "application": application, **more})._bound_deployment


def test_serve_config_is_what_rays_schema_takes(stack_file: Path) -> None:
    """Every engine of ours, the router at '/', the controller; a hosted upstream is no application."""
    told = serve_config(load_config(stack_file, ServeConfig), "/etc/stack.yaml", "abc")
    parsed = ServeDeploySchema.model_validate(told)
    assert [(a.name, a.route_prefix) for a in parsed.applications] == [
        ("upstream-teacher", None),
        ("stillhouse-router", "/"),
        ("stillhouse-controller", None),
    ]
    assert {a.import_path for a in parsed.applications} == {"serve.app:build"}
    assert [a.args.get("revision") for a in parsed.applications] == [None, "abc", "abc"]
    assert parsed.http_options.port == 8123


def test_build_makes_each_application_from_the_file(stack_file: Path) -> None:
    """What Ray deploys is what the file says: replicas, reserved CPUs, the model."""
    router = built(stack_file, "stillhouse-router")
    assert (router.num_replicas, router.ray_actor_options["num_cpus"]) == (3, 0.5)
    engine = built(stack_file, "upstream-teacher")
    assert (engine.num_replicas, engine.ray_actor_options["num_cpus"]) == (2, 3)
    assert engine.init_args[:3] == ("upstream-teacher", "some/model", "teacher")
    controller = built(stack_file, "stillhouse-controller")
    assert (controller.num_replicas, controller.init_args[0]["http"]["port"]) == (1, 8123)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"application": "upstream-hosted"}, "it has: upstream-teacher, stillhouse-router"),
        ({"application": "stillhouse-router", "replicas": "4"}, "replicas: unknown key"),
        ({}, "application: Field required"),
    ],
)
def test_wrong_arguments_are_named(stack_file: Path, args: dict[str, Any], says: str) -> None:
    """Ray shows this message as the application's status; it must say what to correct."""
    with pytest.raises(ConfigError, match=says):
        build({"config": str(stack_file), **args})


def test_build_waits_for_the_revision_that_was_asked_for(
    stack_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Serve config is there at once, the ConfigMap's new file only after the kubelet brought it."""
    new = stack_file.read_bytes().replace(b"replicas: 3", b"replicas: 5")
    waits: list[float] = []

    def kubelet(seconds: float) -> None:
        waits.append(seconds)
        stack_file.write_bytes(new)

    monkeypatch.setattr(module.time, "sleep", kubelet)
    router = built(stack_file, "stillhouse-router", revision=revision_of(new))
    assert router.num_replicas == 5
    assert len(waits) == 1
    assert revision_of(new) == hashlib.sha256(new).hexdigest()[:12]


def test_a_revision_that_never_comes_is_an_error(tmp_path: Path) -> None:
    """A Serve config whose revision nobody updated says so, instead of running an old file."""
    with pytest.raises(ConfigError, match="is no file, and 0123"):
        wait_for_revision(tmp_path / "absent.yaml", "0123", timeout_s=0.0)


def test_routes_are_declared_again_when_another_writer_was_faster(
    stack_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two controllers start in a cluster switch; the second finds the first one's splits."""
    config = load_config(stack_file, ServeConfig)
    engine = open_state(config.state_url)
    traffic = TrafficState(engine)
    put, lost = traffic.put_split, []

    def race(split: Split) -> None:
        if not lost:
            lost.append(split)
            put(split.model_copy(update={"salt": "theirs"}))
            raise ConflictError("somebody wrote in between")
        put(split)

    monkeypatch.setattr(traffic, "put_split", race)
    declare_routes(config, traffic, SettingsState(engine))
    found = traffic.get_split("support")
    assert found is not None
    assert (found.salt, found.version) == ("theirs", 1)


def test_students_may_have_a_draft_out_of_the_registry(
    stack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As upstreams: the controller deploys its students with the draft's folder; one that is not
    there is named."""
    registry, folder = FakeRegistry(), tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    artifact = Artifact(uri=str(folder), digest=digest_folder(folder), precision="bf16", bytes=2, params=1)
    registry.publish(ModelRecord(name="tiny", artifact=artifact, created_at=1.0), folder)
    monkeypatch.setattr("registry.mlflow_store.open_registry", lambda uri: registry)
    with stack_file.open("a") as more:
        more.write('students: {speculative: {draft: "registry:tiny:1"}}\n')
    config = load_config(stack_file, ServeConfig)
    traffic = TrafficState(open_state(f"sqlite:///{tmp_path}/state.db"))
    drafting = make_deployer(config, traffic)._options.speculative
    assert drafting is not None
    assert drafting.draft == str(folder)
    stack_file.write_text(stack_file.read_text().replace("tiny:1", "tiny:2"))
    with pytest.raises(NotFoundError):
        make_deployer(load_config(stack_file, ServeConfig), traffic)
