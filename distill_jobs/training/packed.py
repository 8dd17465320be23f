"""A checkpoint that was trained with fake quantization as the artifact that vLLM serves.

compressed-tensors, format pack-quantized: codes of 4 bits in int32, scales in bf16, so that what is served is
bit for bit what was trained with. Three bits use eight of the sixteen codes, since vLLM's CPU kernel knows
four bits only: such a file is no smaller than INT4's. Knows nothing of training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from contracts.errors import DataError
from distill_jobs.keys import output_file
from distill_jobs.stage import Result
from distill_jobs.training.fake_quant import check_columns, grid_for
from distill_jobs.training.loop import writing
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.rounding import encode

BITS = 4
"""Of a code in the file."""
PER_INT32 = 32 // BITS
FILE = "model.safetensors"


def run(config: FakeQuantConfig, student: Path, folder: Path) -> Result:
    """The quantize stage of a student that was trained on its grid: into `folder/artifact`, uncalibrated."""
    pack_checkpoint(student, folder / "artifact", config)
    notes = {"format": config.format}
    if config.bits < BITS:
        notes["container"] = f"int{config.bits} levels in a file of int{BITS}: no smaller than int{BITS}"
    return Result({"artifact": output_file(folder / "artifact")}, notes=notes)


def pack_checkpoint(student: Path, out: Path, config: FakeQuantConfig) -> None:
    """Write `student` (a bf16 checkpoint) with the blocks' linear weights packed; `out` appears whole.

    Raises: DataError where there is no checkpoint, ConfigError where columns are no whole groups.
    """
    state = _state(student)
    packed = [name for name, one in state.items() if ".layers." in name and one.ndim == 2]
    check_columns({name: state[name].shape[1] for name in packed}, config)
    for name in packed:
        state |= pack(name.removesuffix(".weight"), state.pop(name), config)
    with writing(out) as temporary:
        for file in sorted(student.iterdir()):
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copyfile(file, temporary / file.name)
        about = json.loads((student / "config.json").read_text(encoding="utf-8"))
        about["quantization_config"] = quantization_config(config)
        (temporary / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file(state, temporary / FILE, {"format": "pt"})
        (temporary / FILE).chmod(0o644)


def _state(student: Path) -> dict[str, Tensor]:
    files = sorted(student.glob("*.safetensors"))
    if not files or not (student / "config.json").is_file():
        raise DataError(f"{student} holds no config.json and *.safetensors: it is no checkpoint.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def pack(layer: str, weight: Tensor, config: FakeQuantConfig) -> dict[str, Tensor]:
    """The tensors that stand for one layer's (out, in) weight."""
    codes, scale, zero = encode(weight, grid_for(config))
    found = {
        f"{layer}.weight_packed": pack_codes(codes),
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_shape": torch.tensor(weight.shape),
    }
    if not config.symmetric:
        found[f"{layer}.weight_zero_point"] = pack_codes(zero.T).T.contiguous()
    return found


def pack_codes(codes: Tensor) -> Tensor:
    """(rows, columns) codes in -8..7 -> (rows, columns / 8) int32, the first in the lowest bits."""
    columns = -codes.shape[1] % PER_INT32
    unsigned = torch.nn.functional.pad(codes.to(torch.int64) + (1 << (BITS - 1)), (0, columns))
    shifts = torch.arange(PER_INT32) * BITS
    joined = (unsigned.unflatten(1, (-1, PER_INT32)) << shifts).sum(-1)
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).to(torch.int32)


def quantization_config(config: FakeQuantConfig) -> dict[str, Any]:
    """What tells vLLM how to read the weights."""
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": config.symmetric,
        "strategy": "group",
        "group_size": config.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
