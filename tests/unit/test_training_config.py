"""The trainer's settings: importable without torch, strict, and the run's fingerprint follows what shapes
the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from distill_jobs.training import TrainConfig


def test_the_config_does_not_import_torch() -> None:
    """The CLI validates a configuration in milliseconds: torch, transformers and Ray stay out."""
    code = (
        "import sys; from distill_jobs.training import TrainConfig; TrainConfig(); "
        "print(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "False"


def test_unknown_and_impossible_settings_are_refused() -> None:
    """A misspelt key or a negative weight is an error, not a default."""
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"epoch": 3})
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"loss": {"temperature": 0}})


def test_the_fingerprint_follows_what_shapes_the_result(tmp_path: Path) -> None:
    """Other seeds or data start a new run; other workers, threads or checkpoint intervals continue the old
    one."""
    from distill_jobs.training.ray_train import fingerprint

    one = TrainConfig()
    (tmp_path / "manifest.json").write_text('{"k": 8}')
    known = fingerprint(one, tmp_path, "base")
    assert (
        fingerprint(one.model_copy(update={"workers": 2, "checkpoint_steps": 7}), tmp_path, "base") == known
    )
    assert fingerprint(one.model_copy(update={"seed": 1}), tmp_path, "base") != known
    assert fingerprint(one, tmp_path, "other") != known
    (tmp_path / "manifest.json").write_text('{"k": 9}')
    assert fingerprint(one, tmp_path, "base") != known
