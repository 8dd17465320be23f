"""The recipes benchmark: its table's figures and bars from results, its rationales and its order of cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.recipes.data import rationale
from benchmarks.recipes.table import bars, interval, lines, shown
from demo.world import case

TEACHER = {"right": [1] * 19 + [0], "params": 1000}


def result(recipe: str, seed: int, right: int, kl: float = 0.1, second: float = 10.0) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "seed": seed,
        "right": [1] * right + [0] * (20 - right),
        "kl": kl,
        "seconds": 20.0,
        "second_half_seconds": second,
        "generation_share": 0.0,
        "train_rows": 100,
        "steps": 10,
        "params": 100,
    }


def test_a_line_is_the_mean_of_its_seeds() -> None:
    """Accuracy over seeds and requests, its interval around it, relative to the teacher; the best first."""
    made = lines([result("a", 0, 10), result("a", 1, 14), result("b", 0, 19), result("b", 1, 19)], TEACHER)
    assert [one["recipe"] for one in made] == ["b", "a"]
    assert made[1]["accuracy"] == pytest.approx(0.6)
    assert made[1]["accuracy_by_seed"] == [0.5, 0.7]
    low, high = made[1]["accuracy_interval"]
    assert low < 0.6 < high
    assert made[0]["of_teacher"] == pytest.approx(1.0)
    assert "0.600" in shown(made, TEACHER)


def test_the_interval_covers_both_seeds_and_requests() -> None:
    """Requests alone: the binomial's width. Seeds that disagree make it wider."""
    rng = np.random.default_rng(0)
    same = np.tile((rng.random(400) < 0.8).astype(int), (2, 1))
    low, high = interval(same)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 400), rel=0.2)
    apart = np.stack([np.ones(400, int), np.tile([0, 1], 200)])
    assert interval(apart)[1] - interval(apart)[0] > 0.4


def test_bars_follow_the_issue() -> None:
    """Each bar holds or misses by its own figure."""

    def longer(label: int, why: int, own: int, own_seconds: float) -> dict[str, dict[str, Any]]:
        found = [
            result("sequence_level", 0, label),
            result("rationale", 0, why),
            result("on_policy", 0, own, second=own_seconds),
            result("replay", 0, 16, second=10),
        ]
        return {line["recipe"]: line for line in lines(found, TEACHER)}

    (best,), (worse,) = (lines([result("jsd", 0, right)], TEACHER) for right in (19, 18))
    assert [bar.ok for bar in bars(best, longer(15, 15, 16, 30))] == [True] * 5
    assert [bar.ok for bar in bars(worse, longer(15, 14, 18, 15))] == [False, True, False, False, False]


def test_a_rationale_says_which_words_ask_for_what() -> None:
    """Every call's words stand in the request, and every value that the answer holds in the rationale."""
    for number in range(40):
        one = case("live", number)
        why = rationale(one)
        assert [said.tool for said in one.spoken] == [call["tool"] for call in one.answer]
        for said, call in zip(one.spoken, one.answer, strict=True):
            assert said.words.lower() in one.text.lower()
            assert said.words in why
            assert all(str(value) in why for value in call.values())
