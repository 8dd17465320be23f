"""The stack's configuration: what it fills in, what it refuses and how it says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contracts.config import parse_config
from contracts.errors import ConfigError
from serve.config import ServeConfig, find_config, load_serve_config

ROOT = Path(__file__).resolve().parents[2]


def parse(**changes: Any) -> ServeConfig:
    """A minimal configuration with changes."""
    data = {
        "run_dir": "/tmp/x",
        "upstreams": {"teacher": {"engine": {"model": "some/model"}}},
        "routes": {"support": "teacher"},
    }
    return parse_config({**data, **changes}, ServeConfig)


def test_defaults_live_in_the_run_dir() -> None:
    """One folder holds a stack; deleting it deletes all of its state."""
    config = parse()
    assert config.state_url == "sqlite:////tmp/x/state.db"
    assert config.registry_uri == "sqlite:////tmp/x/registry/mlflow.db"
    log = config.router_config().log
    assert log is not None
    assert log.dir == "/tmp/x/requests"
    assert config.router_config().routes == ("support",)


def test_run_dir_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replicas run elsewhere; a relative path would be another folder there."""
    monkeypatch.chdir(tmp_path)
    assert parse(run_dir="here").run_dir == tmp_path / "here"


def test_upstreams_become_nouns() -> None:
    """An engine of ours is a Serve application, a url stays a url and keeps its key's variable."""
    hosted = {"url": "https://api.test/v1/", "model": "big", "api_key_env": "KEY"}
    config = parse(upstreams={"teacher": {"engine": {"model": "m"}}, "hosted": hosted})
    teacher, other = config.upstream_nouns()
    assert (teacher.app, teacher.model, teacher.url) == ("upstream-teacher", "teacher", None)
    assert (other.url, other.model, other.api_key_env) == ("https://api.test", "big", "KEY")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"routes": {"support": "nobody"}},
            "routes.support: there is no upstream 'nobody'; there are: teacher",
        ),
        ({"routes": {}}, "at least one entry"),
        ({"upstreams": {"teacher": {}}}, "upstreams.teacher: .*exactly one of 'engine'"),
        ({"upstreams": {"teacher": {"url": "https://x.test"}}}, "'url' needs 'model'"),
        ({"upstreams": {"a b": {"engine": {"model": "m"}}}, "routes": {"r": "a b"}}, "not a b"),
        ({"router": {"replicas": 0}}, "router.replicas"),
        ({"router": {"state_url": "sqlite:///x"}}, "router.state_url: .*top level"),
        ({"http": {"port": 99999}}, "http.port"),
        ({"teachers": {}}, "teachers: unknown key; known keys: .*upstreams"),
        ({"policies": {"p": {"steps": []}}}, "policies.p"),
        (
            {"graders": {"g": {"kind": "judge", "upstream": "x"}}},
            r"graders\.g\.upstream: there is no upstream 'x'",
        ),
        (
            {"graders": {"g": {"kind": "exact", "against": "x"}}},
            r"graders\.g\.against: there is no upstream 'x'",
        ),
        (
            {"graders": {"g": {"kind": "exact", "routes": ["x"]}}},
            r"graders\.g\.routes: there is no route 'x'",
        ),
        ({"router": {"graders": {"g": {"kind": "exact"}}}}, "router.graders: .*top level"),
        ({"graders": {"g": {"kind": "regex", "pattern": "("}}}, "graders.g.regex.pattern: .*not a regular"),
        ({"prometheus": {"url": "prometheus:9090"}}, "prometheus.url"),
    ],
)
def test_errors_name_the_field_and_the_fix(changes: dict[str, Any], message: str) -> None:
    """A person reads these with an editor open; each must lead to the line."""
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


def test_search_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Argument, environment, ./stillhouse.yaml, ./configs/stillhouse.yaml, else an error that lists them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STILLHOUSE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"stillhouse\.yaml and configs/stillhouse\.yaml .*--config"):
        find_config()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stillhouse.yaml").touch()
    assert find_config() == Path("configs/stillhouse.yaml")
    (tmp_path / "stillhouse.yaml").touch()
    assert find_config() == Path("stillhouse.yaml")
    monkeypatch.setenv("STILLHOUSE_CONFIG", "/env.yaml")
    assert find_config() == Path("/env.yaml")
    assert find_config("/argument.yaml") == Path("/argument.yaml")


