"""Silent damage: each known kind, planted as numbers, is refused for what it is; honest rounding is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from contracts.errors import QuantizationError
from distill_jobs.quantizing.verify import Readings, Verdict, judge

RNG = np.random.default_rng(0)
BF16 = -RNG.gamma(2.0, 1.7, size=4000)
"""Log-probabilities of a model with a perplexity of about 30."""
NOISE = RNG.normal(0, 0.01, size=4000)
"""Between two orders of additions in bfloat16."""
INT4 = BF16 + RNG.normal(-0.005, 0.1, size=4000)
"""4 bits: a loss of half a percent."""


def verdict(served: np.ndarray, offline: np.ndarray, **changes: np.ndarray) -> Verdict:
    """The verdict on an artifact whose bf16 model is served rightly, unless told otherwise."""
    bf16 = {"bf16_served": BF16 + NOISE, "bf16_offline": BF16} | changes
    return judge(Readings(served=served, offline=offline, **bf16), weight_only=True)


def test_honest_rounding_passes() -> None:
    """Served as written, half a percent above bf16: no damage, and the figures are the perplexities."""
    found = verdict(INT4 + NOISE[::-1], INT4)
    assert found.damage is None
    found.check("artifact")
    assert found.offline_perplexity == pytest.approx(math.exp(-INT4.mean()))
    assert found.served_gap == pytest.approx(-NOISE.mean(), abs=1e-9)


def test_a_kernel_that_reads_the_file_otherwise_is_refused() -> None:
    """int8 KV measured: 154 served against 30.7 offline. bf16 is right, so the format or its kernel is
    named.
    """
    found = verdict(INT4 - 1.61, INT4)
    assert found.damage is not None
    assert "kernel or the loader" in found.damage
    assert "kv_cache_dtype" in found.damage
    with pytest.raises(QuantizationError, match=r"support-student is damaged, though nothing failed"):
        found.check("support-student")


def test_an_engine_that_serves_even_bf16_wrongly_is_named() -> None:
    """With int8 KV for all models no artifact is to blame."""
    found = verdict(INT4 - 1.6, INT4, bf16_served=BF16 - 1.61)
    assert found.damage is not None
    assert "even the bf16 model" in found.damage
    assert "int8_per_token_head" in found.damage


def test_a_file_that_its_writer_broke_is_refused() -> None:
    """AutoAWQ measured: served and file agree at 2615, bf16 is 30.7."""
    broken = BF16 - math.log(2615 / 30.7)
    found = verdict(broken + NOISE[::-1], broken)
    assert found.damage is not None
    assert "whoever wrote the file" in found.damage


def test_a_quantization_without_effect_is_refused() -> None:
    """Online int8 measured: the engine quantizes 0 layers, and answers as bf16 to the last digit."""
    found = verdict(BF16 + NOISE, INT4)
    assert found.damage is not None
    assert "no effect" in found.damage


def test_damage_that_leaves_the_perplexity_is_refused() -> None:
    """Tokens that are better and worse by a nat cancel in the mean, not in the tokens."""
    found = verdict(INT4 + np.where(np.arange(4000) % 2, 1.0, -1.0), INT4)
    assert found.damage is not None
    assert abs(found.served_gap) < 1e-9
    assert found.token_gap == pytest.approx(1.0)


def test_numbers_that_are_none_are_refused() -> None:
    """A scale that overflowed makes NaN, which no comparison would find larger than a tolerance."""
    torn = INT4.copy()
    torn[7] = math.nan
    assert "no number" in str(verdict(torn, INT4).damage)


def test_activations_are_allowed_twice_the_gap() -> None:
    """1.5 % between served and file: refused for weights alone, allowed where kernels round activations."""
    readings = Readings(served=INT4 - 0.015, offline=INT4, bf16_served=BF16, bf16_offline=BF16)
    assert judge(readings, weight_only=True).damage is not None
    assert judge(readings, weight_only=False).damage is None


def test_a_cache_that_was_asked_to_round_may_round() -> None:
    """fp8 KV measured: 31.05 instead of 30.65, bf16 too. Allowed where it was asked for, and only there."""
    lost = math.log(31.05 / 30.65)
    readings = Readings(served=INT4 - lost, offline=INT4, bf16_served=BF16 - lost, bf16_offline=BF16)
    assert judge(readings, weight_only=True, fp8_cache=True).damage is None
    assert judge(readings, weight_only=True).damage is not None


def test_rows_that_only_some_scored_are_left_out() -> None:
    """The same tokens on every side, in one order; with none in common nothing can be said."""
    one = {0: [-1.0, -2.0], 1: [-3.0], 2: [-9.0]}
    other = {1: [-3.5], 0: [-1.5, -2.5]}
    found = Readings.of(one, other, one, other)
    assert found.served.tolist() == [-1.0, -2.0, -3.0]
    assert found.offline.tolist() == [-1.5, -2.5, -3.5]
    with pytest.raises(QuantizationError, match="No row"):
        Readings.of({0: [-1.0]}, {1: [-1.0]}, one, other)
