"""The extra terms against values worked out by hand; their gradients reach student and projections."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill_jobs.training.recorder import Heads, Seen
from distill_jobs.training.terms.attention import AttentionMaps, map_kl, map_mse, scores
from distill_jobs.training.terms.contrastive import Contrast, info_nce
from distill_jobs.training.terms.hidden import HiddenStates, hidden_distance
from distill_jobs.training.terms.positions import Positions, spread
from distill_jobs.training.terms.rationale import task_scale
from distill_jobs.training.terms.relation import Relations, distance_loss, relation_scores

ALL = Positions(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))


def test_the_even_layer_map_ends_at_the_last_block() -> None:
    """Two of sixteen blocks learn from 8 and 16 (TinyBERT's uniform strategy); none from before block 1."""
    assert spread(2, 16) == ((1, 8), (2, 16))
    assert spread(3, 2) == ((1, 1), (2, 1), (3, 2))


def test_hidden_distances_by_hand() -> None:
    """MSE is a mean over dimensions; the cosine distance of orthogonal states is 1, of parallel ones 0."""
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert hidden_distance(student, teacher, "mse").tolist() == [1.0, 1.0]
    assert hidden_distance(student, teacher, "cosine").tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_attention_maps_by_hand() -> None:
    """Scores of what lies ahead are masked; KL and MSE are means over heads of what a query sees."""
    query = torch.tensor([[[[1.0], [2.0]]]])  # one row, one head, two tokens, one dimension
    both = Positions(torch.tensor([0, 0]), torch.tensor([0, 1]))
    mine = scores(query, query, 1.0, both)
    assert mine[:, 0].tolist() == [[1.0, -math.inf], [2.0, 4.0]]
    its = scores(query, torch.zeros_like(query), 1.0, both)  # uniform over what is seen
    q = 1 / (1 + math.exp(2))  # softmax of (2, 4) at its first
    expected = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    assert map_kl(mine, its).tolist() == pytest.approx([0.0, expected], rel=1e-5)
    assert map_mse(mine, its).tolist() == pytest.approx([1.0, (4 + 16) / 2])


def test_maps_of_unequal_heads_are_compared_by_their_means() -> None:
    """Two student heads whose mean is the teacher's one head cost nothing."""
    student = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
    teacher = torch.tensor([[[0.5, 0.5]]]).log()
    assert map_kl(student, teacher).tolist() == pytest.approx([0.0], abs=1e-6)


def test_relations_by_hand() -> None:
    """Value relations are softmax(VV^T / sqrt(d)) over what a token sees."""
    value = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]]]])
    both = Positions(torch.tensor([0, 0]), torch.tensor([0, 1]))
    seen = relation_scores(value, both)[:, 0]
    assert seen[1].tolist() == pytest.approx([0.0, 4 / math.sqrt(2)])
    assert seen[0].tolist() == pytest.approx([4 / math.sqrt(2), -math.inf])


def test_token_distances_by_hand() -> None:
    """RKD-D: distances over their own mean, so a student that is the teacher scaled and shifted costs
    nothing; else Huber."""
    teacher = torch.tensor([[[0.0], [1.0], [3.0]]])
    assert distance_loss(teacher * 5 + 2, teacher, ALL).abs().max() < 1e-6
    # Pairs (1,0), (2,0), (2,1): teacher 1, 3, 2, mean 2; student 1, 2, 1, mean 4/3.
    student = torch.tensor([[[0.0], [1.0], [2.0]]])
    gaps = [0.75 - 0.5, 1.5 - 1.5, 0.75 - 1.0]
    expected = [0.0, 0.5 * gaps[0] ** 2, (0.5 * gaps[1] ** 2 + 0.5 * gaps[2] ** 2) / 2]
    assert distance_loss(student, teacher, ALL).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_distances_of_equal_tokens_have_a_finite_gradient() -> None:
    """Two tokens in one place (distance 0) give no NaN."""
    student = torch.ones(1, 3, 2, requires_grad=True)
    distance_loss(student, torch.randn(1, 3, 2), ALL).sum().backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_info_nce_by_hand() -> None:
    """-log softmax of cosines over temperature at the own token; other rows are no negatives unless asked."""
    a = torch.eye(2)
    own = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert info_nce(a, a, None, 0.5).tolist() == pytest.approx([own, own], rel=1e-5)
    assert info_nce(a, a, torch.tensor([0, 1]), 0.5).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_task_shares_by_hand() -> None:
    """(1 - a) * mean over answers + a * mean over rationales, whatever their numbers of tokens."""
    losses, rationale = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([False, False, True])
    scale = task_scale(torch.ones(3), rationale, 3.0, 1.0, 0.25)
    assert float((losses * scale).sum()) == pytest.approx(0.75 * 1.5 + 0.25 * 6)
    alone = task_scale(torch.ones(2), rationale[:2], 2.0, 0.0, 0.25)
    assert float((losses[:2] * alone).sum()) == pytest.approx(1.5)


def _seen(width: int, heads: int, blocks: int, seed: int) -> Seen:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return Seen(
        None,
        {b: draw(1, 3, width) for b in range(blocks + 1)},
        {
            b: Heads(draw(1, heads, 3, 4), draw(1, heads, 3, 4), draw(1, heads, 3, 4), 0.5)
            for b in range(1, blocks + 1)
        },
    )


@pytest.mark.parametrize("kind", ["hidden", "contrastive"])
def test_projections_are_trained(kind: str) -> None:
    """Gradients reach the student's states and every projection; the teacher's width need not be the
    student's."""
    student, teacher = _seen(6, 2, 2, 0), _seen(10, 3, 4, 1)
    layers, widths = ((1, 2), (2, 4)), (6, 10)
    term = HiddenStates(layers, widths, "mse") if kind == "hidden" else Contrast(layers, widths, 0.1, "row")
    loss = term(student, teacher, ALL)
    assert loss.shape == (3,)
    loss.sum().backward()
    grads = [p.grad for p in term.parameters()]
    assert len(grads) == 2
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert all(student.hidden[b].grad.abs().sum() > 0 for b in (1, 2))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["kl", "mse", "value", "query", "distance"])
def test_maps_and_relations_train_the_student(kind: str) -> None:
    """Gradients reach what the student computed, and the loss is 0 against itself."""
    student, teacher = _seen(6, 2, 1, 0), _seen(6, 2, 1, 1)
    maps = kind in ("kl", "mse")
    term = AttentionMaps(((1, 1),), kind) if maps else Relations(((1, 1),), kind)  # type: ignore[arg-type]
    assert float(term(student, student, ALL).abs().max().detach()) < 1e-6
    term(student, teacher, ALL).sum().backward()
    source = {"distance": student.hidden[1], "value": student.heads[1].value}.get(
        kind, student.heads[1].query
    )
    assert source.grad is not None
    assert source.grad.abs().sum() > 0
