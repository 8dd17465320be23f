"""Distilling step-by-step (arXiv 2305.02301): answers and rationales as two tasks of one model.

The loss is (1 - a) * mean over answer tokens + a * mean over rationale tokens, both over the whole step: a
factor on each token's weight, so the chunked op stays as it is. Knows nothing of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import Rows, RowSource


def task_scale(
    weights: Tensor, rationale: Tensor, answers: float, rationales: float, rationale_weight: float
) -> Tensor:
    """(N,) what each token's loss is multiplied with: its row's weight over its task's weighted tokens, times
    the task's share.

    `answers` counts all completion tokens of the step, `rationales` those of rationale rows, weighted. A step
    with one task alone gives it everything.
    """
    if rationales <= 0 or rationales >= answers:
        return weights / answers
    shares = torch.where(
        rationale, rationale_weight / rationales, (1 - rationale_weight) / (answers - rationales)
    )
    return weights * shares


class Prefixed:
    """Rows with the task's prefix before the prompts of rationales; made once for a run."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        self._before: RowSource | None = None
        self._after: Rows | None = None

    @classmethod
    def of(cls, model: Any, config: TrainConfig) -> Prefixed | None:
        """What the configuration's prefix is in tokens; None without one."""
        if config.terms.rationale is None or not config.terms.rationale.prefix:
            return None
        name = config.shape.tokenizer if config.shape else model.config._name_or_path
        ids = AutoTokenizer.from_pretrained(name)(config.terms.rationale.prefix, add_special_tokens=False)[
            "input_ids"
        ]
        return cls(np.asarray(ids))

    def of_rows(self, rows: RowSource) -> RowSource:
        """The rows, rationale prompts longer by the prefix."""
        if self._after is None or rows is not self._before:
            assert isinstance(rows, Rows)
            self._before, self._after = rows, rows.with_prefix(rows.rationale, self.ids)
        return self._after
