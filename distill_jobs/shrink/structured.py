"""A smaller model of the same kind out of a larger one: which parts stay, and their weights.

Blocks, query heads, neurons and channels are left out; key and value heads become the mean of neighbours
(GQA, arXiv 2305.13245, section 2.1). A norm over fewer channels is scaled so that what stays comes out as
before, by the share of the energy that the channels held. Knows nothing of files or of training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contracts.errors import ConfigError
from distill_jobs.shrink.blocks import check_kind, head_dim
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.importance import Importance


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays, in its old order."""

    layers: list[int]
    channels: Tensor  # (d',)
    neurons: dict[int, Tensor]  # block -> (intermediate',)
    heads: dict[int, Tensor]  # block -> (heads',), equally many of every new key head
    kv_heads: int
    norms: dict[str, float]
    """Norm's name -> factor on its weight, where channels are left out."""


def plan(config: Any, wanted: ShrinkConfig, found: Importance) -> Plan:
    """The most important parts, to the wanted shape.

    Raises: ConfigError for a shape that the model cannot be cut to, naming the field.
    """
    check_kind(config)
    layers = _size("layers", wanted.layers, config.num_hidden_layers)
    width = _size("hidden", wanted.hidden, config.hidden_size)
    neurons = _size("intermediate", wanted.intermediate, config.intermediate_size)
    kv_heads = _size("kv_heads", wanted.kv_heads, config.num_key_value_heads)
    heads = _size("heads", wanted.heads, config.num_attention_heads)
    if config.num_key_value_heads % kv_heads:
        raise ConfigError(
            f"shrink.kv_heads: {kv_heads} does not divide the checkpoint's {config.num_key_value_heads}."
        )
    if heads % kv_heads:
        raise ConfigError(f"shrink.heads: {heads} is no multiple of the {kv_heads} key and value heads.")
    if not hasattr(config, "head_dim") and heads * head_dim(config) != width:
        raise ConfigError(
            f"shrink.heads: models of type {config.model_type!r} need heads x {head_dim(config)} = hidden."
        )
    kept = _top(found.influence, layers).tolist()
    channels = _top(found.channels, width)
    every = config.hidden_size
    return Plan(
        kept,
        channels,
        {one: _top(found.neurons[one], neurons) for one in kept},
        {one: _of_groups(found.heads[one], heads, kv_heads) for one in kept},
        kv_heads,
        {
            name: float((share[channels].sum() * every / width).sqrt()) if width < every else 1.0
            for name, share in found.energy.items()
        },
    )


def _size(name: str, wanted: int | None, there: int) -> int:
    """A wanted size, or what is there. Raises: ConfigError when more is wanted."""
    if wanted is not None and wanted > there:
        raise ConfigError(f"shrink.{name}: {wanted} is more than the checkpoint's {there}.")
    return there if wanted is None else wanted


def _top(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores, in their order; of equals the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _of_groups(scores: Tensor, count: int, groups: int) -> Tensor:
    """The best heads, equally many of every group that shares a key head."""
    size = len(scores) // groups
    parts = [_top(part, count // groups) + place * size for place, part in enumerate(scores.split(size))]
    return torch.cat(parts)


def cut(model: Any, kept: Plan) -> Any:
    """A new model, in the dtype of the old one, of what the plan keeps."""
    config = _config(model.config, kept)
    smaller = type(model)(config).to(model.dtype)
    state = model.state_dict()
    new: dict[str, Tensor] = {}
    for place, block in enumerate(kept.layers):
        prefix = f"model.layers.{block}."
        for name in [one for one in state if one.startswith(prefix)]:
            inner = name.removeprefix(prefix)
            new[f"model.layers.{place}.{inner}"] = _block_tensor(
                inner, state[name], kept, block, head_dim(config)
            )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            new[name] = state[name][:, kept.channels]
    new["model.norm.weight"] = state["model.norm.weight"][kept.channels] * kept.norms["norm"]
    smaller.load_state_dict(new, strict=True)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def _block_tensor(inner: str, tensor: Tensor, kept: Plan, block: int, width: int) -> Tensor:
    """What stays of one of a block's tensors, named as within the block."""
    part, _, kind = inner.rpartition(".")
    match part:
        case "self_attn.q_proj":
            tensor = _heads(tensor, width)[kept.heads[block]].flatten(0, 1)
        case "self_attn.k_proj" | "self_attn.v_proj":
            grouped = _heads(tensor, width).unflatten(0, (kept.kv_heads, -1))
            tensor = grouped.float().mean(1).to(tensor.dtype).flatten(0, 1)
        case "self_attn.o_proj" if kind == "weight":
            tensor = tensor.unflatten(1, (-1, width))[:, kept.heads[block]].flatten(1, 2)
        case "mlp.gate_proj" | "mlp.up_proj":
            tensor = tensor[kept.neurons[block]]
        case "mlp.down_proj" if kind == "weight":
            tensor = tensor[:, kept.neurons[block]]
        case "input_layernorm" | "post_attention_layernorm":
            return tensor[kept.channels] * kept.norms[f"layers.{block}.{part}"]
    if part in ("self_attn.o_proj", "mlp.down_proj"):
        return tensor[kept.channels]
    return tensor[:, kept.channels] if tensor.ndim == 2 else tensor


def _heads(tensor: Tensor, width: int) -> Tensor:
    """(heads, width, ...) of a projection's weight or bias."""
    return tensor.unflatten(0, (-1, width))


def _config(old: Any, kept: Plan) -> Any:
    config = copy.deepcopy(old)
    width = head_dim(old)
    config.num_hidden_layers = len(kept.layers)
    config.hidden_size = len(kept.channels)
    config.intermediate_size = len(kept.neurons[kept.layers[0]])
    config.num_attention_heads = len(kept.heads[kept.layers[0]])
    config.num_key_value_heads = kept.kv_heads
    if hasattr(old, "head_dim"):
        config.head_dim = width  # else it would follow from the new width
    if getattr(old, "layer_types", None):
        config.layer_types = [old.layer_types[one] for one in kept.layers]
    return config
