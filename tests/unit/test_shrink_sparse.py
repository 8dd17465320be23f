"""Sparse students: the right weights become zero, what stays makes up for it, and healing keeps the zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from contracts.errors import ConfigError
from distill_jobs.shrink.blocks import linears, masks, zeros
from distill_jobs.shrink.config import ShrinkConfig, SparsifyConfig
from distill_jobs.shrink.sparse import magnitude, sparsify, wanda
from distill_jobs.shrink.surgeon import Rounded, Sparse, on_grid, sweep
from distill_jobs.training.config import LossConfig, OptimizerConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.rounding import Grid, rounded
from tests.unit.teacher_world import model, rows_folder

METHODS = ("magnitude", "wanda", "sparsegpt")


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """A few random rows."""
    return Rows(rows_folder(tmp_path / "rows"), 32, False)


def layer(out: int = 5, columns: int = 8, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs (tokens, columns) and their second moments."""
    torch.manual_seed(1)
    inputs = torch.randn(tokens, columns) @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns))
    return torch.randn(out, columns), inputs, inputs.T @ inputs


def brute_force(weight: Tensor, hessian: Tensor, goes: Any) -> Tensor:
    """Optimal brain surgeon as it is defined: a fresh inverse of what is still open at every column."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    mask = goes(weight, torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))]))
    for row in range(len(weight)):
        for j in range(len(hessian)):
            if mask[row, j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
    return weight


def test_sparsegpt_is_optimal_brain_surgeon() -> None:
    """Against brute force on a tiny layer: the same weights go, the others end the same to rounding."""
    weight, _, hessian = layer()

    def cheapest(now: Tensor, inverses: Tensor) -> Tensor:
        cost = now.square() / inverses
        return cost <= cost.flatten().kthvalue(20).values

    expected = brute_force(weight, hessian, cheapest)
    found = sweep(weight, hessian, Sparse(0.5))
    assert torch.equal(found == 0, expected.abs() < 1e-9)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_blocks_of_columns_end_where_one_block_does() -> None:
    """The lazy update of later blocks is the immediate one, where both prune the same (an N:M pattern)."""
    weight, _, hessian = layer(columns=16)
    whole = sweep(weight, hessian, Sparse(0.5, (2, 4)))
    assert torch.allclose(sweep(weight, hessian, Sparse(0.5, (2, 4)), block=4), whole, atol=1e-4)


def test_what_stays_makes_up_for_one_column_as_least_squares_would() -> None:
    """With the first column gone, the others are the least-squares fit of the layer's outputs without it."""
    weight, inputs, hessian = layer(out=1)
    weight[0, 0] = 1e-3  # it costs least

    found = sweep(weight, hessian, Sparse(1 / 8), damping=1e-9)
    fit = torch.linalg.lstsq(inputs[:, 1:].double(), (inputs @ weight.T).double()).solution
    assert found[0, 0] == 0
    assert torch.allclose(found[:, 1:].double(), fit.T, atol=1e-5)


def test_surgery_errs_less_than_zeroing_and_gptq_less_than_rounding() -> None:
    """On the layer's own inputs: SparseGPT against magnitude, GPTQ against round to nearest; without
    correlations GPTQ is rounding."""
    torch.manual_seed(1)
    weight, grid = torch.randn(16, 64), Grid(3, 32, symmetric=True)
    inputs = torch.randn(400, 8) @ torch.randn(8, 64) + 0.3 * torch.randn(
        400, 64
    )  # few directions, as activations
    hessian = inputs.T @ inputs

    def error(other: Tensor) -> float:
        return float((inputs @ (other - weight).T).square().sum())

    plain = weight.masked_fill(magnitude(weight, SparsifyConfig()), 0.0)
    assert error(sweep(weight, hessian, Sparse(0.5))) < 0.7 * error(plain)
    assert error(on_grid(weight, hessian, grid)) < 0.7 * error(rounded(weight, grid))
    whole = weight.bfloat16().float()
    assert torch.equal(on_grid(whole, torch.eye(64), grid), rounded(whole, grid))


def test_groups_longer_than_a_block_keep_their_one_scale() -> None:
    """48, 256 and all 768 inputs: what is rounded is the group, not the block of the sweep; a block that cuts
    a group in two is refused."""
    torch.manual_seed(2)
    weight = torch.randn(8, 768).bfloat16().float()
    for size in (48, 256, 768):
        grid = Grid(4, size, symmetric=True)
        assert torch.equal(on_grid(weight, torch.eye(768), grid), rounded(weight, grid))
    with pytest.raises(ValueError, match="no whole groups of 256"):
        sweep(weight, torch.eye(768), Rounded(Grid(4, 256, symmetric=True)))


