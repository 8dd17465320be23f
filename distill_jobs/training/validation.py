"""Validation beside the training: the loss of a checkpoint on rows that are not trained on, and when to stop.

A Ray task runs `validate` on a checkpoint while the workers train on; its result is a small file in the run's
storage, so that the curve survives whatever is killed or deleted. Knows nothing of workers or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_jobs.training.attention import register
from distill_jobs.training.config import EarlyStopConfig, TrainConfig
from distill_jobs.training.data import Rows, RowSource
from distill_jobs.training.fake_quant import fake_quantize
from distill_jobs.training.loop import count
from distill_jobs.training.method_config import PrefixConfig, TermsConfig
from distill_jobs.training.models import load_model
from distill_jobs.training.optim import cast_parameters
from distill_jobs.training.order import split_for_worker
from distill_jobs.training.step import DistillStep
from distill_jobs.training.storage import Storage

MODEL = "model"
RESULTS = "validation"
UNKNOWN = math.inf
"""The validation loss of a checkpoint that is not validated (yet): never the best."""


def objective(config: TrainConfig) -> TrainConfig:
    """What held-out rows are measured by: the training's loss where their columns know the teacher,
    else the cross entropy with their text; no extra terms, no generated prefixes, no live teachers."""
    plain = {"terms": TermsConfig(), "prefix": PrefixConfig(), "teacher": None}
    if config.teacher is not None:
        plain["loss"] = config.loss.model_copy(update={"kd_weight": 0.0, "hard_weight": 1.0})
    return config.model_copy(update=plain)


def rows_loss(model: nn.Module, rows: RowSource, config: TrainConfig) -> dict[str, float]:
    """Loss, divergence and cross entropy over all rows, as the training of them would report."""
    config = objective(config)
    step, indices = DistillStep(model, config), np.arange(len(rows.lengths))
    indices, rows = step.rows(0, 1, indices, rows)
    counts, device = count(rows, indices), next(model.parameters()).device
    total = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for one in split_for_worker(
            indices, rows.lengths, 0, 1, config.pass_tokens(device.type), config.packing
        ):
            batch = rows.micro_batch(one, config.with_prompt, config.packing).to(device)
            loss, parts = step.loss(batch, counts)
            total += torch.cat([loss[None], parts[:2]]).double()
    return dict(zip(("validation_loss", "validation_kd", "validation_ce"), total.tolist(), strict=True))


def validate(
    checkpoint: Any, config: dict[str, Any], data_dir: str, storage: Storage, step: int, steps: int
) -> dict[str, float]:
    """What Ray runs for a reported checkpoint: its exported weights, in the dtype of the training."""
    one = TrainConfig.model_validate(config)
    torch.set_num_threads(one.threads)
    with checkpoint.as_directory() as folder:
        model = load_model(str(Path(folder) / MODEL), None, one.seed)
    if one.fake_quant is not None:
        fake_quantize(model, one.fake_quant)
    if one.validation_gpus:
        model.cuda()
    model.set_attn_implementation(register())
    cast_parameters(model, getattr(torch, one.dtype))
    rows = Rows(Path(data_dir), one.max_length, with_teacher=one.cached_teacher)
    result = rows_loss(model, rows, one)
    storage.write_json(f"{RESULTS}/{step:09d}.json", {"step": step, "steps": steps, **result})
    return result


def exhausted(losses: Sequence[float], rule: EarlyStopConfig) -> bool:
    """Whether `patience` validations in a row brought no new best (NaN never is one)."""
    best, waited = math.inf, 0
    for loss in losses:
        if loss < best - rule.min_delta:
            best, waited = loss, 0
        else:
            waited += 1
        if waited >= rule.patience:
            return True
    return False
