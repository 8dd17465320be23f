"""An artifact's weights back in bf16, read from its files: an oracle beside every engine.

Reads compressed-tensors (packed, int8, float8), AutoAWQ's GEMM layout and AutoGPTQ's v1, from their published
layouts and from nobody's code that writes or serves them. Needs torch and safetensors; knows nothing about
engines or quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from contracts.errors import DataError
from distill_jobs.quantizing.checkpoints import quantization_of
from distill_jobs.quantizing.rounding import round_fp8, round_static, round_tokens

_AWQ_REVERSED = (0, 4, 1, 5, 2, 6, 3, 7)
_OWN = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
        "input_zero_point", "qweight", "qzeros", "scales", "g_idx")  # fmt: skip

Hook = Callable[[Any, Any], tuple[Tensor]]


def dequantized(artifact: Path) -> dict[str, Tensor]:
    """Every parameter by its name in an unquantized checkpoint, bf16. Raises: DataError for another
    format.
    """
    quantization = quantization_of(artifact) or {}
    stored = dict(_stored(artifact))
    layers: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part in _OWN:
            layers.setdefault(layer, {})[part] = tensor
        else:
            plain[name] = tensor
    for layer, parts in layers.items():
        if f"{layer}.weight" in plain:
            parts["weight"] = plain[f"{layer}.weight"]
        plain[f"{layer}.weight"] = _weight(layer, parts, quantization).to(torch.bfloat16)
    return plain


def _stored(artifact: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(artifact.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118 (it is no dict)
                yield name, source.get_tensor(name)


def _weight(layer: str, parts: dict[str, Tensor], quantization: dict[str, Any]) -> Tensor:
    method = quantization.get("quant_method")
    if method == "compressed-tensors" and "weight_packed" in parts:
        return _packed(parts, int(_scheme_of(layer, quantization)["weights"]["num_bits"]))
    if method == "compressed-tensors" and "weight" in parts:
        return _scaled(parts["weight"], parts["weight_scale"])
    if method == "awq" and quantization.get("bits", quantization.get("w_bit")) == 4:
        return _awq(parts)
    if method == "gptq" and quantization.get("bits") == 4 and not quantization.get("desc_act"):
        return _gptq(parts)
    raise DataError(
        f"{layer} holds {', '.join(sorted(parts))}, and quant_method is {method!r}: this is none of the"
        " formats that can be read back (compressed-tensors, 4-bit awq, 4-bit gptq without desc_act)."
    )


def _packed(parts: dict[str, Tensor], bits: int) -> Tensor:
    outs, ins = (int(n) for n in parts["weight_shape"])
    values = _nibbles(parts["weight_packed"], bits)[:, :ins]
    zero: Tensor | int = 2 ** (bits - 1)
    if (zeros := parts.get("weight_zero_point")) is not None:
        zero = _spread(_nibbles(zeros.T, bits)[:, :outs].T, ins)
    return (values - zero).float() * _spread(parts["weight_scale"], ins).float()


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (
        weight.float() * _spread(scale.reshape(-1, 1) if scale.dim() < 2 else scale, weight.shape[1]).float()
    )


def _awq(parts: dict[str, Tensor]) -> Tensor:
    order = list(_AWQ_REVERSED)
    values, zeros = (
        _nibbles(parts[name], 4).reshape(parts[name].shape[0], -1, 8)[:, :, order].flatten(1)
        for name in ("qweight", "qzeros")
    )
    ins = values.shape[0]
    scaled = (values - _spread(zeros.T, ins).T).float() * _spread(parts["scales"].T, ins).T.float()
    return scaled.T.contiguous()


def _gptq(parts: dict[str, Tensor]) -> Tensor:
    values = _nibbles(parts["qweight"].T, 4)
    groups = parts["g_idx"].long()
    zeros = _nibbles(parts["qzeros"], 4) + 1
    return (values - zeros[groups].T).float() * parts["scales"][groups].T.float()


def _nibbles(packed: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 to [rows, n * 32 / bits] unsigned, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).reshape(packed.shape[0], -1)


def _spread(grouped: Tensor, ins: int) -> Tensor:
    """[out, groups] to [out, in]: each group's value at each of its inputs."""
    return grouped.repeat_interleave(ins // grouped.shape[1], dim=1)


def _scheme_of(layer: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """The config group whose targets name the layer, else the one for every linear layer."""
    groups: list[dict[str, Any]] = list((quantization.get("config_groups") or {}).values())
    for group in groups:
        for target in group["targets"]:
            if target == layer or (target.startswith("re:") and re.match(target[3:], layer)):
                return group
    for group in groups:
        if "Linear" in group["targets"]:
            return group
    raise DataError(f"quantization_config has no group for {layer}, whose weights are quantized.")


def activation_hooks(model: Any, artifact: Path) -> None:
    """Round the inputs of the artifact's quantized layers in `model` as its kernels do."""
    quantization = quantization_of(artifact) or {}
    names = [n for n, _ in _stored(artifact)]
    scales = {n: t for n, t in _stored(artifact) if n.endswith(".input_scale")}
    layers = {n.rpartition(".")[0] for n in names if n.endswith((".weight_packed", ".weight_scale"))}
    for layer in sorted(layers):
        inputs = _scheme_of(layer, quantization).get("input_activations")
        if inputs:
            scale = scales.get(f"{layer}.input_scale")
            model.get_submodule(layer).register_forward_pre_hook(_hook(inputs, scale))


def _hook(inputs: dict[str, Any], scale: Tensor | None) -> Hook:
    if inputs["type"] == "float":
        return lambda _, given: (round_fp8(given[0]),)
    if scale is not None:
        return lambda _, given: (round_static(given[0], scale),)
    return lambda _, given: (round_tokens(given[0], inputs["symmetric"], inputs["num_bits"]),)
