"""Random-sampling distillation: a few tokens drawn from the teacher's distribution, with importance weights.

Top-k logits are a biased estimate of the teacher, sampled ones are not: "Sparse Logit Sampling", arXiv
2503.16870, section 3. Knows nothing about models; logits come in.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES = 8_000_000
"""Values of a float64 cumulative sum at a time (64 MB)."""


def uniforms(digest: str, seed: int, positions: int, draws: int) -> np.ndarray:
    """(positions, draws) float64 in [0, 1): the same for a digest and seed, whatever else is in the batch."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random((positions, draws))


def draw(logits: torch.Tensor, uniform: np.ndarray, proposal: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens drawn from q ∝ p^proposal, equal ones merged: (ids int32, log weights float32), both (N, draws).

    logits: (N, V); uniform: (N, draws). A draw of x weighs p(x)/q(x), normalised to sum 1 at its position;
    with proposal 1 that is 1/draws, and the weights' expectation is p itself. Rows are padded with id 0 and
    -inf.
    """
    import torch

    chunk = max(1, _CHUNK_VALUES // logits.shape[-1])
    ids, weights = [], []
    for start in range(0, len(logits), chunk):
        logp = logits[start : start + chunk].double().log_softmax(-1)
        logq = (logp * proposal).log_softmax(-1) if proposal != 1.0 else logp
        edges = logq.exp().cumsum(-1)
        end = edges[:, -1:]
        wanted = torch.from_numpy(uniform[start : start + chunk]).to(edges.device) * end
        # A product that rounds up to the end would fall on a token without probability.
        wanted = torch.minimum(wanted, torch.nextafter(end, torch.zeros_like(end)))
        drawn = torch.searchsorted(edges, wanted, right=True)
        ratio = (logp - logq).gather(-1, drawn)
        ids.append(drawn.cpu().numpy())
        weights.append(ratio.log_softmax(-1).exp().cpu().numpy())
    return merge_equal(np.concatenate(ids), np.concatenate(weights))


def merge_equal(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal ids of a row become one with the sum of their weights: (ids, log weights), heaviest first, padded
    with id 0 and -inf to the width that came in.
    """
    order = np.argsort(ids, axis=1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
    first = np.ones_like(ids, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = np.cumsum(first, axis=1) - 1
    row = np.arange(len(ids))[:, None]
    merged = np.zeros_like(weights)
    np.add.at(merged, (row, group), weights)
    unique = np.zeros_like(ids)
    unique[np.broadcast_to(row, ids.shape)[first], group[first]] = ids[first]
    order = np.argsort(-merged, axis=1, kind="stable")
    merged, unique = np.take_along_axis(merged, order, 1), np.take_along_axis(unique, order, 1)
    with np.errstate(divide="ignore"):
        logs = np.log(merged / merged.sum(axis=1, keepdims=True))
    return np.where(merged > 0, unique, 0).astype(np.int32), logs.astype(np.float32)
