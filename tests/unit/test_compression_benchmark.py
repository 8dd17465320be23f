"""The compression benchmark's tools: outliers that are there, and change no output by a bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compression.outliers import plant_outliers
from distill_jobs.quantizing.rounding import fake_quantize
from tests.integration.pipeline_world import write_model


def test_planted_outliers_change_no_output_by_a_bit(tmp_path: Path) -> None:
    """Logits are the same bits, in bf16; the activations that linear layers read have outliers 64 times as
    large, and rounding the weights to 4 bits now costs several times as much.
    """
    write_model(tmp_path / "plain", hidden=128, layers=2, seed=1)
    assert plant_outliers(tmp_path / "plain", tmp_path / "planted", channels=8, factor=64) == 4
    plain, planted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval()
        for name in ("plain", "planted")
    )
    ids = torch.arange(3, 67).reshape(1, -1)
    read: dict[str, float] = {}
    for name, model in (("plain", plain), ("planted", planted)):
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(
            lambda _, given, n=name: read.update({n: float(given[0].abs().max())})
        )
    with torch.inference_mode():
        before, after = plain(ids).logits, planted(ids).logits
    assert torch.equal(before, after)
    assert read["planted"] > 20 * read["plain"]
    assert _error(planted, before, ids) > 1.5 * _error(plain, before, ids)


def _error(model: torch.nn.Module, right: torch.Tensor, ids: torch.Tensor) -> float:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.weight.data = fake_quantize(module.weight.data, 4, 128)
    with torch.inference_mode():
        return float((model(ids).logits - right).float().square().mean())


def test_a_factor_that_is_no_power_of_two_is_refused(tmp_path: Path) -> None:
    """Any other factor rounds, and the function changes with it."""
    with pytest.raises(ValueError, match="power of two"):
        plant_outliers(tmp_path, tmp_path / "out", factor=40)
