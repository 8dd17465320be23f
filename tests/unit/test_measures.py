"""The arithmetic of evaluation, by hand-computed values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from distill_jobs.measures import accuracy, against_teacher, kl_topk, perplexity


def test_perplexity_is_over_all_tokens_together() -> None:
    """Long rows weigh more: the mean is over tokens, not over rows."""
    half = math.log(0.5)
    assert perplexity([[half], [half, half]]) == pytest.approx(2.0)
    assert perplexity([[0.0], [half, half, half]]) == pytest.approx(2 ** (3 / 4))
    assert perplexity([]) is None


def test_kl_is_exact_when_the_lists_hold_all_mass() -> None:
    """Over a whole vocabulary, listed in any order, it is the textbook KL."""
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.25, 0.25]])
    expected = float((p * np.log(p / q)).sum())
    got = kl_topk(np.array([[4, 5, 6]]), np.log(p), np.array([[6, 4, 5]]), np.log(q[:, [2, 0, 1]]))
    assert got[0] == pytest.approx(expected)


def test_kl_puts_unlisted_tokens_into_one_bucket() -> None:
    """A token only one side lists is compared as part of the rest, on both sides."""
    got = kl_topk(np.array([[1, 2]]), np.log([[0.6, 0.3]]), np.array([[1, 9]]), np.log([[0.5, 0.4]]))
    assert got[0] == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))


def test_kl_never_exceeds_the_full_one_and_is_zero_for_equals() -> None:
    """Bucketing is a lower bound of the KL of the whole distributions."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(50), 20), rng.dirichlet(np.ones(50), 20)
    top_p, top_q = np.argsort(-p)[:, :10], np.argsort(-q)[:, :10]
    log_p = np.log(np.take_along_axis(p, top_p, 1))
    got = kl_topk(top_p, log_p, top_q, np.log(np.take_along_axis(q, top_q, 1)))
    assert (got <= (p * np.log(p / q)).sum(1) + 1e-9).all()
    assert (got > 0).all()
    assert kl_topk(top_p, log_p, top_p, log_p) == pytest.approx(np.zeros(20))


def scored(number: int, ids: list[list[int]], logprobs: list[list[float]]) -> dict[str, Any]:
    """A row as the engine writes it."""
    flat_ids, flat = [i for p in ids for i in p], [x for p in logprobs for x in p]
    return {"id": number, "actual": [0.0] * len(ids), "topk_ids": flat_ids, "topk_logprobs": flat}


def test_agreement_is_the_share_of_equal_first_choices() -> None:
    """Two of three positions agree; a row that the student did not score says nothing."""
    even = [math.log(0.5), math.log(0.5)]
    teacher = [
        scored(0, [[1, 2], [3, 4]], [even, even]),
        scored(1, [[5, 6]], [even]),
        scored(2, [[7, 8]], [even]),
    ]
    student = [scored(0, [[1, 2], [4, 3]], [even, even]), scored(1, [[5, 6]], [even])]
    found = against_teacher(teacher, student)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["kl_to_teacher"] == pytest.approx(0.0)
    assert against_teacher(teacher, []) == {"kl_to_teacher": None, "agreement": None}


def test_ungradable_answers_are_no_evidence() -> None:
    """None neither helps nor harms; with nothing gradable there is no accuracy, and so no pass."""
    grades = iter([True, None, False, True])
    assert accuracy(lambda request, text: next(grades), [{}] * 4, ["a"] * 4) == (pytest.approx(2 / 3), 3)
    assert accuracy(lambda request, text: None, [{}], ["a"]) == (None, 0)
