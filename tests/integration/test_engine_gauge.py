"""The gauge that a drain waits for, of a real vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.engine.config import EngineOptions
from serve.engine.http import ask_chat, requests_in_engine
from serve.engine.process import VllmProcess
from tests.integration.stack_rig import ENGINE, make_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

_DEAD_ENGINE = """
import time
from prometheus_client import Gauge
labels = {"model_name": "older", "engine": "0"}
gauge = Gauge("vllm:num_requests_running", "-", list(labels), multiprocess_mode="mostrecent")
gauge.labels(**labels).set(1)
"""


def test_an_engine_does_not_speak_for_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that deploys students has a folder in which routers count together, and Ray hands its
    environment on: an engine that was killed with a request in it would leave its gauge there, every later
    engine would show it, and a drain would wait its whole timeout for that request. Nor does an engine write
    into that folder, which routers answer their scrapes from."""
    shared = tmp_path / "metrics"
    shared.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    subprocess.run([sys.executable, "-c", _DEAD_ENGINE], check=True, env=dict(os.environ))
    before = sorted(f.name for f in shared.iterdir())
    assert before
    make_model(tmp_path / "model", seed=1)
    engine = VllmProcess(
        str(tmp_path / "model"), "newer", EngineOptions(**ENGINE), "127.0.0.1", tmp_path / "vllm.log"
    )
    engine.start()
    try:
        engine.wait_ready()
        ask_chat(engine.url, "newer")
        time.sleep(1.0)
        assert requests_in_engine(engine.url) == 0
        assert sorted(f.name for f in shared.iterdir()) == before
        assert engine.drain(0.0)
    finally:
        engine.stop()
