"""The parts of a Llama-like causal language model that are cut, masked or rounded. Knows nothing of why."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from contracts.errors import ConfigError

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are pre-norm attention and a gated MLP, and whose tensors are named as here."""


def check_kind(config: Any) -> None:
    """Raises: ConfigError for a model that is built otherwise."""
    if config.model_type not in KINDS:
        raise ConfigError(
            f"shrink: models of type {config.model_type!r} are not known; take one of {', '.join(KINDS)}."
        )


def head_dim(config: Any) -> int:
    """Width of a head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of all blocks, by their name in the model; embedding and head are none of them."""
    inside = {id(module) for block in model.get_decoder().layers for module in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    }


def masks(model: Any) -> dict[str, Tensor]:
    """Parameter's name -> mask of the weights that are not zero, of every linear layer in the blocks."""
    return {f"{name}.weight": layer.weight.detach() != 0 for name, layer in linears(model).items()}


def zeros(model: Any) -> float:
    """The share of the blocks' linear weights that are zero."""
    found = list(masks(model).values())
    return 1 - sum(int(one.sum()) for one in found) / sum(one.numel() for one in found)
