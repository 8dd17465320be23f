"""The curriculum: which rows are open at which step, and that resuming in the middle changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contracts.errors import DataError
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.curriculum import CurriculumOrder, competence, order_of
from distill_jobs.training.data import Rows
from distill_jobs.training.method_config import CurriculumConfig
from tests.unit.teacher_world import rows_folder


def test_competence_by_hand() -> None:
    """The square-root schedule: c0 at the start, sqrt((1 + c0^2) / 2) half way, 1 from `full` on."""
    one = CurriculumConfig(start=0.2, full=0.5)
    assert competence(0, one) == pytest.approx(0.2)
    assert competence(0.25, one) == pytest.approx(np.sqrt((1 + 0.04) / 2))
    assert competence(0.5, one) == pytest.approx(1.0)
    assert competence(0.9, one) == 1.0


def test_rows_come_from_the_easiest_share() -> None:
    """No row harder than the competence of its step; in the end every row is drawn; a step repeats none."""
    difficulty = np.random.default_rng(0).permutation(200).astype(np.float32)
    order = CurriculumOrder(difficulty, 4, 10, 100, CurriculumConfig(start=0.1, full=0.5))
    steps = list(order.steps(0, 100))
    for step, rows in steps:
        assert difficulty[rows].max() <= np.ceil(competence(step / 100, order.config) * 200)
        assert len(set(rows.tolist())) == 10
    assert difficulty[steps[0][1]].max() < 20
    assert len({r for _, rows in steps for r in rows.tolist()}) > 190
    for (_, a), (_, b) in zip(order.steps(57, 60), steps[57:60], strict=True):
        assert a.tolist() == b.tolist()


def test_a_curriculum_needs_difficulties(tmp_path: Path) -> None:
    """Rows that are all alike cannot be put in order: an error that names the column."""
    config = TrainConfig(curriculum=CurriculumConfig(), batch_rows=4)
    with pytest.raises(DataError, match="difficulty"):
        order_of(Rows(rows_folder(tmp_path / "plain"), 64, False), config)
    hard = rows_folder(tmp_path / "hard", difficulty=np.arange(16, dtype=np.float32))
    assert isinstance(order_of(Rows(hard, 64, False), config), CurriculumOrder)
