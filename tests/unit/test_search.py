"""The student search's arithmetic: rungs, who survives, fronts, bytes, budgets and the cost model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import AutoConfig

from contracts.errors import ConfigError
from distill_jobs.search.config import BudgetConfig, HalvingConfig, Precision, SearchConfig, SpaceConfig
from distill_jobs.search.cost import anchors, fit
from distill_jobs.search.halving import Rung, front, ranks, rungs_of, survivors, trained_tokens
from distill_jobs.search.report import quantize_changes
from distill_jobs.search.space import (
    Candidate,
    Frame,
    Shape,
    block_params,
    candidates,
    file_bytes,
    kv_bytes,
    shape_config,
    tensors_of,
)
from distill_jobs.search.speed import artifact_of
from distill_jobs.training.models import from_shape, save_model
from tests.integration.pipeline_world import write_tokenizer

FRAME = Frame(320, 16, True, Shape(4, 64, 128, 4, 2), 512)
HUGE = BudgetConfig(bytes=1 << 40)


@pytest.mark.parametrize(
    ("n", "rungs", "plan"),
    [
        (27, 3, [(27, 100), (9, 300), (3, 900)]),
        (81, 5, [(81, 11), (27, 33), (9, 100), (3, 300), (1, 900)]),  # Hyperband's table 1, R = 900
        (5, 3, [(5, 100), (1, 300), (1, 900)]),
        (2, 1, [(2, 900)]),
        (1, 2, [(1, 300), (1, 900)]),
    ],
)
def test_rungs_are_successive_halvings(n: int, rungs: int, plan: list[tuple[int, int]]) -> None:
    """n / eta^i candidates with R / eta^(s - i) tokens, nobody and nothing below one."""
    found = rungs_of(HalvingConfig(rungs=rungs, eta=3, tokens=900), n)
    assert found == [Rung(*one) for one in plan]


def test_survivors_that_go_on_cost_less_than_those_that_start_over() -> None:
    """27 × 100, then 9 more times 200, then 3 more times 600; half of that where two share a training."""
    plan = rungs_of(HalvingConfig(rungs=3, eta=3, tokens=900), 27)
    assert trained_tokens(plan) == 2700 + 1800 + 1800
    assert trained_tokens(plan, 3) == 900 + 600 + 600


def test_the_front_and_its_ranks() -> None:
    """Of equals nobody dominates; the second rank is the front without the first."""
    points = {
        "a": (1.0, 3.0),
        "b": (2.0, 2.0),
        "c": (3.0, 2.0),
        "d": (3.0, 1.0),
        "e": (4.0, 4.0),
        "b2": (2.0, 2.0),
    }
    assert front(points) == ["a", "b", "d", "b2"]
    assert ranks(points) == {"a": 0, "b": 0, "d": 0, "b2": 0, "c": 1, "e": 2}
    assert front({}) == []


def test_dominated_candidates_leave_first_then_those_of_most_loss() -> None:
    """'c' loses less than 'a' but costs more than 'b', which loses as little."""
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    losses = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}
    assert survivors(costs, losses, 3) == ["d", "b", "a"]
    assert survivors(costs, losses, 1) == ["d"]
    assert survivors(costs, losses, 9) == ["d", "b", "a", "c"]


def test_a_budget_is_kept_in_all_that_it_names() -> None:
    """Bytes, memory, time a token and tokens a second; at the bound is within."""
    assert BudgetConfig(bytes=10).fits(10, 10**9)
    assert not BudgetConfig(bytes=10).fits(11, 11)
    assert not BudgetConfig(bytes=10, memory_bytes=20).fits(10, 21)
    assert BudgetConfig(tpot_ms=2.0).fast_enough(0.002, 32)
    assert not BudgetConfig(tpot_ms=2.0).fast_enough(0.0021, 32)
    assert BudgetConfig(tokens_per_s=16_000).fast_enough(0.002, 32)
    assert not BudgetConfig(tokens_per_s=16_001).fast_enough(0.002, 32)
    with pytest.raises(ValidationError, match="what may the student cost"):
        BudgetConfig()


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    """Half a pair of rows, and a latency budget without timing."""
    given: dict[str, Any] = {"folder": "f", "distill": "d.yaml", "budget": {"bytes": 1}}
    with pytest.raises(ValidationError, match="give both"):
        SearchConfig.model_validate(given | {"rows": "r"})
    with pytest.raises(ValidationError, match=r"speed\.measure"):
        SearchConfig.model_validate(given | {"budget": {"tpot_ms": 1}, "speed": {"measure": False}})
    with pytest.raises(ValidationError, match="layers: sizes are at least 1"):
        SpaceConfig(layers=(2, 0))


@pytest.mark.parametrize("shape", [Shape(1, 32, 64, 2, 1), Shape(12, 64, 96, 4, 2)])
@pytest.mark.parametrize("precision", ["bf16", "w4a16-g32"])
def test_bytes_by_formula_are_the_files_to_the_byte(
    tmp_path: Path, shape: Shape, precision: Precision
) -> None:
    """A checkpoint of the shape, written and packed by what the search and a distillation write with."""
    write_tokenizer(tmp_path)
    model = from_shape(shape_config(FRAME, shape, str(tmp_path)), 0)
    save_model(model, str(tmp_path), tmp_path / "student")
    assert Frame.of(AutoConfig.from_pretrained(tmp_path / "student")).largest == shape
    artifact = artifact_of(tmp_path / "student", precision, tmp_path / "packed", 1)
    assert (artifact / "model.safetensors").stat().st_size == file_bytes(FRAME, shape, precision)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "w8a8", "w4a16-g32"])
def test_the_header_is_counted_as_safetensors_writes_it(
    tmp_path: Path, precision: Precision, tied: bool
) -> None:
    """Offsets depend on the order of tensors, and the header's length on the offsets."""
    frame = Frame(320, 16, tied, FRAME.largest, 512)
    kinds = {"BF16": torch.bfloat16, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
    found = tensors_of(frame, frame.largest, precision)
    save_file(
        {n: torch.zeros(s, dtype=kinds[k]) for n, (k, s) in found.items()}, tmp_path / "m", {"format": "pt"}
    )
    assert (tmp_path / "m").stat().st_size == file_bytes(frame, frame.largest, precision)


def test_the_demos_models_have_the_bytes_that_the_formula_says() -> None:
    """The published files, and what a sixteenth of the teacher's leaves room for."""
    root = Path(__file__).parents[2] / "demo" / "models"
    sizes = {}
    for name in ("teacher", "student-base"):
        frame = Frame.of(AutoConfig.from_pretrained(root / name))
        sizes[name] = file_bytes(frame, frame.largest, "bf16")
        assert sizes[name] == (root / name / "model.safetensors").stat().st_size
    assert file_bytes(frame, frame.largest, "w4a16-g32") < sizes["teacher"] / 16
    assert file_bytes(frame, frame.largest, "w8a8") > sizes["teacher"] / 16


def test_keys_and_values_and_weights_are_counted() -> None:
    """2 (K and V) × 2 bytes × layers × heads × width × tokens; a block's seven matrices."""
    shape = Shape(3, 64, 128, 4, 2)
    assert kv_bytes(FRAME, shape, 100) == 2 * 2 * 3 * 2 * 16 * 100
    assert block_params(FRAME, shape) == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)


