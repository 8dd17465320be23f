"""Several teachers: who is asked about which sample, and the average of what they say.

An average is over distributions, p = Σ wᵢ pᵢ / Σ wᵢ, never over logits. Knows nothing about where the
distributions come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jobs.teaching.config import TeachConfig, WhenConfig
from distill_jobs.teaching.local import Scored
from distill_jobs.teaching.sampled import merge_equal

JOIN = "+"
"""Between the names of the teachers of one sample."""

Label = Callable[[dict[str, Any], str | None], str | None]


def assign(config: TeachConfig, sample: dict[str, Any], label: Label | None) -> str:
    """Names of the teachers of a sample, joined by '+'; '' when none wants it."""
    request = json.loads(sample["request"])
    wanted = [t.name for t in config.teachers if _wants(t.when, request, sample, label)]
    return JOIN.join(wanted if config.combine == "average" else wanted[:1])


def _wants(when: WhenConfig, request: dict[str, Any], sample: dict[str, Any], label: Label | None) -> bool:
    if when.route is not None and when.route != (sample.get("route") or request.get("model")):
        return False
    if when.label is not None:
        found = sample.get("class") if label is None else label(request, sample["answer"])
        if found != when.label:
            return False
    return when.pattern is None or re.search(when.pattern, last_said(sample)) is not None


def last_said(sample: dict[str, Any]) -> str:
    """The last user message of a sample."""
    said = [m["content"] for m in json.loads(sample["messages"]) if m["role"] == "user"]
    return str(said[-1]) if said else ""


def average_topk(scored: Sequence[Scored], weights: Sequence[float], k: int) -> Scored:
    """The k largest of the averaged distribution over the merged support.

    A token outside of a teacher's top k counts as part of that teacher's tail, so all mass is kept: the
    averaged tail is the average of the tails plus what is cut, and a token in every top k has its exact
    average. A token that a teacher's top k misses has a lower bound, too low by less than that teacher's
    tail.
    """
    ids, mass = _stacked(scored, weights)
    merged, logs = merge_equal(ids, mass)
    totals = mass.sum(axis=1, keepdims=True)  # merge_equal normalises to 1; a top k is less than everything
    return _columns(merged[:, :k], logs[:, :k] + np.log(totals))


def average_sampled(scored: Sequence[Scored], weights: Sequence[float]) -> Scored:
    """The mixture of samples: unbiased for the average when each is unbiased for its teacher. Width: the sum
    of the widths, padded with id 0 and -inf.
    """
    return _columns(*merge_equal(*_stacked(scored, weights)))


def _stacked(scored: Sequence[Scored], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mass), each (completion, sum of the widths)."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    ids = np.concatenate([s["topk_ids"] for s in scored], axis=1)
    logs = [s["topk_logprobs"].astype(np.float64) for s in scored]
    return ids, np.concatenate([np.exp(one) * w for one, w in zip(logs, shares, strict=True)], axis=1)


def _columns(ids: np.ndarray, logs: np.ndarray) -> Scored:
    return {"topk_ids": ids.astype(np.int32), "topk_logprobs": logs.astype(np.float16)}


def pad_to(scored: Scored, width: int) -> Scored:
    """Sampled values of one teacher in rows that hold several teachers' others."""
    missing = width - scored["topk_ids"].shape[1]
    ids = np.pad(scored["topk_ids"], ((0, 0), (0, missing)))
    return _columns(ids, np.pad(scored["topk_logprobs"], ((0, 0), (0, missing)), constant_values=-np.inf))