def test_an_input_that_never_comes_takes_its_weights_along() -> None:
    """A dead column is zero afterwards and leaves the factorisation alone."""
    weight, inputs, _ = layer()
    inputs[:, 3] = 0
    found = sweep(weight, inputs.T @ inputs, Sparse(0.25))
    assert torch.isfinite(found).all()
    assert (found[:, 3] == 0).all()


def test_wanda_weighs_by_the_inputs_norm_a_row_at_a_time() -> None:
    """A small weight on a loud input stays, a larger one on a silent input goes; every row gives up half."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 1.5, 9.0]])
    goes = wanda(weight, torch.tensor([100.0, 1.0, 1.0, 0.01]), SparsifyConfig(method="wanda"))
    assert goes.tolist() == [[False, True, False, True], [False, True, False, True]]
    assert magnitude(weight, SparsifyConfig()).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_share_is_what_was_asked_for(rows: Rows, method: str, pattern: str | None) -> None:
    """Half of every linear layer's weights are zero; with 2:4 half of every four neighbours; embeddings,
    head and norms are left alone."""
    student = model(0)
    before = {name: one.clone() for name, one in student.state_dict().items()}
    config = {"method": method} | ({"pattern": pattern} if pattern else {"share": 0.5})
    sparsify(student, SparsifyConfig.model_validate(config), rows, 8)
    inside = {f"{name}.weight" for name in linears(student)}
    assert len(inside) == 14
    for name, tensor in student.state_dict().items():
        if name not in inside:
            assert torch.equal(tensor, before[name]), name
        elif pattern:
            assert ((tensor.reshape(-1, 4) == 0).sum(1) == 2).all(), name
        else:
            assert (tensor == 0).double().mean() == pytest.approx(0.5), name
    assert zeros(student) == pytest.approx(0.5)


def test_later_blocks_are_calibrated_on_pruned_ones(rows: Rows) -> None:
    """The second block's inputs are those that come out of the first one as pruned, real tokens only."""
    config = SparsifyConfig(method="wanda")
    student, again = model(0), model(0)
    sparsify(student, config, rows, 8)
    for one, pruned in zip(_linears(again, 0), _linears(student, 0), strict=True):
        one.weight.data.copy_(pruned.weight)
    target, seen = again.get_decoder().layers[1].mlp.up_proj, torch.zeros(16)

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add_(args[0][0].square().sum(0).detach())

    target.register_forward_pre_hook(watch)
    for index in range(8):
        again(input_ids=torch.from_numpy(rows.tokens(index).astype("int64"))[None])
    found = student.get_decoder().layers[1].mlp.up_proj.weight == 0
    assert torch.equal(found, wanda(target.weight, seen, config))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_healing_keeps_the_zeros(rows: Rows, kind: str, dtype: str) -> None:
    """After steps of either optimizer what was zero is zero and the rest has moved; a plain training of the
    same student fills the zeros."""
    shrink = ShrinkConfig(sparsify=SparsifyConfig(method="magnitude"), rows=4)
    for config in (_training(kind, dtype, shrink), _training(kind, dtype, None)):
        student = model(0)
        sparsify(student, SparsifyConfig(method="magnitude"), rows, 4)
        student.requires_grad_(True)
        kept = masks(student)
        before = {name: student.state_dict()[name].clone() for name in kept}
        assert [m["step"] for m in Trainer(student, rows, config).run()] == [1, 2, 3]
        after = student.state_dict()
        filled = [bool((after[name][~mask] != 0).any()) for name, mask in kept.items()]
        assert not any(filled) if config.shrink else all(filled)
        assert all((after[n].float() != before[n])[mask].any() for n, mask in kept.items())


def test_patterns_that_mean_nothing_are_refused(rows: Rows) -> None:
    """A pattern that keeps everything, a share beside a pattern, columns that are no whole groups."""
    with pytest.raises(ValidationError, match="N must be below M"):
        SparsifyConfig(pattern="4:4")
    with pytest.raises(ValidationError, match="leave one of the two out"):
        SparsifyConfig(pattern="2:4", share=0.3)
    with pytest.raises(ConfigError, match="no whole groups of 5"):
        sparsify(model(0), SparsifyConfig(pattern="2:5"), rows, 2)


def _linears(student: Any, block: int) -> list[nn.Linear]:
    return [one for one in student.get_decoder().layers[block].modules() if isinstance(one, nn.Linear)]


def _training(kind: str, dtype: str, shrink: ShrinkConfig | None) -> TrainConfig:
    return TrainConfig(
        max_steps=3,
        epochs=10,
        batch_rows=8,
        dtype=dtype,  # type: ignore[arg-type]
        shrink=shrink,
        optimizer=OptimizerConfig(kind=kind, lr=1e-2),  # type: ignore[arg-type]
        loss=LossConfig(kd_weight=0, hard_weight=1),
    )