def test_candidates_are_what_can_be_cut_and_served_within_the_bytes() -> None:
    """Small first; what cannot be is left out, and when nothing is left the reasons are told."""
    space = SpaceConfig(layers=(2, 4, 8), hidden=(32, 48, 64), precision=("bf16", "w4a16-g32"))
    found = candidates(FRAME, space, HUGE, cut=True)
    assert {(one.shape.layers, one.shape.hidden) for one in found} == set(itertools.product((2, 4), (32, 64)))
    assert len(found) == 8
    assert [one.bytes for one in found] == sorted(one.bytes for one in found)
    random = candidates(FRAME, space, HUGE, cut=False)
    assert {one.shape.layers for one in random} == {2, 4, 8}
    tight = BudgetConfig(bytes=found[2].bytes)
    assert candidates(FRAME, space, tight, cut=True) == [
        Candidate(one.shape, one.precision, one.bytes, one.memory)
        for one in found
        if one.bytes <= found[2].bytes
    ]
    with pytest.raises(ConfigError, match=r"2 × more than the budget's bytes.*Widen"):
        candidates(FRAME, SpaceConfig(precision=("bf16", "w8a8")), BudgetConfig(bytes=9), cut=True)
    with pytest.raises(ConfigError, match="1 × heads is no multiple of kv_heads"):
        candidates(FRAME, SpaceConfig(heads=(3,), precision=("w8a8",)), HUGE, cut=True)


def test_memory_is_weights_and_cache() -> None:
    """A budget of memory refuses what its cache makes too large."""
    space = SpaceConfig(kv_heads=(1, 2), precision=("w8a8",))
    one, two = candidates(FRAME, space, BudgetConfig(memory_bytes=1 << 40, kv_tokens=1000), cut=True)
    assert two.memory - two.bytes == 2 * (one.memory - one.bytes) == kv_bytes(FRAME, two.shape, 1000)
    tight = BudgetConfig(memory_bytes=two.memory - 1, kv_tokens=1000)
    assert candidates(FRAME, space, tight, cut=True) == [one]


def test_the_cost_model_finds_the_costs_that_made_the_figures() -> None:
    """From the anchors' steps alone it predicts every other candidate's, in each precision."""
    space = SpaceConfig(
        layers=(1, 2, 4), hidden=(32, 64), intermediate=(32, 64, 128), precision=("bf16", "w8a8")
    )
    every = candidates(FRAME, space, HUGE, cut=True)

    def truth(one: Candidate) -> float:
        rate = {"bf16": 3e-9, "w8a8": 1e-9}[one.precision]
        return 2e-3 + 4e-4 * one.shape.layers + rate * block_params(FRAME, one.shape)

    timed = [(one, truth(one)) for one in anchors(every, FRAME)]
    assert 4 <= len(timed) <= 5 < len(every)
    model = fit(FRAME, timed)
    assert model.worst < 1e-6
    for one in every:
        assert math.isclose(model.step_s(one), truth(one), rel_tol=1e-5)
    four = Candidate(every[0].shape, "w4a16-g32", 1, 1)
    with pytest.raises(ConfigError, match="was not timed"):
        model.step_s(four)


def test_no_cost_is_negative_however_noisy_the_figures() -> None:
    """A deeper engine that was timed faster makes no layer that saves time."""
    every = candidates(FRAME, SpaceConfig(layers=(1, 2, 4), precision=("bf16",)), HUGE, cut=True)
    model = fit(FRAME, [(one, 1e-3 / one.shape.layers) for one in every])
    assert min(model.fixed, model.launch, *model.rates.values()) >= 0
    assert model.worst > 0.3


def test_a_precision_is_what_the_quantize_section_says() -> None:
    """Fields that a distillation takes; bf16 changes nothing."""
    assert quantize_changes("w4a16-g32") == {"scheme": "W4A16", "granularity": "group", "group_size": 32}
    assert quantize_changes("w8a8") == {"scheme": "W8A8", "granularity": "channel"}
    assert quantize_changes("bf16") == {}
