"""From results of runs to the table's lines with their intervals, and to the bars.

Knows the form of a result (`job.run`), nothing of training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.results import Bar, at_least

DRAWS = 2000
LABEL_ONLY, EXPLAINED = "sequence_level", "rationale"
ON_POLICY, REPLAY = "on_policy", "replay"
"""The recipes that are compared with each other."""


def interval(right: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of an accuracy from (seeds, requests) of 0 and 1; both are drawn again."""
    rng = np.random.default_rng(0)
    seeds, requests = right.shape
    means = [
        right[rng.integers(0, seeds, seeds)][:, rng.integers(0, requests, requests)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def lines(results: list[dict[str, Any]], teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a recipe, the most accurate first (of equals, the one nearest to the teacher)."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        by_recipe.setdefault(one["recipe"], []).append(one)
    made = [_line(name, of, teacher) for name, of in by_recipe.items()]
    return sorted(made, key=lambda line: (-line["accuracy"], line["kl"]))


def _line(name: str, of: list[dict[str, Any]], teacher: dict[str, Any]) -> dict[str, Any]:
    right = np.array([one["right"] for one in of])
    low, high = interval(right)
    kls = [one["kl"] for one in of]
    return {
        "recipe": name,
        "accuracy": float(right.mean()),
        "accuracy_interval": [low, high],
        "accuracy_by_seed": [float(one) for one in right.mean(1)],
        "of_teacher": float(right.mean() / np.mean(teacher["right"])),
        "kl": float(np.mean(kls)),
        "kl_range": [min(kls), max(kls)],
        "seconds": float(np.mean([one["seconds"] for one in of])),
        "second_half_seconds": float(np.mean([one["second_half_seconds"] for one in of])),
        "generation_share": float(np.mean([one["generation_share"] for one in of])),
        "rows": of[0]["train_rows"],
        "steps": of[0]["steps"],
        "seeds": len(of),
        "fewer_params": teacher["params"] / of[0]["params"],
    }


def shown(made: list[dict[str, Any]], teacher: dict[str, Any]) -> str:
    """The table as text."""
    head = (
        f"{'recipe':<32} {'accuracy':>8} {'95 % interval':>16} {'of teacher':>10} {'KL':>8} {'train s':>8}"
        f" {'gen':>5} {'seeds':>5}"
    )
    rows = [
        f"{one['recipe']:<32} {one['accuracy']:>8.3f}"
        f" {'{:.3f} to {:.3f}'.format(*one['accuracy_interval']):>16} {one['of_teacher']:>10.3f}"
        f" {one['kl']:>8.4f} {one['seconds']:>8.1f} {one['generation_share']:>5.0%}"
        f" {one['seeds']:>5}"
        for one in made
    ]
    return "\n".join([head, *rows, f"{'(teacher)':<32} {np.mean(teacher['right']):>8.3f}"])


def bars(best: dict[str, Any], longer: dict[str, dict[str, Any]]) -> list[Bar]:
    """What the issue promises of the table.

    Args:
        best: the line of the best recipe, trained longest.
        longer: the lines of those that are compared with each other, by their recipe's name.
    """
    label, why = longer[LABEL_ONLY], longer[EXPLAINED]
    own, replay = longer[ON_POLICY], longer[REPLAY]
    worse = own["accuracy"] - replay["accuracy"]
    speed = own["second_half_seconds"] / replay["second_half_seconds"]
    return [
        at_least("best recipe, trained longer: accuracy of the teacher's", best["of_teacher"], 0.99),
        at_least("teacher / best student, parameters", best["fewer_params"], 8, " ×"),
        at_least(
            "rationale student with 80 % of the rows − label-only student, accuracy",
            why["accuracy"] - label["accuracy"],
            0,
        ),
        at_least("replay − fully on-policy, accuracy (quality is equal above −0.02)", -worse, -0.02),
        at_least("fully on-policy / replay, wall time after the cold start", speed, 2, " ×"),
    ]
