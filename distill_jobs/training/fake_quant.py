"""Quantization-aware training: the blocks' linear layers compute with their weights on the served grid.

The parameters stay what they are, in bf16 or fp32, under their own names: they are what is optimised and
saved (LLM-QAT, arXiv 2305.17888; distilled from the 16-bit teacher as in BitDistiller, arXiv 2402.10631).
Knows nothing of files (`packed`) or losses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from contracts.errors import ConfigError
from distill_jobs.shrink.blocks import linears
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.rounding import Grid, StraightThrough


class RoundedLinear(nn.Linear):
    """A linear layer of weights on a grid; gradients reach the weights that are rounded."""

    grid: Grid

    def forward(self, states: Tensor) -> Tensor:
        rounded: Tensor = StraightThrough.apply(self.weight, self.grid)  # type: ignore[no-untyped-call]
        return linear(states, rounded, self.bias)


def grid_for(config: FakeQuantConfig) -> Grid:
    """The configuration as numbers."""
    return Grid(config.bits, config.group_size, config.symmetric)


def fake_quantize(model: Any, config: FakeQuantConfig) -> None:
    """Turn the linear layers of all blocks into rounded ones, in place; the head stays as it is.

    Raises: ConfigError where a layer's columns are no whole groups.
    """
    layers = linears(model)
    check_columns({name: layer.in_features for name, layer in layers.items()}, config)
    for layer in layers.values():
        layer.__class__ = RoundedLinear
        layer.grid = grid_for(config)  # type: ignore[assignment]


def check_columns(columns: dict[str, int], config: FakeQuantConfig) -> None:
    """Raises: ConfigError naming a layer whose in-features the group size does not divide."""
    bad = {name: count for name, count in columns.items() if count % config.group_size}
    if bad:
        name, count = next(iter(bad.items()))
        fits = [size for size in (128, 64, 32) if all(one % size == 0 for one in columns.values())]
        fix = f"Set it to {fits[0]}." if fits else "Choose widths that are multiples of 32."
        raise ConfigError(
            f"train.fake_quant.group_size: {config.group_size} does not divide the in-features of {len(bad)}"
            f" layers ({name} has {count}). {fix}"
        )
