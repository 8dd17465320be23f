"""Answers of a model in memory: batched decoding with a KV cache, the same for any batching and any worker.

Every row brings its own uniform numbers, so what is drawn for a row depends on nothing but (seed, step, row).
Knows nothing of why answers are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    temperature: float  # 0 is greedy
    max_new_tokens: int
    stop: tuple[int, ...]  # ids that end an answer; the answer keeps it


def uniforms(seed: int, step: int, rows: Sequence[int], count: int) -> Tensor:
    """(rows, count) numbers in [0, 1) that are a function of (seed, step, row) alone."""
    draws = [np.random.default_rng([seed, step, int(row)]).random(count) for row in rows]
    return torch.from_numpy(np.stack(draws))


def draw(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """(B, V) logits and (B,) numbers in [0, 1) -> (B,) tokens: the inverse of the distribution's CDF."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # Rounding may leave the last value below a number: the total takes its place.
    return torch.searchsorted(cdf, (numbers.double() * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(
        logits.shape[-1] - 1
    )


def generate(model: Any, prompts: Sequence[np.ndarray], numbers: Tensor, how: Sampling) -> list[np.ndarray]:
    """The answer's ids of every prompt, its stop id included when it came; `numbers` (rows, max_new_tokens).

    Prompts are padded on the left. The model is left as it was: training mode and attention.
    """
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")  # ours is for whole rows, without a cache
    try:
        with torch.no_grad():
            return _decode(model, prompts, numbers, how)
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)


def _padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, S) ids and mask, padded on the left."""
    width = max(len(p) for p in prompts)
    ids, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _decode(model: Any, prompts: Sequence[np.ndarray], numbers: Tensor, how: Sampling) -> list[np.ndarray]:
    device = next(model.parameters()).device
    ids, mask = _padded(prompts, device)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    active = torch.arange(len(prompts), device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    numbers, stop = numbers.to(device), torch.tensor(how.stop, device=device)
    head = model.get_output_embeddings().weight
    for turn in range(how.max_new_tokens):
        hidden = model.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        tokens = draw(hidden @ head.T, numbers[active, turn], how.temperature)
        for row, token in zip(active.tolist(), tokens.tolist(), strict=True):
            answers[row].append(token)
        going = ~torch.isin(tokens, stop)
        if not bool(going.any()):
            break
        places = places[:, -1:] + 1
        if not bool(going.all()):
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            active, tokens, mask, places = active[keep], tokens[keep], mask[keep], places[keep]
        ids, mask = tokens[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return [np.asarray(one, dtype=np.int64) for one in answers]
