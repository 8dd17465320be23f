"""Formats and algorithms on a model with planted outliers, each as vLLM serves it and as its file says.

Bars: AWQ and GPTQ lose at most half of what rounding loses; what is served is the file, within 0.1 % of
perplexity where only weights are quantized and 0.5 % where activations are. Knows nothing about how a
candidate is made or measured (distill_jobs/quantizing/compare.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compression.corpus import calibration_rows, scored_rows
from benchmarks.compression.outliers import planted
from benchmarks.results import Bar, at_most
from distill_jobs.config import EngineConfig
from distill_jobs.quantizing.candidates import Measured, parse_candidate
from distill_jobs.quantizing.compare import Comparison, compare
from distill_jobs.quantizing.config import QuantizeConfig

CANDIDATES = (
    "rtn-w4a16-g128", "awq-w4a16-g128", "gptq-w4a16-g128", "awq-w4a16-asym-g128-as-awq",
    "gptq-w4a16-g128-as-gptq", "rtn-w8a8-channel", "smoothquant-w8a8-channel", "smoothquant-w4a8-g128",
)  # fmt: skip


def run(threads: int, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows and bars."""
    model = planted(folder)
    base, found = compared(model, folder / "formats", CANDIDATES, threads, quick)
    by_name = {one.name: one for one in found}
    rows = [{"part": "formats", **one.model_dump(exclude={"artifact"})} for one in (base, *found)]
    return rows, [*_against_rounding(by_name), *_against_files(found), _refused(found)]


def compared(
    model: Path, out: Path, names: tuple[str, ...], threads: int, quick: bool, budget: int | None = None
) -> tuple[Measured, list[Measured]]:
    """bf16 and the named candidates on the corpus; what an interrupted run finished is kept."""
    config = QuantizeConfig(
        samples=128, sensitivity_samples=64, threads=threads, scheme="MIXED", budget_bytes=budget
    )
    job = Comparison(
        model=model,
        out=out,
        candidates=tuple(parse_candidate(name, config) for name in names),
        rows=scored_rows(model, 50 if quick else 400),
        calibration=calibration_rows(model, 32 if quick else 128),
        engine=EngineConfig(max_model_len=512, kv_cache_bytes=128 << 20, threads=threads),
    )
    return compare(job, lambda text: print(text, flush=True))


def _against_rounding(by_name: dict[str, Measured]) -> list[Bar]:
    rounding = by_name["rtn-w4a16-g128"].loss or 0.0
    return [
        at_most(
            f"loss of perplexity on planted outliers, {name} / rounding, served",
            (by_name[f"{name}-w4a16-g128"].loss or 0.0) / rounding, 0.5, " ×",
        )
        for name in ("awq", "gptq")
    ]  # fmt: skip


def _against_files(found: list[Measured]) -> list[Bar]:
    """The largest difference of each kind."""
    kinds = {"weight-only": (0.1, False), "int8 activations": (0.5, True)}
    return [
        at_most(
            f"served against the file's perplexity, {kind}, the largest",
            max(100 * abs(m.served_gap or 0.0) for m in found if ("a8" in m.name) == rounds), bound, " %",
        )
        for kind, (bound, rounds) in kinds.items()
    ]  # fmt: skip


def _refused(found: list[Measured]) -> Bar:
    return at_most("formats that were refused", sum(m.refused is not None for m in found), 0)
