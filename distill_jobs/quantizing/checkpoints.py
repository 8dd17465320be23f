"""What a checkpoint folder holds, read from its headers and its config.json; nothing is loaded.

Knows nothing about torch or how a checkpoint was made.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from contracts.errors import DataError

DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Bytes of an element; everything else that is stored has one."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM runs as one product: all of them are quantized alike, or it refuses the checkpoint."""


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name → (dtype, shape), from the safetensors headers (nothing is loaded)."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
        found |= {n: (t["dtype"], t["shape"]) for n, t in header.items() if n != "__metadata__"}
    if not found:
        raise DataError(
            f"{folder} holds no *.safetensors file, so it is not a checkpoint that can be used here."
        )
    return found


def params_of(folder: Path) -> int:
    """Parameters of an unquantized checkpoint; tied matrices are stored, and counted, once."""
    return sum(prod(shape) for _, shape in tensors(folder).values())


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights' files: integers, scales, zero points, headers and what stayed in bf16."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def linear_layers(folder: Path, ignore: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Layer name → (outputs, inputs) of every linear layer that is to be quantized."""
    found = {}
    for name, (_, shape) in tensors(folder).items():
        linear = len(shape) == 2 and name.endswith(".weight") and "embed" not in name
        if linear and not any(part in name for part in ignore):
            found[name.removesuffix(".weight")] = (shape[0], shape[1])
    return found


def units(layers: dict[str, tuple[int, int]]) -> list[list[str]]:
    """Layers in groups that must be quantized alike, in the checkpoint's order."""
    found: dict[str, list[str]] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        together = next((f for f in _FUSED if leaf in f), (leaf,))
        found.setdefault(f"{parent}.{together[0]}", []).append(name)
    return list(found.values())


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a checkpoint's config.json; None where it is not quantized.

    Raises: DataError when there is no readable config.json.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(f"{file} cannot be read ({err}), so {folder.name} is no checkpoint.") from err
    found: dict[str, Any] | None = config.get("quantization_config")
    return found


def is_weight_only(quantization: dict[str, Any]) -> bool:
    """Whether activations stay as they are: then an engine's result is the file's, up to rounding."""
    groups = quantization.get("config_groups") or {}
    return not any(group.get("input_activations") for group in groups.values())
