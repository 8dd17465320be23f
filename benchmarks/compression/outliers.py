"""Outliers planted into a model without changing what it computes.

Small models trained for minutes have no outlier channels, so on them every quantizer is as good as rounding.
Here a few channels of each norm's weight are multiplied by a power of two and the columns of the linear
layers that read them divided by it: every product is the same bit by bit (powers of two move only
exponents), yet the activations have outliers and the columns that meet them are too small for their group's
scale, which is what AWQ (Lin et al. 2023) and SmoothQuant (Xiao et al. 2022) were made for. Knows nothing
about quantizers.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norm → the linear layers that read it, as in Llama and Qwen."""
MODEL = Path(__file__).resolve().parents[2] / "demo" / "models" / "student-base"
CHANNELS, FACTOR = 8, 64
"""Outliers: 3 % of the channels, 64 times as large; of LLMs some 0.1 to 3 % are up to 100 times (Dettmers et
al. 2022)."""


def planted(folder: Path) -> Path:
    """The demo's student base with outliers, made once in `folder`."""
    model = folder / "outliers"
    if not (model / "config.json").is_file():
        plant_outliers(MODEL, model, CHANNELS, FACTOR)
    return model


def plant_outliers(source: Path, out: Path, channels: int = 4, factor: int = 32, seed: int = 0) -> int:
    """Copy a checkpoint of one file to `out` with `channels` outliers in each norm that linear layers read.

    The final norm is left alone: its reader is the (tied) embedding. Returns how many norms were changed.
    Raises: ValueError when `factor` is no power of two.
    """
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"factor: {factor} is no power of two, so the function would change")
    shutil.copytree(source, out, dirs_exist_ok=True)
    file = out / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    norms = sorted(n for n in tensors if n.rpartition(".")[0].rpartition(".")[2] in READERS)
    for name in norms:
        _plant(tensors, name, torch.randperm(len(tensors[name]), generator=generator)[:channels], factor)
    save_file(tensors, file, metadata={"format": "pt"})
    return len(norms)


def _plant(tensors: dict[str, Tensor], norm: str, channels: Tensor, factor: int) -> None:
    layer, _, kind = norm.removesuffix(".weight").rpartition(".")
    tensors[norm][channels] *= factor
    for reader in READERS[kind]:
        tensors[f"{layer}.{reader}.weight"][:, channels] /= factor
