"""Is what the engine serves what the file holds, and is what the file holds still the model?

Compares log-probabilities of the same tokens: bf16 and quantized, each through the engine and offline. Pure
arithmetic and a verdict with its likely cause; the known silent damages are told apart by which pair
disagrees (docs/guides/quantization.md). Knows nothing about how anything was scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from contracts.errors import QuantizationError
from distill_jobs.quantizing.checkpoints import is_weight_only, quantization_of
from distill_jobs.quantizing.offline import read_scores, score_offline
from registry.adapter import folders_of

Scores = Mapping[int, Sequence[float]]

TOLERANCE = {True: 0.01, False: 0.02}
"""Largest relative difference of perplexity, served against offline, by whether only weights are quantized.
Measured: 0.02 % and 0.25 % (research); kernels that round activations do it each in their way."""
FP8_CACHE_TOLERANCE = 0.05
"""Instead, where the KV cache was asked to be fp8: its rounding is wanted, bf16's included (1.3 %
measured).
"""
TOKEN_TOLERANCE = 0.25
"""Nats, mean over tokens: a damage that leaves the perplexity of a text as it was does not leave its
tokens.
"""
MAX_LOSS = 0.25
"""Largest relative loss of perplexity, file against bf16, that is called quantization and not damage. A gate
decides what is good enough; a wrong file lost a factor of 85."""
_SAME = 1e-4
"""Nats: what two runs of one engine on one model differ by, at most."""


@dataclass(frozen=True)
class Readings:
    """Log-probabilities of the same tokens, in one order."""

    served: np.ndarray
    """The artifact through the engine."""
    offline: np.ndarray
    """The artifact, dequantized from its files."""
    bf16_served: np.ndarray
    bf16_offline: np.ndarray

    @classmethod
    def of(cls, served: Scores, offline: Scores, bf16_served: Scores, bf16_offline: Scores) -> Readings:
        """Over the rows that all four have. Raises: QuantizationError when there are none."""
        every = (served, offline, bf16_served, bf16_offline)
        shared = sorted(set.intersection(*(set(one) for one in every)))
        if not shared:
            raise QuantizationError("No row was scored by both engine and file, so nothing can be compared.")
        return cls(*(np.concatenate([np.asarray(one[i], np.float64) for i in shared]) for one in every))


@dataclass(frozen=True)
class Verdict:
    """What was found. `damage` is None when served, file and model agree."""

    perplexity: float
    """Of the artifact, served."""
    offline_perplexity: float
    bf16_perplexity: float
    served_gap: float
    """ln(served / offline perplexity): 0.001 is 0.1 %."""
    token_gap: float
    """Mean absolute difference of a token's log-probability, served against offline, nats."""
    damage: str | None

    def check(self, artifact: str) -> None:
        """Raises: QuantizationError saying what differs and the likely cause."""
        if self.damage is not None:
            raise QuantizationError(f"{artifact} is damaged, though nothing failed: {self.damage}")


def judge(
    readings: Readings, weight_only: bool, takes_effect: bool = True, fp8_cache: bool = False
) -> Verdict:
    """The verdict on one artifact; `takes_effect`: it holds quantized weights, so it cannot answer as
    bf16.
    """
    r = readings
    ppl = {n: _perplexity(v) for n, v in vars(r).items()}
    gap = _gap(r.served, r.offline)
    token = _token_gap(r.served, r.offline)
    return Verdict(
        perplexity=ppl["served"],
        offline_perplexity=ppl["offline"],
        bf16_perplexity=ppl["bf16_offline"],
        served_gap=gap,
        token_gap=token,
        damage=_damage(r, ppl, FP8_CACHE_TOLERANCE if fp8_cache else TOLERANCE[weight_only], takes_effect),
    )


def _damage(r: Readings, ppl: dict[str, float], tolerance: float, takes_effect: bool) -> str | None:
    """The first pair that disagrees, from the engine's floor up."""
    if not all(math.isfinite(v) for v in ppl.values()):
        wrong = ", ".join(n for n, v in ppl.items() if not math.isfinite(v))
        return f"perplexity is no number ({wrong}). A scale overflowed, or the file is torn; quantize again."
    if _differ(r.bf16_served, r.bf16_offline, tolerance):
        return (
            f"the engine serves even the bf16 model wrongly: perplexity {ppl['bf16_served']:.4g}, offline"
            f" {ppl['bf16_offline']:.4g}. The engine's settings, not the artifact; the known cause is"
            " kv_cache_dtype: int8_per_token_head on CPU. Set it to auto."
        )
    if (
        takes_effect
        and _token_gap(r.served, r.bf16_served, np.max) < _SAME
        and (_token_gap(r.offline, r.bf16_offline, np.max) > _SAME)
    ):
        return (
            f"the engine answers exactly as the bf16 model (perplexity {ppl['served']:.4g}), the file does"
            f" not ({ppl['offline']:.4g}): the quantization took no effect. The known cause is the engine's"
            " online quantization of int8, which quantizes 0 layers on CPU; serve a quantized file instead."
        )
    if _differ(r.served, r.offline, tolerance):
        return (
            f"served perplexity is {ppl['served']:.4g}, the file's {ppl['offline']:.4g}"
            f" ({math.expm1(_gap(r.served, r.offline)):+.2%}, {tolerance:.0%} allowed; tokens differ by"
            f" {_token_gap(r.served, r.offline):.3g} nats), while bf16 is served rightly. The kernel or the"
            " loader reads this format otherwise than it was written: take another scheme or format, and keep"
            " kv_cache_dtype: auto."
        )
    loss = _gap(r.offline, r.bf16_offline)
    if loss > math.log1p(MAX_LOSS):
        return (
            f"its file has perplexity {ppl['offline']:.4g}, the bf16 model {ppl['bf16_offline']:.4g}, and"
            " it is served as it is: whoever wrote the file broke it (AutoAWQ 0.2.9 did so on models with"
            " outliers), or the scheme is too coarse for this model. Quantize with another algorithm or"
            " smaller groups."
        )
    return None


def _perplexity(logprobs: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(-logprobs.mean()))


def _gap(one: np.ndarray, other: np.ndarray) -> float:
    """ln of the quotient of perplexities."""
    return float(other.mean() - one.mean())


def _token_gap(one: np.ndarray, other: np.ndarray, over: object = np.mean) -> float:
    return float(over(np.abs(one - other)))  # type: ignore[operator]


def _differ(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    return abs(_gap(one, other)) > math.log1p(tolerance) or _token_gap(one, other) > TOKEN_TOLERANCE


def verify_served(
    student: Path,
    artifact: Path,
    student_scores: Path,
    scores: Path,
    folder: Path,
    kv_cache_dtype: str = "auto",
) -> Verdict:
    """Score the artifact's and the student's rows offline and judge. Files of the engine's: `rows.jsonl` and
    `scores.parquet` in each model's folder; the offline scores are kept in `folder`.
    """
    quantization = quantization_of(folders_of(artifact)[0])
    score_offline(student, artifact, scores / "rows.jsonl", folder)
    readings = Readings.of(
        _engine_scores(scores),
        read_scores(folder, "artifact"),
        _engine_scores(student_scores),
        read_scores(folder, "reference"),
    )
    return judge(
        readings,
        weight_only=is_weight_only(quantization or {}),
        takes_effect=quantization is not None,
        fp8_cache=kv_cache_dtype == "fp8",
    )


def _engine_scores(folder: Path) -> Scores:
    table = pq.read_table(folder / "scores.parquet", columns=["id", "actual"])
    return {row["id"]: row["actual"] for row in table.to_pylist()}
