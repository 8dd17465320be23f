"""Universal logit distillation (arXiv 2402.12030): sorted probabilities, so vocabularies need not match.

The distance of a group is sum |sort(p) - sort(q)|, the Wasserstein-1 distance of the two profiles. Over
several tokens, probabilities follow the chain rule: the distribution at a group's first token, times the
probability that the model gave to the group's further tokens (TRL #4765: not the product of distributions).
Knows nothing of models or texts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def profile(hidden: Tensor, head: Tensor, temperature: float, top: int | None) -> Tensor:
    """(G, d) states at the groups' first tokens -> (G, m) probabilities, the largest first, in fp32."""
    probabilities = torch.softmax((hidden.float() @ head.float().T) / temperature, -1)
    if top is None:
        return probabilities.sort(-1, descending=True).values
    return probabilities.topk(min(top, probabilities.shape[-1]), -1).values


def continuation(logprobs: Tensor, groups: Tensor, first: Tensor, count: int) -> Tensor:
    """(G,) probability of each group's tokens after its first, from (N,) log-probabilities of all tokens,
    their groups (N,) and which of them are first (N,)."""
    further = torch.where(first, torch.zeros_like(logprobs), logprobs)
    return logprobs.new_zeros(count).index_add(0, groups, further).exp()


def token_logprobs(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """(N, d) and (N,) -> (N,) tempered log-probabilities of the labels, in fp32."""
    logits = (hidden.float() @ head.float().T) / temperature
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """(G, m) and (G, n) sorted probabilities -> (G,): sum of absolute differences, the shorter one filled
    with zeros."""
    width = max(student.shape[-1], teacher.shape[-1])
    a, b = (torch.nn.functional.pad(one, (0, width - one.shape[-1])) for one in (student, teacher))
    return (a - b).abs().sum(-1)


def chunked(function: Callable[..., Tensor], rows: int, *tensors: Tensor, chunk: int = 512) -> Tensor:
    """The function over `chunk` rows at a time, computed again in the backward pass: logits of a chunk exist
    at a time."""
    if rows == 0:
        return tensors[0].new_zeros(0, dtype=torch.float32)
    return torch.cat(
        [
            checkpoint(function, *(one[start : start + chunk] for one in tensors), use_reentrant=False)
            for start in range(0, rows, chunk)
        ]
    )
