"""The whole loop at a small size: real Ray, vLLM, Ray Train, llm-compressor, MLflow, SQLite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "STILLHOUSE_E2E_MARK"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run of `make demo DEMO_ARGS="--size small"`; its output folder and summary."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "demo.run", "--size", "small", "--out", str(out)]
    env = {**os.environ, MARK: str(out)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, f"demo failed:\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return out, json.loads((out / "summary.json").read_text())


def test_the_student_is_promoted_and_the_broken_one_thrown_back(demo: tuple[Path, dict[str, Any]]) -> None:
    """The main job: a good student takes the traffic over, a broken one never passes the 10 % step."""
    good, bad = demo[1]["rollouts"]
    assert good["decision"] == "promoted"
    assert bad["decision"] == "rolled_back"
    assert bad["max_weight"] <= 0.10
    assert good["canary_requests"] > 0
    assert bad["canary_requests"] > 0


def test_no_client_request_failed(demo: tuple[Path, dict[str, Any]]) -> None:
    """Neither promotion nor rollback may cost a user anything."""
    assert demo[1]["traffic"]["failed"] == 0
    assert [r["failed_requests"] for r in demo[1]["rollouts"]] == [0, 0]
    assert demo[1]["traffic"]["requests"] > 1000


def test_student_is_small_good_and_undamaged(demo: tuple[Path, dict[str, Any]]) -> None:
    """Size and damage do not depend on the size of the run; how good 2,500 rows make a student does.

    (7,000 rows of the full size are held to 98 % by its own gate.)
    """
    facts = demo[1]
    assert facts["teacher"]["accuracy"] >= 0.97
    assert facts["quantized"]["accuracy"] >= 0.88 * facts["teacher"]["accuracy"]
    assert facts["student"]["params"] * 8 <= facts["teacher"]["params"]
    assert facts["quantized"]["perplexity"] <= 1.02 * facts["quantized"]["bf16_perplexity"]
    assert facts["quantized"]["bytes"] < facts["student"]["bytes"]


def test_the_report_has_its_pictures(demo: tuple[Path, dict[str, Any]]) -> None:
    """Weights, evidence, latency, quality and compression are drawn, for both rollouts."""
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 5
    for rollout in demo[1]["rollouts"]:
        assert rollout["model"] in page


def test_nothing_is_left_running(demo: tuple[Path, dict[str, Any]]) -> None:
    """`down` ends everything that `up` started: nothing still runs with the mark the demo was given."""
    left = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if process.environ().get(MARK) == str(demo[0]):
                left.append((process.info["pid"], process.info["cmdline"][:4]))
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    assert left == []
