"""Random-sampling outputs: weights with values, unbiasedness, determinism; and averages of teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_jobs.teaching.merge import average_sampled, average_topk, pad_to
from distill_jobs.teaching.sampled import draw, merge_equal, uniforms

P = torch.tensor([0.5, 0.25, 0.125, 0.125])


def dense(ids: np.ndarray, logs: np.ndarray, vocabulary: int) -> np.ndarray:
    """Sparse rows as (N, V) probabilities."""
    full = np.zeros((len(ids), vocabulary))
    np.add.at(full, (np.arange(len(ids))[:, None], ids), np.exp(logs.astype(np.float64)))
    return full


def test_draws_come_of_the_inverse_distribution_and_equal_ones_merge() -> None:
    """u in [0, .5) is token 0, [.5, .75) token 1, [.75, .875) token 2, the rest token 3; each draw weighs
    1/4.
    """
    uniform = np.array([[0.0, 0.49, 0.51, 0.999], [0.8, 0.8, 0.8, 0.8]])
    ids, logs = draw(P.log().expand(2, 4), uniform, 1.0)
    assert ids.tolist() == [[0, 1, 3, 0], [2, 0, 0, 0]]
    assert np.exp(logs).tolist() == [pytest.approx([0.5, 0.25, 0.25, 0.0]), pytest.approx([1, 0, 0, 0])]
    assert (ids.dtype, logs.dtype) == (np.int32, np.float32)


def test_another_proposal_is_undone_by_the_weights() -> None:
    """q ∝ p^0.5 draws rare tokens more often; a draw's weight is p/q, normalised: with p = (.8, .2), q is
    (2/3, 1/3), so two draws of token 0 and one of token 1 weigh 2 x 1.2 and .6, which is .8 and .2.
    """
    logits = torch.tensor([[0.8, 0.2]]).log() + 3.0  # unnormalised on purpose
    ids, logs = draw(logits, np.array([[0.1, 0.6, 0.7]]), 0.5)
    assert ids.tolist() == [[0, 1, 0]]
    assert np.exp(logs)[0] == pytest.approx([0.8, 0.2, 0.0], abs=1e-6)


@pytest.mark.parametrize(("proposal", "tolerance"), [(1.0, 0.003), (0.7, 0.02)])
def test_the_mean_of_the_estimates_is_the_distribution(proposal: float, tolerance: float) -> None:
    """Unbiased for proposal 1 (4 standard errors at 20,000 x 12 draws: .004); for others up to the
    normalisation's 1/n.
    """
    p = torch.from_numpy(np.random.default_rng(4).dirichlet(np.full(30, 0.3)))
    uniform = np.random.default_rng(5).random((20_000, 12))
    ids, logs = draw(p.log().expand(20_000, 30), uniform, proposal)
    mean = dense(ids, logs, 30).mean(axis=0)
    assert mean.sum() == pytest.approx(1.0)
    assert np.abs(mean - p.numpy()).max() < tolerance


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    """Uniforms come of the digest and the seed alone."""
    assert (uniforms("a", 1, 3, 4) == uniforms("a", 1, 3, 4)).all()
    assert (uniforms("a", 1, 5, 4)[:3] == uniforms("a", 1, 3, 4)).all()
    assert not (uniforms("a", 1, 3, 4) == uniforms("b", 1, 3, 4)).any()
    assert not (uniforms("a", 1, 3, 4) == uniforms("a", 2, 3, 4)).any()


def test_a_token_without_probability_is_never_drawn() -> None:
    """A masked token (-inf), at the end where a rounding error would fall on it, too."""
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    logits[:, [7, 48, 49]] = -torch.inf
    almost = np.nextafter(1.0, 0.0)
    ids, logs = draw(logits, np.tile([[0.0, 0.5, almost, 0.499999]], (200, 1)), 1.0)
    assert not np.isin(ids[np.isfinite(logs)], [7, 48, 49]).any()
    assert (ids[np.isfinite(logs)] == 47).sum() == 200


def test_merging_keeps_the_sum_and_pads_behind() -> None:
    """Equal ids become one, heaviest first; what is over is id 0 with weight 0."""
    ids, logs = merge_equal(np.array([[7, 3, 7, 3, 9]]), np.array([[1.0, 0.5, 1.0, 0.25, 0.25]]))
    assert ids.tolist() == [[7, 3, 9, 0, 0]]
    assert np.exp(logs)[0] == pytest.approx([2 / 3, 0.25, 1 / 12, 0, 0])


def scored(ids: list[list[int]], p: list[list[float]]) -> dict[str, np.ndarray]:
    """A teacher's values."""
    with np.errstate(divide="ignore"):
        return {"topk_ids": np.array(ids, np.int32), "topk_logprobs": np.log(p).astype(np.float16)}


def test_an_average_of_top_k_keeps_all_mass() -> None:
    """Tokens in both top 2 are exact, a token one teacher misses is a lower bound, the tail is what is left.

    A: {1: .6, 2: .3}, tail .1; B: {2: .5, 3: .4}, tail .1, weights 3:1. Merged: 1: .45, 2: .35, 3: .1, of
    which the two largest stay; the tail is .1 (their tails' average) + .1 (token 3) = .2.
    """
    a, b = scored([[1, 2]], [[0.6, 0.3]]), scored([[2, 3]], [[0.5, 0.4]])
    merged = average_topk([a, b], [3.0, 1.0], 2)
    assert merged["topk_ids"].tolist() == [[1, 2]]
    values = np.exp(merged["topk_logprobs"].astype(np.float64))[0]
    assert values == pytest.approx([0.45, 0.35], rel=2e-3)
    assert 1 - values.sum() == pytest.approx(0.2, abs=2e-3)


def test_an_average_over_whole_distributions_is_exact() -> None:
    """With k = V nothing is in a tail: the result is the mean of the distributions."""
    generator = np.random.default_rng(3)
    p = generator.dirichlet(np.ones(6), size=(2, 4))
    teachers = []
    for one in p:
        order = np.argsort(-one, axis=1)
        teachers.append(scored(order.tolist(), np.take_along_axis(one, order, 1).tolist()))
    merged = average_topk(teachers, [1.0, 1.0], 6)
    got = dense(merged["topk_ids"], merged["topk_logprobs"], 6)
    assert got == pytest.approx(p.mean(axis=0), abs=2e-3)


def test_an_average_of_samples_is_their_mixture() -> None:
    """Weights add up by share: A {5: .75, 2: .25} and B {2: 1} at 1:1 make {5: .375, 2: .625}, padded."""
    a, b = scored([[5, 2]], [[0.75, 0.25]]), scored([[2, 0]], [[1.0, 0.0]])
    merged = average_sampled([a, b], [1.0, 1.0])
    assert merged["topk_ids"].shape == (1, 4)
    assert dense(merged["topk_ids"], merged["topk_logprobs"], 6)[0] == pytest.approx(
        [0, 0, 0.625, 0, 0, 0.375], abs=1e-3
    )
    assert np.isneginf(merged["topk_logprobs"][0, 2:]).all()


def test_rows_of_one_teacher_are_padded_to_those_of_several() -> None:
    """Files hold so many values a position everywhere."""
    wide = pad_to(scored([[5, 2]], [[0.75, 0.25]]), 4)
    assert wide["topk_ids"].tolist() == [[5, 2, 0, 0]]
    assert np.isneginf(wide["topk_logprobs"][0, 2:]).all()
