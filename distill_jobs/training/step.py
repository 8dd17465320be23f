"""What a micro-batch adds to the step's loss: the model's hidden states into the chunked op.

Knows nothing of workers, optimizers or where rows come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill_jobs.training.config import LossConfig
from distill_jobs.training.data import MicroBatch
from distill_jobs.training.divergence import LossWeights, SparseTeacher, linear_divergence, loss_weights


def batch_loss(
    model: Any, batch: MicroBatch, loss: LossConfig, answers: int, prompts: int
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the step's loss, and [KL, CE]; `answers`, `prompts` count the whole step's
    tokens."""
    body, head = model.get_decoder(), model.get_output_embeddings().weight
    hidden = body(input_ids=batch.input_ids, use_cache=False).last_hidden_state[batch.rows, batch.columns]
    counted = ~batch.in_prompt
    teacher = None
    if batch.topk_ids is not None and batch.topk_logprobs is not None and loss.kd_weight:
        teacher = SparseTeacher(batch.topk_ids[counted], batch.topk_logprobs[counted])
    scale = torch.full((int(counted.sum()),), 1.0 / answers, device=hidden.device)
    total, parts = linear_divergence(
        hidden[counted], head, batch.labels[counted], teacher, loss_weights(loss), scale, loss.chunk
    )
    if loss.prompt_weight and bool(batch.in_prompt.any()):
        scale = torch.full((int(batch.in_prompt.sum()),), 1.0 / prompts, device=hidden.device)
        extra, _ = linear_divergence(
            hidden[batch.in_prompt],
            head,
            batch.labels[batch.in_prompt],
            None,
            LossWeights(kd=0.0, hard=loss.prompt_weight),
            scale,
            loss.chunk,
        )
        total = total + extra
    return total, parts
