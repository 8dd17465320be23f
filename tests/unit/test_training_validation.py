"""Validation and early stop: the loss of held-out rows, when a run ends, and the files in between."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from contracts.errors import ConfigError
from distill_jobs.training.config import EarlyStopConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.progress import append, append_validations, following
from distill_jobs.training.storage import open_storage
from distill_jobs.training.validation import exhausted, rows_loss
from tests.unit.test_training_loop import config, tiny_model, write_rows


@pytest.mark.parametrize("packing", [False, True])
def test_the_validation_loss_is_what_training_on_the_rows_would_report(tmp_path: Path, packing: bool) -> None:
    """One step on all rows at once, before its update, and the validation of the same rows: equal, and
    whatever the micro-batches."""
    rows, one = Rows(write_rows(tmp_path / "rows", extra=True), 64, True), config(batch_rows=24)
    metrics = next(iter(Trainer(tiny_model(), rows, one).run()))
    found = rows_loss(tiny_model(), rows, config(micro_tokens=40, packing=packing))
    assert found["validation_kd"] == pytest.approx(metrics["kd"], rel=1e-5)
    assert found["validation_ce"] == pytest.approx(metrics["ce"], rel=1e-5)
    loss = one.loss.kd_weight * metrics["kd"] + one.loss.hard_weight * metrics["ce"]
    assert found["validation_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops"),
    [
        ([], 1, 0.0, False),
        ([3.0, 2.0, 1.0], 1, 0.0, False),
        ([3.0, 2.0, 2.0], 1, 0.0, True),
        ([3.0, 2.0, 2.5, 1.9], 2, 0.0, False),
        ([3.0, 2.0, 2.5, 2.1, 1.0], 2, 0.0, True),
        ([3.0, 2.95, 2.91], 2, 0.1, True),
        ([math.nan, math.nan], 2, 0.0, True),
    ],
)
def test_a_run_stops_after_patience_without_a_new_best(
    losses: list[float], patience: int, min_delta: float, stops: bool
) -> None:
    """Consecutive validations that bring no improvement of more than min_delta; NaN brings none."""
    assert exhausted(losses, EarlyStopConfig(patience=patience, min_delta=min_delta)) is stops


def test_settings_that_cannot_work_together_are_refused() -> None:
    """Early stop without validation, and more workers at least than at most."""
    with pytest.raises(ValidationError, match="early_stop needs validate_steps"):
        TrainConfig(early_stop=EarlyStopConfig())
    with pytest.raises(ValidationError, match="min_workers 3 is more than workers 2"):
        TrainConfig(workers=2, min_workers=3)


def test_results_survive_as_files_and_reach_the_curve_once(tmp_path: Path) -> None:
    """Validation results are read back in the order of steps and appended to the progress file once each."""
    storage, path = open_storage(str(tmp_path / "run")), tmp_path / "progress.jsonl"
    assert storage.read_jsons("validation") == []
    for step in (20, 100, 10):
        result = {"step": step, "steps": 100, "validation_loss": 1 / step}
        storage.write_json(f"validation/{step:09d}.json", result)
    append(path, {"step": 20, "kd": 0.5})
    append_validations(path, storage.read_jsons("validation")[:2])
    append_validations(path, storage.read_jsons("validation"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 10, 20, 100]
    assert [p.name for p in (tmp_path / "run" / "validation").glob("*.part")] == []


def test_a_follower_gets_every_whole_line_once(tmp_path: Path) -> None:
    """Lines from before are not repeated, a half-written line is left, the last lines arrive at the end."""
    path, got = tmp_path / "progress.jsonl", []
    append(path, {"step": 1})
    with following(path, lambda metrics: got.append(metrics["step"])):
        append(path, {"step": 2})
        append(path, {"step": 3})
        with path.open("a") as out:
            out.write('{"step": 4')
    assert got == [2, 3]


def test_storage_that_cannot_be_used_is_refused() -> None:
    """A password in the URL is not even quoted; an unknown protocol names the setting."""
    with pytest.raises(ConfigError, match="password") as raised:
        open_storage("s3://key:hidden/x@bucket/prefix")
    assert "hidden" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"train\.storage: 'nope://x'"):
        open_storage("nope://x")
