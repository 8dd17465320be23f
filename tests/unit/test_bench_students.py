"""What the compression benchmark's parts on students make of their measurements."""

from __future__ import annotations

import pytest

from benchmarks.compression.qad import recovered
from benchmarks.compression.shrink import fewer


def _row(tokens: int, loss: float) -> dict[str, float]:
    return {"tokens": tokens, "loss": loss}


def test_the_first_budget_that_is_enough_counts() -> None:
    """Times fewer tokens of the cheapest cut student that is no worse than the random one, else 0."""
    random = _row(1000, 0.5)
    assert fewer([random, _row(10, 3.0), _row(50, 0.6), _row(100, 0.5), _row(200, 0.4)]) == 10
    assert fewer([random, _row(10, 3.0), _row(1000, 0.6)]) == 0


def test_recovery_is_the_share_of_what_was_lost() -> None:
    """All of it at the whole student's loss, none at the quantized one's, negative where it is worse still;
    where nothing was lost there is nothing to recover."""
    assert recovered(1.0, 2.0, 1.0) == 1
    assert recovered(1.0, 2.0, 1.25) == pytest.approx(0.75)
    assert recovered(1.0, 2.0, 2.5) == -0.5
    assert recovered(1.0, 0.9, 0.8) == 0
