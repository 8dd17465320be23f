"""What llm-compressor is told: bits, strategy, symmetry and file format of schemes and plans."""

from __future__ import annotations

from typing import Any

import pytest

from distill_jobs.compress.recipes import config_groups, needs_data


def job(scheme: str, shares: str, **changes: Any) -> dict[str, Any]:
    """A worker's job, as far as recipes read it."""
    return {"scheme": scheme, "shares": shares, "group_size": 64, "algorithm": "rtn", "plan": None} | changes


@pytest.mark.parametrize(
    ("scheme", "shares", "bits", "symmetric", "inputs", "form"),
    [
        ("W4A16", "group", 4, True, None, "pack-quantized"),
        ("W4A16_ASYM", "channel", 4, False, None, "pack-quantized"),
        ("W8A16", "group", 8, True, None, "pack-quantized"),
        ("W4A8", "group", 4, True, ("token", True, True), "int-quantized"),
        ("W8A8", "channel", 8, True, ("token", True, True), "int-quantized"),
        ("W8A8_ASYM", "channel", 8, True, ("token", True, False), "int-quantized"),
        ("W8A8_STATIC", "tensor", 8, True, ("tensor", False, True), "int-quantized"),
        ("FP8_DYNAMIC", "channel", 8, True, ("token", True, True), "float-quantized"),
    ],
)
def test_a_scheme_is_told_in_full(
    scheme: str, shares: str, bits: int, symmetric: bool, inputs: tuple[str, bool, bool] | None, form: str
) -> None:
    """Weights' bits, what shares a scale, zero points; how inputs are rounded; how the file holds them, which
    decides the kernel that vLLM takes.
    """
    group = config_groups(job(scheme, shares))["group_0"]
    assert group.targets == ["Linear"]
    weights = group.weights
    assert (weights.num_bits, weights.strategy, weights.symmetric) == (bits, shares, symmetric)
    assert weights.group_size == (64 if shares == "group" else None)
    assert group.format == form
    found = group.input_activations
    assert (found and (found.strategy, found.dynamic, found.symmetric)) == inputs


def test_a_plan_is_a_group_of_layers_for_each_precision() -> None:
    """What stays in bf16 is in no group, so nothing touches it."""
    plan = [
        {"scheme": "W4A16", "shares": "group", "group_size": 32, "layers": ["a.o_proj"]},
        {"scheme": "BF16", "shares": "channel", "group_size": 0, "layers": ["a.down_proj"]},
        {"scheme": "W8A8", "shares": "channel", "group_size": 0, "layers": ["b.up_proj", "b.gate_proj"]},
    ]
    groups = config_groups(job("MIXED", "group", plan=plan))
    assert [g.targets for g in groups.values()] == [["a.o_proj"], ["b.up_proj", "b.gate_proj"]]
    assert [g.weights.num_bits for g in groups.values()] == [4, 8]
    assert [g.format for g in groups.values()] == ["pack-quantized", "int-quantized"]


def test_rounding_needs_no_data_unless_activations_have_one_scale() -> None:
    """A static scale is calibrated, whatever the weights' algorithm."""
    assert not needs_data(job("W4A16", "group"))
    assert needs_data(job("W8A8_STATIC", "channel"))
    assert needs_data(job("W4A16", "group", algorithm="awq"))
