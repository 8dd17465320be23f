"""A student built from a larger checkpoint: measured on training rows, cut, sparsified, written down.

Knows nothing of training; what it leaves is where a distillation starts from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contracts.config import write_atomic
from distill_jobs.shrink.blocks import check_kind, zeros
from distill_jobs.shrink.config import DENSE, ShrinkConfig
from distill_jobs.shrink.importance import measure
from distill_jobs.shrink.sparse import sparsify
from distill_jobs.shrink.structured import Plan, cut, plan
from distill_jobs.training.data import Rows
from distill_jobs.training.models import load_model, save_model

REPORT = "shrink.json"
"""Beside the weights: what was kept."""


@dataclass(frozen=True, slots=True)
class Built:
    """A student, and what is to be said of it."""

    model: Any
    report: dict[str, Any]


def build(base: Any, config: ShrinkConfig, rows: Rows) -> Built:
    """A student out of `base`, which may be changed by it."""
    check_kind(base.config)
    report: dict[str, Any] = {"params_before": _params(base)}
    model = base
    if config.shape:
        found = measure(base, rows, config.rows)
        kept = plan(base.config, config, found)
        model = cut(base, kept)
        report |= _kept(kept) | {"influence": [round(one, 6) for one in found.influence.tolist()]}
    if config.sparsify is not None:
        sparsify(model, config.sparsify, rows, config.rows)
        report |= {"zeros": round(zeros(model), 6), "serving": DENSE}
    report |= {"params": _params(model), "config": config.model_dump(mode="json", exclude_none=True)}
    return Built(model.requires_grad_(True), report)


def build_folder(
    base: str, config: ShrinkConfig, data_dir: Path, max_length: int, out: Path
) -> dict[str, Any]:
    """Write the student as a plain checkpoint (bf16, with the base's tokenizer); returns its report. A folder
    with a report is finished and stays.

    Raises: ConfigError for a shape that the base cannot be cut to, DataError for rows that cannot be read.
    """
    file = out / REPORT
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    rows = Rows(Path(data_dir), max_length, with_teacher=False)
    built = build(load_model(base, None, 0), config, rows)
    save_model(built.model, base, out)
    write_atomic(file, json.dumps({"base": base, **built.report}, indent=1) + "\n")
    return built.report


def _params(model: torch.nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def _kept(kept: Plan) -> dict[str, Any]:
    return {
        "layers": kept.layers,
        "channels": kept.channels.tolist(),
        "heads": {str(block): one.tolist() for block, one in kept.heads.items()},
    }