def test_the_router_is_told_of_the_upstreams_that_graders_name() -> None:
    """Judges and references become nouns with their keys' variables; the others stay out of it."""
    hosted = {"url": "https://api.test/v1/", "model": "big", "api_key_env": "KEY"}
    graders = {
        "helpful": {"kind": "judge", "upstream": "hosted", "against": "teacher"},
        "form": {"kind": "json_schema", "schema": {"type": "object"}},
    }
    upstreams = {n: {"engine": {"model": "m"}} for n in ("teacher", "other")}
    config = parse(upstreams={**upstreams, "hosted": hosted}, graders=graders)
    router = config.router_config()
    assert {n: u.url for n, u in router.upstreams.items()} == {"hosted": "https://api.test", "teacher": None}
    assert router.graders == config.graders
    # As the controller's and the routers' processes get it.
    again = ServeConfig.model_validate(config.model_dump(mode="json"))
    assert again.router_config() == router


@pytest.mark.parametrize("name", ["stillhouse.yaml", "demo.yaml", "graders.yaml"])
def test_shipped_configurations_are_valid(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every file in configs/ is parsed by a test; run folder and port come from the environment."""
    monkeypatch.setenv("STILLHOUSE_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_PORT", "18123")
    config = load_serve_config(ROOT / "configs" / name)
    assert config.run_dir == tmp_path
    assert config.http.port == 18123
    assert list(config.routes) == ["support"]
    assert config.policies


def test_ray_sockets_fit_into_a_unix_address() -> None:
    """AF_UNIX paths end at 107 bytes; Ray's session folder and socket names take about 75 of them."""
    assert len(str(parse(run_dir="/very" * 40).ray_dir)) < 25


def test_import_is_light() -> None:
    """Every command parses the configuration first; ray, vllm or torch would cost seconds each time."""
    code = (
        "import sys, time; t = time.perf_counter(); import serve.config; s = time.perf_counter() - t;"
        "heavy = {'ray', 'vllm', 'torch', 'transformers', 'mlflow', 'sqlalchemy'} & set(sys.modules);"
        "print(sorted(heavy), s)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout.startswith("[] ")


CASCADE = {"first": "student", "then": "teacher", "signal": "mean_logprob", "threshold": -0.05}
TWO = {"teacher": {"engine": {"model": "big"}}, "student": {"url": "http://x", "model": "small"}}


def test_a_cascade_is_an_upstream_of_two_others() -> None:
    """It can be a route's upstream, fallback or shadow by its name; its two keep their own places."""
    config = parse(
        upstreams={**TWO, "smart": {"cascade": {**CASCADE, "hold_tokens": 64}}}, routes={"support": "smart"}
    )
    # What `up` writes for Ray's processes says every field.
    assert parse_config(config.model_dump(mode="json"), ServeConfig) == config
    smart = config.upstream("smart")
    assert (smart.app, smart.url, smart.model) == (None, None, "smart")
    assert smart.cascade is not None
    assert (smart.cascade.first, smart.cascade.then) == (
        config.upstream("student"),
        config.upstream("teacher"),
    )
    assert (smart.cascade.threshold, smart.cascade.hold_tokens) == (-0.05, 64)


@pytest.mark.parametrize(
    ("upstream", "message"),
    [
        (
            {"cascade": {**CASCADE, "first": "nobody"}},
            "cascade.first: 'nobody' is no plain upstream",
        ),
        (
            {"cascade": {**CASCADE, "then": "smart"}},
            "cascade.then: 'smart' is no plain upstream",
        ),
        ({"cascade": {**CASCADE, "then": "student"}}, "another upstream than 'first'"),
        ({"cascade": {**CASCADE, "threshold": 0.5}}, "threshold: mean_logprob lies in"),
        (
            {"cascade": {**CASCADE, "signal": "grader", "grader": "nobody", "threshold": 1}},
            "upstreams.smart.cascade.grader: there is no grader of single answers 'nobody'",
        ),
        ({"cascade": CASCADE, "url": "http://x", "model": "m"}, "give exactly one of"),
        ({"cascade": CASCADE, "cost": {"per_hour": 1}}, "belong to the upstreams of a cascade"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused(upstream: dict[str, Any], message: str) -> None:
    """With the field that is wrong, and what there is instead."""
    with pytest.raises(ConfigError, match=message):
        parse(upstreams={**TWO, "smart": upstream})
