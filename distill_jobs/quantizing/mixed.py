"""Mixed precision under a byte budget: which layer gets 4 bits, 8 bits or bf16.

Every unit (layers that vLLM fuses) is measured at every precision alone: the KL divergence from the bf16
model on calibration samples, as HAWQ-V2 (Dong et al. 2020) does by curvature. The choice is then a
multiple-choice knapsack: one option a unit, least summed divergence, bytes with scales and all within the
budget. Assumes that divergences add, which the measured artifact confirms or not. Knows nothing about torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from contracts.config import Record, write_atomic
from contracts.errors import ConfigError, QuantizationError
from distill_jobs.lines import stream_lines
from distill_jobs.quantizing.checkpoints import DTYPE_BYTES, linear_layers, tensors, units
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.worker_process import OnProgress, run_worker

_BUCKETS = 50_000
"""Steps of the budget: costs are rounded up to one, so the sum is never above the budget."""
_ENTRY_BYTES = 110
"""Of a tensor in a file's header, beside its name: a little more than it takes."""
_ENTRIES = 3
"""Tensors of a quantized layer: integers, scales, shape."""


class Part(Record):
    """Layers that are quantized alike."""

    scheme: Literal["W4A16", "W8A8", "BF16"]
    shares: Literal["group", "channel"]
    group_size: int
    layers: list[str]


