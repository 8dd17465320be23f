"""Rounding weights and activations and back, as the formats and kernels define it. Needs torch; knows nothing
about files or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12


def fake_quantize(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """A weight [out, in] rounded to nearest, symmetric, and back; a scale for each `group_size` inputs of an
    output, or (None) for each output. Scales are rounded to bf16, as they are stored.
    """
    grouped = weight.float().reshape(weight.shape[0], -1, group_size or weight.shape[1])
    top = 2 ** (bits - 1) - 0.5
    scale = (grouped.abs().amax(-1, keepdim=True) / top).to(torch.bfloat16).float().clamp_min(_TINY)
    rounded = (grouped / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (rounded * scale).reshape(weight.shape).to(weight.dtype)


def round_tokens(inputs: Tensor, symmetric: bool = True, bits: int = 8) -> Tensor:
    """Activations [..., in], each token by itself: what the int8 kernels see."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = inputs.float()
    if symmetric:
        scale = (values.abs().amax(-1, keepdim=True) / high).clamp_min(_TINY)
        return ((values / scale).round().clamp(low, high) * scale).to(inputs.dtype)
    least = values.amin(-1, keepdim=True).clamp_max(0)
    most = values.amax(-1, keepdim=True).clamp_min(0)
    scale = ((most - least) / (high - low)).clamp_min(_TINY)
    zero = (low - least / scale).round()
    return (((values / scale + zero).round().clamp(low, high) - zero) * scale).to(inputs.dtype)


def round_static(inputs: Tensor, scale: Tensor) -> Tensor:
    """Activations with one calibrated scale, symmetric int8."""
    values = inputs.float() / scale.float()
    return (values.round().clamp(-128, 127) * scale.float()).to(inputs.dtype)


def round_fp8(inputs: Tensor) -> Tensor:
    """Activations to float8 e4m3 and back, each token scaled to its range."""
    top = torch.finfo(torch.float8_e4m3fn).max
    scale = (inputs.float().abs().amax(-1, keepdim=True) / top).clamp_min(_TINY)
    return ((inputs.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)
