"""File formats: what is written is read back to the same weights, by code that shares nothing with the
writer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from contracts.errors import DataError
from distill_jobs.compress.literal import AWQ_ORDER, rewrite
from distill_jobs.quantizing.dequantize import activation_hooks, dequantized
from distill_jobs.quantizing.rounding import fake_quantize, round_static, round_tokens

OUT, IN, GROUP = 64, 96, 32
NAME = "model.layers.0.mlp.down_proj"


def packed(folder: Path, symmetric: bool) -> Tensor:
    """A compressed-tensors checkpoint of one random layer, packed by that library; what its weights mean."""
    folder.mkdir(parents=True)
    values = torch.randint(-8, 8, (OUT, IN), dtype=torch.int8)
    scales = (torch.rand(OUT, IN // GROUP) + 0.01).to(torch.bfloat16)
    zeros = torch.randint(-8, 8, (OUT, IN // GROUP), dtype=torch.int8) if not symmetric else None
    tensors = {
        f"{NAME}.weight_packed": pack_to_int32(values, 4),
        f"{NAME}.weight_scale": scales,
        f"{NAME}.weight_shape": torch.tensor([OUT, IN]),
        "model.norm.weight": torch.ones(OUT, dtype=torch.bfloat16),
    }
    shift: Tensor | int = 0
    if zeros is not None:
        tensors[f"{NAME}.weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
        shift = zeros.repeat_interleave(GROUP, 1)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    weights = {"num_bits": 4, "group_size": GROUP, "symmetric": symmetric}
    quantization = {
        "quant_method": "compressed-tensors", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return ((values - shift).float() * scales.repeat_interleave(GROUP, 1).float()).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("form", "symmetric"),
    [(f, s) for f in ("compressed-tensors", "awq") for s in (True, False)] + [("gptq", True)],
)
def test_every_format_holds_the_same_weights(tmp_path: Path, form: str, symmetric: bool) -> None:
    """Integers, scales and zero points survive the rewriting bit by bit; other tensors are untouched."""
    expected = packed(tmp_path / "a", symmetric)
    if form != "compressed-tensors":
        rewrite(tmp_path / "a", form)
        assert f"{NAME}.qweight" in load_file(tmp_path / "a" / "model.safetensors")
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == form
    found = dequantized(tmp_path / "a")
    assert set(found) == {f"{NAME}.weight", "model.norm.weight"}
    assert torch.equal(found[f"{NAME}.weight"], expected)


def test_awq_packs_outputs_in_its_kernels_order(tmp_path: Path) -> None:
    """The 4 bits at place p of the first word of input i are output AWQ_ORDER[p]: the published layout."""
    packed(tmp_path / "a", symmetric=False)
    before = load_file(tmp_path / "a" / "model.safetensors")[f"{NAME}.weight_packed"]
    rewrite(tmp_path / "a", "awq")
    word = int(load_file(tmp_path / "a" / "model.safetensors")[f"{NAME}.qweight"][3, 0])
    expected = [(int(before[out, 0]) >> 12) & 0xF for out in AWQ_ORDER]
    assert [(word >> 4 * place) & 0xF for place in range(8)] == expected


def test_int8_is_read_back_with_its_scales(tmp_path: Path) -> None:
    """int-quantized: one int8 a weight, one scale an output; the layer's inputs are rounded by its hook."""
    values = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    scale = (torch.rand(OUT, 1) + 0.01).to(torch.bfloat16)
    save_file({f"{NAME}.weight": values, f"{NAME}.weight_scale": scale}, tmp_path / "model.safetensors")
    inputs: dict[str, Any] = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "token"}
    group = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8}, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = dequantized(tmp_path)[f"{NAME}.weight"]
    assert torch.equal(found, (values.float() * scale.float()).to(torch.bfloat16))
    model = torch.nn.Module()
    model.add_module("model", torch.nn.Module())
    leaf = torch.nn.Linear(IN, OUT, bias=False)
    holder = model
    for part in NAME.split(".")[:-1]:
        child = torch.nn.Module()
        holder.add_module(part, child)
        holder = child
    holder.add_module("down_proj", leaf)
    activation_hooks(model, tmp_path)
    given = torch.randn(3, IN)
    assert torch.equal(leaf(given), torch.nn.functional.linear(round_tokens(given), leaf.weight))


def test_a_format_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Nothing is compared with weights that were guessed."""
    save_file({f"{NAME}.qweight": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    told = {"quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="desc_act"):
        dequantized(tmp_path)


def test_rounding_is_within_half_a_step_and_keeps_what_fits() -> None:
    """4 bits: 16 levels a group, the error half a step (and what a bf16 scale is off by); a row of whole
    steps is kept.
    """
    weight = torch.randn(8, 128)
    step = weight.reshape(8, 4, 32).abs().amax(-1, keepdim=True) / 7.5
    error = (fake_quantize(weight, 4, 32) - weight).reshape(8, 4, 32).abs()
    assert (error <= step * 0.55).all()
    assert len(fake_quantize(weight, 4, None)[0].unique()) <= 16
    steps = torch.arange(-7.0, 9.0).clamp(max=7).reshape(1, 16) * 0.5
    assert (round_tokens(steps) - steps).abs().max() < 0.02


def test_activations_round_by_token_or_by_one_scale() -> None:
    """A token's outlier costs only that token its precision; one calibrated scale clips what exceeds it."""
    values = torch.tensor([[0.1, 0.2, -0.3], [100.0, 0.2, 0.3]])
    rounded = round_tokens(values)
    assert torch.allclose(rounded[0], values[0], atol=0.002)
    assert rounded[1, 1] == 0
    shifted = round_tokens(values + 5, symmetric=False)
    assert torch.allclose(shifted[0], values[0] + 5, atol=0.03)
    assert round_static(values, torch.tensor(0.01)).max() == pytest.approx(1.27)
