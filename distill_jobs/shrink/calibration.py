"""Calibration rows through a model: packed passes, and what its blocks are given. Knows nothing of
importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_jobs.training.attention import register
from distill_jobs.training.data import MicroBatch, Rows
from distill_jobs.training.method_config import tokens_of_a_pass
from distill_jobs.training.order import split_for_worker


def passes(rows: Rows, count: int, device: torch.device) -> Iterator[tuple[MicroBatch, int]]:
    """The first rows, packed, and how many tokens of each pass are theirs (what follows only fills it up)."""
    first = np.arange(min(count, len(rows)))
    for one in split_for_worker(first, rows.lengths, 0, 1, tokens_of_a_pass(device.type), True):
        yield rows.micro_batch(one, False, True).to(device), int(rows.lengths[one].sum())


def prepared(model: Any) -> Any:
    """The model with the attention that keeps packed rows apart, without dropout or gradients."""
    model.set_attn_implementation(register())
    return model.eval().requires_grad_(False)


@dataclass(slots=True)
class BlockInput:
    """One pass before a block: the states that go in, and what else every block is called with."""

    states: Tensor  # (1, S, d)
    others: dict[str, Any]
    tokens: int  # the first so many of the S are real


class _Caught(Exception):
    """Ends a forward pass before the first block."""


def first_inputs(model: Any, rows: Rows, count: int) -> list[BlockInput]:
    """What the first block is given for every pass of the calibration rows."""
    found: list[BlockInput] = []

    def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        states = args[0] if args else kwargs["hidden_states"]
        found.append(BlockInput(states, others, 0))
        raise _Caught

    decoder = model.get_decoder()
    hook = decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch, tokens in passes(rows, count, model.device):
            try:
                decoder(**batch.model_inputs(), use_cache=False)
            except _Caught:
                found[-1].tokens = tokens
    finally:
        hook.remove()
    return found


def through(block: Any, given: BlockInput) -> Tensor:
    """(1, S, d) a block's output."""
    out = block(given.states, **given.others)
    return out[0] if isinstance(out, tuple) else out


Settle = Callable[[nn.Linear, Tensor], None]
"""Changes a layer's weights in place, given (in, in) second moments of its input, or (in,) their diagonal."""


def block_by_block(model: Any, rows: Rows, count: int, whole: bool, settle: Settle) -> None:
    """Settle every linear layer in the blocks, in place, on the first `count` rows: a block is given what
    comes out of the blocks before it as they are already settled. `whole`: all second moments, not only the
    diagonal."""
    with torch.no_grad():
        waiting = first_inputs(prepared(model), rows, count)
        for block in model.get_decoder().layers:
            layers = [one for one in block.modules() if isinstance(one, nn.Linear)]
            moments = _moments(block, layers, waiting, whole)
            for layer in layers:
                settle(layer, moments[id(layer)])
            for one in waiting:
                one.states = through(block, one)


def _moments(
    block: nn.Module, layers: list[nn.Linear], waiting: list[BlockInput], whole: bool
) -> dict[int, Tensor]:
    """By the layer's id: its input's second moments."""
    found: dict[int, Tensor] = {}
    tokens = 0

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        given = args[0].reshape(-1, args[0].shape[-1])[:tokens].float()
        new = given.T @ given if whole else given.square().sum(0)
        found[id(layer)] = found[id(layer)] + new if id(layer) in found else new

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        for one in waiting:
            tokens = one.tokens
            through(block, one)
    finally:
        for hook in hooks:
            hook.remove()
    return found
