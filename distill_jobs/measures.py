"""The arithmetic of evaluation: perplexity, KL over the teacher's top k, agreement, accuracy.

Pure numpy on what the engine wrote. Knows nothing about engines or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

# A student's log-probability below float precision of its listed mass; keeps a zero tail finite.
_FLOOR = 1e-9


def perplexity(logprobs: Iterable[Sequence[float]]) -> float | None:
    """exp of the mean negative log-probability over all tokens; None without tokens."""
    parts = [np.asarray(row, dtype=np.float64) for row in logprobs]
    total = sum(len(p) for p in parts)
    if total == 0:
        return None
    return float(np.exp(-sum(p.sum() for p in parts) / total))


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
    teacher: Sequence[dict[str, Any]], student: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Mean KL and top-1 agreement over all completion positions of the rows both scored."""
    by_id = {row["id"]: row for row in student}
    divergences, agreements = [], []
    for row in teacher:
        other = by_id.get(row["id"])
        if other is None or len(other["actual"]) != len(row["actual"]):
            continue
        n = len(row["actual"])
        ids, student_ids = _matrix(row["topk_ids"], n), _matrix(other["topk_ids"], n)
        logprobs, student_logprobs = _matrix(row["topk_logprobs"], n), _matrix(other["topk_logprobs"], n)
        divergences.append(kl_topk(ids, logprobs, student_ids, student_logprobs))
        agreements.append(ids[:, 0] == student_ids[:, 0])
    if not divergences:
        return {"kl_to_teacher": None, "agreement": None}
    return {
        "kl_to_teacher": float(np.concatenate(divergences).mean()),
        "agreement": float(np.concatenate(agreements).mean()),
    }


def _matrix(values: Sequence[float], positions: int) -> np.ndarray:
    return np.asarray(values).reshape(positions, -1)


def accuracy(
    grade: Callable[[dict[str, Any], str], bool | None],
    requests: Sequence[dict[str, Any]],
    texts: Sequence[str],
) -> tuple[float | None, int]:
    """Share of gradable answers that are right, and how many were gradable."""
    grades = [grade(request, text) for request, text in zip(requests, texts, strict=True)]
    known = [bool(g) for g in grades if g is not None]
    return (sum(known) / len(known) if known else None), len(known)
