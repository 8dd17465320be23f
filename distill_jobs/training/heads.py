"""Is a model's output layer what the chunked op takes it for? Knows nothing of losses or data."""

from __future__ import annotations

from typing import Any

import torch

from contracts.errors import TrainingError

_HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative, by what the model computes in."""


def rebuilds_logits(model: Any) -> bool:
    """Whether the logits are the output matrix times the last hidden state, and nothing after that: some
    architectures add a bias, scale or cap them.
    """
    ids = torch.arange(1, 5, device=model.device)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float()
        rebuilt = hidden @ model.get_output_embeddings().weight.float().T
    tolerance = _HEAD_TOLERANCE[model.dtype]
    return torch.allclose(rebuilt, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max()))


def check_head(model: Any, name: str) -> None:
    """Refuse a model whose logits the chunked op cannot rebuild: it would train or copy another one.

    Raises: TrainingError.
    """
    if not rebuilds_logits(model):
        raise TrainingError(
            f"{name}: its logits are not its output matrix times its last hidden state (they have a bias, or"
            " are scaled or capped, as in Gemma, Cohere or Granite). Take a model without, e.g. of the Qwen"
            " or Llama families."
        )
