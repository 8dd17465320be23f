"""The benchmark's student: the demo's base, distilled from the demo's teacher for so many steps.

Short training is on purpose: a student as good as its teacher needs no cascade. Knows nothing about serving.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.recipes import data
from benchmarks.recipes.job import Job, trainer_of
from distill_jobs.training.models import save_model

RECIPE = "sequence_level"
_HELD_OUT = 32
"""Rows that the recipes' data makes besides; nothing here looks at them."""


def make(folder: Path, rows: int, steps: int, seed: int) -> Path:
    """Train the student unless it is there; the folder of its checkpoint."""
    place = folder / f"student-{RECIPE}-{steps}x{rows}-{seed}"
    if place.exists():
        return place
    data.make(folder, rows, _HELD_OUT, ())
    trainer = trainer_of(Job(RECIPE, seed, steps, rows, _HELD_OUT), folder)
    torch.set_num_threads(2)
    for _ in tqdm(trainer.run(), total=steps, desc="student", unit="step", mininterval=2):
        pass
    save_model(trainer.model, data.STUDENT, place)
    return place
