"""A student search whose last rung is timed by vLLM, through the command, and the job that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from contracts.config import load_config
from distill_jobs.config import DistillConfig
from tests.integration.pipeline_world import config_of, write_model
from tests.unit.teacher_world import rows_folder

pytestmark = pytest.mark.integration


def test_the_command_searches_times_and_leaves_a_job(tmp_path: Path) -> None:
    """What reaches the last rung is timed as it would be served, at the bytes that the formula said; report
    and job are there, and a second run trains and times nothing."""
    write_model(tmp_path / "teacher", hidden=128, layers=2, seed=0)
    for name, seed in (("rows", 3), ("held-out", 4)):
        rows_folder(tmp_path / name, count=24, seed=seed)
    job = config_of(tmp_path)
    job["train"] = {"batch_rows": 8, "max_length": 32, "loss": {"kd_weight": 0.0, "hard_weight": 1.0}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    search = {
        "folder": str(tmp_path / "search"), "distill": str(tmp_path / "job.yaml"),
        "rows": str(tmp_path / "rows"), "held_out": str(tmp_path / "held-out"),
        "budget": {"bytes": 10**9, "tokens_per_s": 0.01}, "speed": {"batch": 4, "answer_tokens": 4},
        "space": {"layers": [1], "intermediate": [64], "precision": ["w4a16-g32"]},
        "halving": {"candidates": 2, "rungs": 2, "eta": 2, "tokens": 200}, "importance_rows": 8,
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    done = CliRunner().invoke(app, ["search", str(tmp_path / "search.yaml")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    (row,) = report["rows"]
    assert report["chosen"] == row["name"] == "l1-h128-i64-q4-k2-w4a16-g32"
    assert row["tokens_per_s"] > 0
    assert row["predicted_step_ms"] == pytest.approx(1000 * 4 / row["tokens_per_s"], rel=0.01)
    artifact = tmp_path / "search" / "timed" / row["name"] / "artifact" / "model.safetensors"
    assert artifact.stat().st_size == row["bytes"]
    made = load_config(tmp_path / "search" / "winner.yaml", DistillConfig)
    assert made.train.shrink is not None
    assert made.quantize.precision == "awq-w4a16-g32"
    state = (tmp_path / "search" / "search.json").read_text()
    again = CliRunner().invoke(app, ["search", str(tmp_path / "search.yaml")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "search" / "search.json").read_text() == state
