"""Scores of given texts: perplexity, bits a byte, KL over the teacher's top k, agreement.

Pure numpy on what the engine wrote, as sums by request. Knows nothing about engines or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jobs.measuring.statistics import Statistic

# A student's log-probability below float precision of its listed mass; keeps a zero tail finite.
_FLOOR = 1e-9


def likelihood(
    scores: Sequence[dict[str, Any]], texts: Mapping[int, str], requests: int
) -> dict[str, Statistic]:
    """Perplexity (exp of the mean negative log-probability over all tokens together) and bits a UTF-8 byte
    of the scored texts, which models with different tokenizers can be compared by.

    Args:
        scores: rows {"id", "actual"}: log-probabilities of a text's tokens, natural log.
        texts: the scored text of each id.
        requests: how many there are; ids are below it.
    """
    tokens, size = np.zeros((requests, 2)), np.zeros((requests, 2))
    for row in scores:
        if len(row["actual"]):
            nats = -float(np.sum(np.asarray(row["actual"], dtype=np.float64)))
            tokens[row["id"]] = (nats, len(row["actual"]))
            size[row["id"]] = (nats, len(texts[row["id"]].encode()))
    return {"perplexity": Statistic(tokens, "exp_mean"), "bits_per_byte": Statistic(size, "bits")}


def kl_topk(
    teacher_ids: np.ndarray,
    teacher_logprobs: np.ndarray,
    student_ids: np.ndarray,
    student_logprobs: np.ndarray,
) -> np.ndarray:
    """KL(teacher || student) at each position, over the tokens both list plus one bucket for all others.

    Arrays are [positions, k]. Merging tokens into a bucket can only lower a KL, so this is a lower bound, and
    the exact value when the listed tokens hold all the mass.
    """
    teacher, student = (
        np.exp(teacher_logprobs.astype(np.float64)),
        np.exp(student_logprobs.astype(np.float64)),
    )
    same = teacher_ids[:, :, None] == student_ids[:, None, :]
    q = (same * student[:, None, :]).sum(-1)
    p = teacher * same.any(-1)
    shared = np.where(p > 0, p * (np.log(np.maximum(p, _FLOOR)) - np.log(np.maximum(q, _FLOOR))), 0.0).sum(-1)
    rest_p = np.clip(1 - p.sum(-1), _FLOOR, 1.0)
    rest_q = np.clip(1 - q.sum(-1), _FLOOR, 1.0)
    divergence: np.ndarray = np.maximum(shared + rest_p * (np.log(rest_p) - np.log(rest_q)), 0.0)
    return divergence


def against_teacher(
    teacher: Sequence[dict[str, Any]], student: Sequence[dict[str, Any]], requests: int
) -> dict[str, Statistic]:
    """KL, top-1 agreement and acceptance, means over all completion positions of the rows that both scored.

    Acceptance is Σ min(p, q), the probability that a draw of the student's is kept when it drafts for the
    teacher at temperature 1 (Leviathan et al. 2023, corollary 3.6), over the tokens both list: a lower bound.
    """
    by_id = {row["id"]: row for row in student}
    divergence, agreement, acceptance = (np.zeros((requests, 2)) for _ in range(3))
    for row in teacher:
        other = by_id.get(row["id"])
        if other is None or len(other["actual"]) != len(row["actual"]):
            continue
        n = len(row["actual"])
        ids, student_ids = _matrix(row["topk_ids"], n), _matrix(other["topk_ids"], n)
        logprobs, student_logprobs = _matrix(row["topk_logprobs"], n), _matrix(other["topk_logprobs"], n)
        divergence[row["id"]] = (kl_topk(ids, logprobs, student_ids, student_logprobs).sum(), n)
        agreement[row["id"]] = ((ids[:, 0] == student_ids[:, 0]).sum(), n)
        kept = shared_mass(ids, logprobs, student_ids, student_logprobs)
        acceptance[row["id"]] = (kept.sum(), n)
    found = {"kl_to_teacher": divergence, "agreement": agreement, "acceptance": acceptance}
    return {name: Statistic(sums, "mean") for name, sums in found.items()}


def shared_mass(
    ids: np.ndarray, logprobs: np.ndarray, other_ids: np.ndarray, other_logprobs: np.ndarray
) -> np.ndarray:
    """Σ min(p, q) at each position over the tokens that both list; arrays are [positions, k]."""
    p, q = np.exp(logprobs.astype(np.float64)), np.exp(other_logprobs.astype(np.float64))
    same = ids[:, :, None] == other_ids[:, None, :]
    least: np.ndarray = (same * np.minimum(p[:, :, None], q[:, None, :])).sum((1, 2))
    return least


def _matrix(values: Sequence[float], positions: int) -> np.ndarray:
    return np.asarray(values).reshape(positions, -1)