@dataclass(frozen=True)
class Option:
    """A precision that vLLM's kernels serve."""

    name: str
    scheme: Literal["W4A16", "W8A8", "BF16"]
    shares: Literal["group", "channel"] = "channel"
    group_size: int = 0

    def fits(self, ins: int) -> bool:
        """Whether a layer with so many inputs is made of whole groups, more than one."""
        return self.shares == "channel" or (ins % self.group_size == 0 and ins > self.group_size)

    def bytes(self, outs: int, ins: int) -> int:
        """What a layer's tensors take in a compressed-tensors file: integers, bf16 scales, the shape."""
        if self.scheme == "BF16":
            return 2 * outs * ins
        if self.scheme == "W8A8":
            return outs * ins + 2 * outs
        groups = 1 if self.shares == "channel" else ins // self.group_size
        return outs * -(-ins // 8) * 4 + 2 * outs * groups + 16


INT4 = {size: Option(f"int4-g{size}", "W4A16", "group", size) for size in (32, 64, 128, 256)}
OPTIONS = (*INT4.values(), Option("int4-channel", "W4A16"), Option("int8", "W8A8"), Option("bf16", "BF16"))


def make_plan(
    config: QuantizeConfig, student: Path, calibration: Path, folder: Path, tell: OnProgress
) -> list[Part]:
    """Measure (going on where an earlier run stopped) and choose; `folder/plan.json` tells why.

    Raises: ConfigError when the budget is smaller than the smallest artifact.
    """
    layers = linear_layers(student, config.ignore)
    groups = units(layers)
    measured = _measure(config, student, groups, layers, calibration, folder, tell)
    fixed = _fixed_bytes(student, set(layers))
    budget = config.budget_bytes or fixed + _uniform_bytes(layers, config.group_size)
    costs = [_costs(unit, layers) for unit in groups]
    chosen = knapsack(measured, costs, budget - fixed)
    if chosen is None:
        least = fixed + sum(min(c.values()) for c in costs)
        raise ConfigError(
            f"quantize.budget_bytes: {budget:,} bytes are less than the smallest artifact of {student.name},"
            f" about {least:,} ({fixed:,} of them embeddings and norms, which stay in bf16)."
        )
    plan = _parts(groups, chosen)
    told = {
        "budget_bytes": budget,
        "expected_bytes": fixed + sum(c[o] for c, o in zip(costs, chosen, strict=True)),
        "units": [
            {"layers": unit, "chosen": option, "kl": kl, "bytes": cost}
            for unit, option, kl, cost in zip(groups, chosen, measured, costs, strict=True)
        ],
    }
    write_atomic(folder / "plan.json", json.dumps(told, indent=1) + "\n")
    return plan


def _measure(
    config: QuantizeConfig,
    student: Path,
    groups: list[list[str]],
    layers: dict[str, tuple[int, int]],
    calibration: Path,
    folder: Path,
    tell: OnProgress,
) -> list[dict[str, float]]:
    """KL by option of every unit, in a process of its own."""
    out, result = folder / "sensitivity.jsonl", folder / "sensitivity.json"
    names = [[o.name for o in _options(unit, layers) if o.scheme != "BF16"] for unit in groups]
    job = {
        "model": str(student.resolve()), "rows": str(calibration.resolve()), "out": str(out.resolve()),
        "samples": config.sensitivity_samples, "result": str(result.resolve()),
        "gptq": config.method == "gptq",
        "units": [{"layers": u, "options": n} for u, n in zip(groups, names, strict=True)],
    }  # fmt: skip
    write_atomic(folder / "sensitivity-job.json", json.dumps(job) + "\n")
    root = str(Path(__file__).resolve().parents[2])
    env = {
        "OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
    }  # fmt: skip
    argv = [sys.executable, "-m", "distill_jobs.quantizing.sensitivity", str(folder / "sensitivity-job.json")]
    if not out.is_file() or sum(1 for _ in stream_lines(out)) < sum(map(len, names)):
        run_worker(argv, result, folder / "sensitivity.log", env, config.timeout_s, QuantizationError, tell)
    found: list[dict[str, float]] = [{"bf16": 0.0} for _ in groups]
    for row in stream_lines(out):
        found[row["unit"]][row["option"]] = row["kl"]
    return found


def _options(unit: Sequence[str], layers: Mapping[str, tuple[int, int]]) -> list[Option]:
    return [o for o in OPTIONS if all(o.fits(layers[name][1]) for name in unit)]


def _costs(unit: Sequence[str], layers: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    return {o.name: sum(o.bytes(*layers[name]) for name in unit) for o in _options(unit, layers)}


def _uniform_bytes(layers: Mapping[str, tuple[int, int]], group_size: int) -> int:
    return sum(INT4[group_size].bytes(*shape) for shape in layers.values())


def _fixed_bytes(student: Path, layers: set[str]) -> int:
    """Embeddings, norms and everything else that no option touches, and the headers of all."""
    held = 0
    for name, (kind, shape) in tensors(student).items():
        quantized = name.removesuffix(".weight") in layers
        held += (_ENTRIES if quantized else 1) * (len(name) + _ENTRY_BYTES)
        held += 0 if quantized else prod(shape) * DTYPE_BYTES.get(kind, 1)
    return held


def knapsack(
    losses: Sequence[Mapping[str, float]], costs: Sequence[Mapping[str, int]], budget: int
) -> list[str] | None:
    """The option of each unit with the least summed loss whose costs fit the budget; None when none fits.

    Exact up to the rounding of costs to 1/50000 of what is left above the cheapest choice; what the rounding
    left over is then spent on the best single changes that fit. (Kellerer et al., Knapsack Problems, ch. 11.)
    """
    cheapest = [min(cost.values()) for cost in costs]
    room = budget - sum(cheapest)
    if room < 0:
        return None
    step = max(1.0, room / _BUCKETS)
    size = int(room / step) + 1
    best, picks = np.zeros(size), []
    for loss, cost, least in zip(losses, costs, cheapest, strict=True):
        names = [n for n in cost if n in loss]
        table = np.full((len(names), size), np.inf)
        for row, name in enumerate(names):
            extra = int(np.ceil((cost[name] - least) / step))
            if extra < size:
                table[row, extra:] = best[: size - extra] + loss[name]
        pick = table.argmin(0)
        best = table[pick, np.arange(size)]
        picks.append(([*names], pick, [int(np.ceil((cost[n] - least) / step)) for n in names]))
    if not np.isfinite(best[-1]):
        return None
    chosen, at = [], size - 1
    for names, pick, extra in reversed(picks):
        row = int(pick[at])
        chosen.append(names[row])
        at -= extra[row]
    return _spend(losses, costs, chosen[::-1], budget)


def _spend(
    losses: Sequence[Mapping[str, float]], costs: Sequence[Mapping[str, int]], chosen: list[str], budget: int
) -> list[str]:
    """The best single changes, one after the other, while one fits and lowers the loss."""
    while True:
        spare = budget - sum(c[o] for c, o in zip(costs, chosen, strict=True))
        better = [
            (losses[i][chosen[i]] - losses[i][o], i, o)
            for i, cost in enumerate(costs)
            for o in cost
            if o in losses[i] and losses[i][o] < losses[i][chosen[i]] and cost[o] - cost[chosen[i]] <= spare
        ]
        if not better:
            return chosen
        _, unit, option = max(better)
        chosen[unit] = option


def _parts(groups: list[list[str]], chosen: list[str]) -> list[Part]:
    by_name = {option.name: option for option in OPTIONS}
    found: dict[str, list[str]] = {}
    for unit, name in zip(groups, chosen, strict=True):
        found.setdefault(name, []).extend(unit)
    return [
        Part(
            scheme=by_name[n].scheme, shares=by_name[n].shares, group_size=by_name[n].group_size, layers=names
        )
        for n, names in found.items()
    ]
