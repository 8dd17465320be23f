"""How much each part of a model does on calibration rows: blocks, heads, neurons, channels.

One pass measures all of them. A head or neuron counts by what it adds to the residual stream, so one whose
input, activation or outgoing weights are zero counts nothing. Knows nothing of what is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contracts.errors import DataError
from distill_jobs.shrink.blocks import head_dim
from distill_jobs.shrink.calibration import passes, prepared
from distill_jobs.training.data import Rows


@dataclass(slots=True)
class Importance:
    """Means over the calibration rows' tokens, in float64."""

    influence: Tensor  # (L,) 1 - cosine between a block's input and its output
    heads: Tensor  # (L, heads) squared norm of what the head adds to the residual stream
    neurons: Tensor  # (L, intermediate) squared norm of what the neuron adds to it
    channels: Tensor  # (d,) absolute outputs of the blocks' and the last norm, summed over the norms
    energy: dict[str, Tensor] = field(default_factory=dict)
    """Norm's name -> (d,) each channel's share of the squared norm of what goes in; sums to 1."""


def measure(model: Any, rows: Rows, count: int) -> Importance:
    """Importance on the first `count` rows.

    Blocks: block influence (ShortGPT, arXiv 2403.03853, eq. 1). Channels: absolute layer norm outputs
    (Minitron, arXiv 2407.14679, section 2.2). Heads and neurons: Minitron's activations, times the weights
    that carry them on.

    Raises: DataError without rows.
    """
    config = prepared(model).config
    size, found = len(model.get_decoder().layers), Importance(*_zeros(config))
    hooks, seen, tokens = [], 0, 0
    for name, module, watch in _watched(model, found, size):
        hooks.append(module.register_forward_hook(_hook(watch, lambda: tokens, name)))
    try:
        with torch.no_grad():
            for batch, tokens in passes(rows, count, model.device):
                model.get_decoder()(**batch.model_inputs(), use_cache=False)
                seen += tokens
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise DataError("shrink: there are no rows to measure importance on.")
    for one in (found.influence, found.heads, found.neurons, found.channels, *found.energy.values()):
        one /= seen
    return found


def _zeros(config: Any) -> list[Tensor]:
    layers = config.num_hidden_layers
    shapes = [(layers,), (layers, config.num_attention_heads), (layers, config.intermediate_size)]
    return [torch.zeros(*shape, dtype=torch.float64) for shape in (*shapes, (config.hidden_size,))]


Watch = Callable[[str, Any, Tensor, Tensor], None]
"""(name, module, what went in, what came out), both (tokens, width) in fp32."""


def _watched(model: Any, found: Importance, size: int) -> list[tuple[str, Any, Watch]]:
    """(name, module, what it is watched by) of everything that is measured."""
    decoder, width = model.get_decoder(), head_dim(model.config)
    watched: list[tuple[str, Any, Watch]] = []
    for place in range(size):
        block = decoder.layers[place]
        watched.append((f"layers.{place}", block, _influence(found, place)))
        watched.append((f"layers.{place}", block.self_attn.o_proj, _heads(found, place, width)))
        watched.append((f"layers.{place}", block.mlp.down_proj, _neurons(found, place)))
        for name in ("input_layernorm", "post_attention_layernorm"):
            watched.append((f"layers.{place}.{name}", getattr(block, name), _channels(found)))
    return [*watched, ("norm", decoder.norm, _channels(found))]


def _hook(watch: Watch, tokens: Callable[[], int], name: str) -> Any:
    """A forward hook that hands on the real tokens of one packed pass."""

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        went_in, came_out = (one.reshape(-1, one.shape[-1])[: tokens()].float() for one in (args[0], out))
        watch(name, module, went_in, came_out)

    return hook


def _influence(found: Importance, place: int) -> Watch:
    def watch(_: str, __: Any, before: Tensor, after: Tensor) -> None:
        found.influence[place] += (1 - cosine_similarity(before, after)).double().sum().cpu()

    return watch


def _heads(found: Importance, place: int, width: int) -> Watch:
    def watch(_: str, module: Any, mixed: Tensor, __: Tensor) -> None:
        for head in range(found.heads.shape[1]):
            part = slice(head * width, (head + 1) * width)
            added = mixed[:, part] @ module.weight[:, part].float().T
            found.heads[place, head] += added.square().double().sum().cpu()

    return watch


def _neurons(found: Importance, place: int) -> Watch:
    def watch(_: str, module: Any, active: Tensor, __: Tensor) -> None:
        outgoing = module.weight.float().square().sum(0)
        found.neurons[place] += (active.square().sum(0) * outgoing).double().cpu()

    return watch


def _channels(found: Importance) -> Watch:
    def watch(name: str, _: Any, before: Tensor, after: Tensor) -> None:
        squares = before.square()
        shares = squares / squares.sum(1, keepdim=True).clamp_min(1e-30)
        found.channels += after.abs().double().sum(0).cpu()
        known = found.energy.setdefault(name, torch.zeros_like(found.channels))
        known += shares.double().sum(0).cpu()

    return watch
