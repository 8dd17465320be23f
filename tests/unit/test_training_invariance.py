"""The gradient of a step does not depend on how the step is cut: micro-batches, workers, packing, order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.parallel import Workers
from tests.unit.test_training_loop import config, tiny_model, write_rows

BATCH = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """24 rows with unequal weights, 8 of them rationales."""
    folder = write_rows(tmp_path_factory.mktemp("invariance") / "rows", BATCH, extra=True)
    return Rows(folder, 64, True)


def one(**changes: object) -> TrainConfig:
    loss = config().loss.model_copy(update={"prompt_weight": 0.2})
    return config(batch_rows=BATCH, loss=loss, **changes)


def step_gradient(rows: Rows, indices: np.ndarray, world: int, **changes: object) -> tuple[Tensor, Tensor]:
    """Sums of the gradients, and of the losses, that `world` workers make of one step."""
    total: list[Tensor] = []
    for rank in range(world):
        model = tiny_model()
        trainer = Trainer(model, rows, one(**changes), Workers(rank, world))
        sums = trainer.accumulate(0, indices)
        flat = [(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in model.parameters()]
        total.append(torch.cat([sums, *flat]))
    whole = torch.stack(total).sum(0)
    return whole[2:], whole[:2]


@pytest.fixture(scope="module")
def whole(rows: Rows) -> tuple[Tensor, Tensor]:
    """One worker, one padded micro-batch of all rows, in the order of the file."""
    return step_gradient(rows, np.arange(BATCH), 1, micro_tokens=100_000, packing=False)


def cuts() -> Iterator[tuple[int, int, bool, int]]:
    for world in (1, 2, 3, 5):
        for micro_tokens in (16, 50, 100_000):
            for packing in (False, True):
                yield world, micro_tokens, packing, world + micro_tokens


@pytest.mark.parametrize(("world", "micro_tokens", "packing", "seed"), cuts())
def test_the_gradient_is_that_of_one_big_batch(
    rows: Rows, whole: tuple[Tensor, Tensor], world: int, micro_tokens: int, packing: bool, seed: int
) -> None:
    """Workers x accumulation x packing, each with the rows in another order: gradient and losses of the step
    are those of one big batch within 1e-5 relative (fp32), weighted rows and prompt tokens included."""
    order = np.random.default_rng(seed).permutation(BATCH)
    gradient, losses = step_gradient(rows, order, world, micro_tokens=micro_tokens, packing=packing)
    assert float((gradient - whole[0]).norm() / whole[0].norm()) < 1e-5
    torch.testing.assert_close(losses, whole[1], rtol=1e-5, atol=0)


def test_dividing_by_the_micro_batch_would_be_seen(rows: Rows, whole: tuple[Tensor, Tensor]) -> None:
    """The mean of micro-batch means (the usual bug) is far outside the tolerance of the test above."""
    halves = [
        step_gradient(rows, part, 1, micro_tokens=100_000)[0]
        for part in np.array_split(np.argsort(rows.lengths), 2)
    ]
    assert float(((halves[0] + halves[1]) / 2 - whole[0]).norm() / whole[0].norm()) > 1e-3


def test_a_row_of_weight_two_counts_as_two_rows(rows: Rows) -> None:
    """Weights are what repeating rows would be, normalisation included; weight 0 is no row at all."""
    weights = np.ones(BATCH, np.float32)
    weights[3], weights[4] = 2.0, 0.0
    weighted = reweighted(rows, weights)
    repeated = np.array([i for i in range(8) if i != 4] + [3])
    plain = reweighted(rows, np.ones(BATCH, np.float32))
    a, losses = step_gradient(weighted, np.arange(8), 1)
    b, others = step_gradient(plain, repeated, 1)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, others, rtol=1e-5, atol=0)


def reweighted(rows: Rows, weights: np.ndarray) -> Rows:
    """The same rows under other weights."""
    other = object.__new__(Rows)
    other.__dict__.update(rows.__dict__, weights=weights)
    return other


def test_a_step_without_weight_changes_nothing(rows: Rows) -> None:
    """All rows at weight 0: a gradient of zeros, not of 0 / 0."""
    gradient, losses = step_gradient(reweighted(rows, np.zeros(BATCH, np.float32)), np.arange(6), 1)
    assert not gradient.any()
    assert losses.tolist() == [0.0, 0.0]
