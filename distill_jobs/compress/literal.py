"""A compressed-tensors checkpoint of 4-bit weights, rewritten in the formats of AutoAWQ and AutoGPTQ.

The same integers, scales and zero points in another order, so that any algorithm can be had in a format that
other tools load: AutoAWQ's own files were wrong when measured, and auto-round's values no better than
rounding. Layouts: AutoAWQ's WQLinear_GEMM (GEMM pack order 0 2 4 6 1 3 5 7 along the
outputs) and AutoGPTQ's v1 (packed along the inputs, zero points less one). Needs torch and safetensors
alone; knows nothing about models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ZERO = 8
"""The integer that means zero where weights are symmetric: 4 bits are stored unsigned."""


def rewrite(folder: Path, form: str) -> None:
    """Rewrite a checkpoint folder in place. `form` is "awq" or "gptq"."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    files = sorted(folder.glob("*.safetensors"))
    packed: list[str] = []
    for file in files:
        tensors = load_file(file)
        names = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
        for name in names:
            layer = {part: tensors.pop(f"{name}.{part}", None) for part in _PARTS}
            tensors |= {f"{name}.{key}": value for key, value in _layer(layer, form).items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
        packed += names
    _index(folder, files)
    plain = config["quantization_config"].get("ignore") or []
    config["quantization_config"] = _told(form, weights, plain)
    config["torch_dtype"] = config.get("dtype", "bfloat16")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def _told(form: str, weights: dict[str, Any], plain: list[str]) -> dict[str, Any]:
    """`quantization_config` as each format's readers want it."""
    if form == "awq":
        return {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": weights["group_size"],
            "zero_point": True, "modules_to_not_convert": plain,
        }  # fmt: skip
    return {
        "quant_method": "gptq", "bits": 4, "group_size": weights["group_size"], "sym": True,
        "desc_act": False, "checkpoint_format": "gptq", "lm_head": False,
    }  # fmt: skip


def _layer(layer: dict[str, Tensor | None], form: str) -> dict[str, Tensor]:
    """One layer's tensors. From [out, in / 8] packed along the inputs to the format's own."""
    packed, scale, shape = layer["weight_packed"], layer["weight_scale"], layer["weight_shape"]
    assert packed is not None
    assert scale is not None
    assert shape is not None
    outs, ins = (int(n) for n in shape)
    values = unpack(packed)[:, :ins]
    zeros = layer["weight_zero_point"]
    groups = scale.shape[1]
    # compressed-tensors packs zero points along the outputs: [out / 8, groups].
    zero = torch.full((outs, groups), ZERO) if zeros is None else unpack(zeros.T)[:, :outs].T
    if form == "awq":
        return {
            "qweight": pack(awq_order(values.T)),
            "qzeros": pack(awq_order(zero.T)),
            "scales": scale.T.to(torch.float16),
        }
    return {
        "qweight": pack(values).T,
        "qzeros": pack(zero.T - 1),
        "scales": scale.T.to(torch.float16),
        "g_idx": torch.arange(ins, dtype=torch.int32) // (ins // groups),
    }


def unpack(packed: Tensor) -> Tensor:
    """[rows, n] int32 to [rows, 8 n] of 0…15, the lowest 4 bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & 0xF).reshape(packed.shape[0], -1)


def pack(values: Tensor) -> Tensor:
    """[rows, 8 n] of 0…15 to [rows, n] int32, the first value in the lowest 4 bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    parts = values.to(torch.int32).reshape(values.shape[0], -1, 8) << shifts
    return parts.sum(-1, dtype=torch.int32)


def awq_order(values: Tensor) -> Tensor:
    """The columns of every eight in the order in which AWQ's GEMM kernel unpacks them."""
    return values.reshape(values.shape[0], -1, 8)[:, :, list(AWQ_ORDER)].reshape(values.shape[0], -1)


def _index(folder: Path, files: list[Path]) -> None:
    """The index of a checkpoint in several files, made anew: tensors have other names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    from safetensors import safe_open

    where: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as source:
            where |= dict.fromkeys(source.keys(), file.name)
    total = sum(file.stat().st_size for file in files)
    index.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1), encoding="utf-8"
    )
