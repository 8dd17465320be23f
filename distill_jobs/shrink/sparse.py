"""Single weights of a model's blocks set to zero: magnitude, Wanda, SparseGPT, and N:M patterns of each.

Block by block: what a block's layers are given comes out of the blocks before it as they are already pruned.
The model stays dense. Knows nothing of shapes, files or healing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from contracts.errors import ConfigError
from distill_jobs.shrink.blocks import linears
from distill_jobs.shrink.calibration import block_by_block
from distill_jobs.shrink.config import SparsifyConfig
from distill_jobs.shrink.surgeon import Sparse, lowest, lowest_of_neighbours, lowest_of_rows, sweep
from distill_jobs.training.data import Rows


def sparsify(model: Any, config: SparsifyConfig, rows: Rows, count: int) -> None:
    """Set weights of every linear layer in the blocks to zero, in place.

    Raises: ConfigError where a layer's columns are no whole groups of the pattern.
    """
    _check(model, config)
    if config.method == "magnitude":
        for layer in linears(model).values():
            _zero(layer, magnitude(layer.weight, config))
        return
    block_by_block(
        model,
        rows,
        count,
        config.method == "sparsegpt",
        lambda layer, moments: _prune(layer, moments, config),
    )


def magnitude(weight: Tensor, config: SparsifyConfig) -> Tensor:
    """Mask of what goes: the smallest weights of the layer, or of every M neighbours."""
    if config.n_of_m is not None:
        return lowest_of_neighbours(weight.abs().float(), *config.n_of_m)
    return lowest(weight.abs().float(), config.share)


def wanda(weight: Tensor, squares: Tensor, config: SparsifyConfig) -> Tensor:
    """Mask of what goes by |w_ij| * ||x_j||, a row at a time (arXiv 2306.11695, eq. 1); `squares` (in,) are
    the inputs' sums of squares."""
    cost = weight.abs().float() * squares.sqrt()
    if config.n_of_m is not None:
        return lowest_of_neighbours(cost, *config.n_of_m)
    return lowest_of_rows(cost, config.share)


def _check(model: Any, config: SparsifyConfig) -> None:
    if config.n_of_m is None:
        return
    m = config.n_of_m[1]
    for name, layer in linears(model).items():
        if layer.in_features % m:
            raise ConfigError(
                f"shrink.sparsify.pattern: {name} has {layer.in_features} columns, no whole groups of {m}."
            )


def _prune(layer: nn.Linear, moments: Tensor, config: SparsifyConfig) -> None:
    if config.method == "wanda":
        _zero(layer, wanda(layer.weight, moments, config))
        return
    rule = Sparse(config.share, config.n_of_m)
    # A pattern's groups must not lie across two blocks of columns.
    block = 128 if config.n_of_m is None else 128 // config.n_of_m[1] * config.n_of_m[1] or config.n_of_m[1]
    layer.weight.copy_(sweep(layer.weight, moments, rule, config.damping, block))


def _zero(layer: nn.Linear, goes: Tensor) -> None:
    with torch.no_grad():
        layer.weight.masked_fill_(goes, 0.0)
