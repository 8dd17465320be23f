"""Distilling step-by-step (arXiv 2305.02301): answers and rationales as two tasks of one model.

The loss is (1 - a) * mean over answer tokens + a * mean over rationale tokens, both over the whole step: a
factor on each token's weight, so the chunked op stays as it is. Knows nothing of models.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
