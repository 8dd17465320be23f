"""Mixed precision: the knapsack against brute force, bytes against what is stored, sensitivities that
order.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from contracts.errors import ConfigError
from distill_jobs.engine import write_lines
from distill_jobs.quantizing.checkpoints import linear_layers, units
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.quantizing.mixed import OPTIONS, knapsack, make_plan
from tests.integration.pipeline_world import write_model


def brute(losses: list[dict[str, float]], costs: list[dict[str, int]], budget: int) -> float | None:
    """The least summed loss over every choice that fits."""
    best = None
    for choice in itertools.product(*costs):
        if sum(c[o] for c, o in zip(costs, choice, strict=True)) <= budget:
            loss = sum(one[o] for one, o in zip(losses, choice, strict=True))
            best = loss if best is None else min(best, loss)
    return best


def test_the_knapsack_is_exact() -> None:
    """Two hundred random problems of up to five units: the least loss within the budget, or none at all."""
    rng = random.Random(7)
    for _ in range(200):
        names = ["a", "b", "c"]
        size = rng.randint(1, 5)
        costs = [{n: rng.randint(1, 40) for n in names} for _ in range(size)]
        losses = [{n: rng.random() for n in names} for _ in range(size)]
        budget = rng.randint(1, 40 * size)
        expected = brute(losses, costs, budget)
        chosen = knapsack(losses, costs, budget)
        if expected is None:
            assert chosen is None
            continue
        assert chosen is not None
        assert sum(c[o] for c, o in zip(costs, chosen, strict=True)) <= budget
        assert sum(one[o] for one, o in zip(losses, chosen, strict=True)) == pytest.approx(expected)


def test_a_large_problem_stays_in_its_budget() -> None:
    """128 units at megabytes: rounding of costs never lets the sum exceed the budget, nor wastes over 0.5
    %.
    """
    rng = random.Random(1)
    costs = [{o: rng.randint(1, 9) * 10**6 + rng.randint(0, 999) for o in "abcd"} for _ in range(128)]
    losses = [{o: 1 / cost[o] for o in "abcd"} for cost in costs]
    budget = sum(sorted(c.values())[1] for c in costs)
    chosen = knapsack(losses, costs, budget)
    assert chosen is not None
    spent = sum(c[o] for c, o in zip(costs, chosen, strict=True))
    assert 0.995 * budget <= spent <= budget


def test_options_count_every_byte() -> None:
    """256 → 512 at 4 bits: half a byte a weight, a bf16 scale a group, 16 bytes of shape."""
    by_name = {option.name: option for option in OPTIONS}
    weights = 512 * 256
    assert by_name["int4-g128"].bytes(512, 256) == weights // 2 + 2 * 512 * 2 + 16
    assert by_name["int4-channel"].bytes(512, 256) == weights // 2 + 2 * 512 + 16
    assert by_name["int8"].bytes(512, 256) == weights + 2 * 512
    assert by_name["bf16"].bytes(512, 256) == 2 * weights
    assert not by_name["int4-g256"].fits(256)
    assert not by_name["int4-g128"].fits(192)


def test_layers_that_vllm_fuses_are_one_unit(tmp_path: Path) -> None:
    """q, k and v together, gate and up together; o and down alone."""
    write_model(tmp_path / "m", hidden=128, layers=1, seed=1)
    found = [{name.rpartition(".")[2] for name in unit} for unit in units(linear_layers(tmp_path / "m", ()))]
    assert sorted(map(sorted, found)) == [
        ["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]
    ]  # fmt: skip


def test_a_plan_is_measured_goes_on_and_fits(tmp_path: Path) -> None:
    """Fewer bits never measure better than bf16, int8 beats every 4 bits, the plan fits and is told; a
    second run measures nothing; a budget below the embeddings is an error with the least that would do.
    """
    write_model(tmp_path / "m", hidden=128, layers=2, seed=1)
    calibration = tmp_path / "c.jsonl"
    write_lines(calibration, [{"ids": list(range(3, 60))}, {"ids": list(range(60, 90))}])
    config = QuantizeConfig(scheme="MIXED", group_size=64)
    told: list[str] = []
    plan = make_plan(config, tmp_path / "m", calibration, tmp_path / "q", lambda d, t, u: told.append(u))
    report = json.loads((tmp_path / "q" / "plan.json").read_text())
    assert report["expected_bytes"] <= report["budget_bytes"]
    assert sorted(n for part in plan for n in part.layers) == sorted(linear_layers(tmp_path / "m", ()))
    for unit in report["units"]:
        kl = unit["kl"]
        assert kl["bf16"] == 0 < kl["int8"] < min(kl[o] for o in kl if o.startswith("int4"))
        assert kl["int4-g32"] < kl["int4-channel"]
    lines = (tmp_path / "q" / "sensitivity.jsonl").read_text()
    assert make_plan(config, tmp_path / "m", calibration, tmp_path / "q", lambda *_: None) == plan
    assert (tmp_path / "q" / "sensitivity.jsonl").read_text() == lines
    tiny = config.model_copy(update={"budget_bytes": 1000})
    with pytest.raises(ConfigError, match=r"1,000 bytes are less than the smallest"):
        make_plan(tiny, tmp_path / "m", calibration, tmp_path / "q", lambda *_: None)
