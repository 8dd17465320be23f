"""Successive halving and the front, as arithmetic.

Jamieson and Talwalkar 2016, algorithm 1, with Hyperband's budgets (Li et al. 2018, algorithm 1, lines 5-10):
rung i of s trains n / eta^i candidates for R / eta^(s - i) tokens each. Candidates are ordered as
multi-objective halving does (Schmucker et al. 2021): by front, then by loss. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill_jobs.search.config import HalvingConfig

Point = tuple[float, ...]
"""Costs of a candidate; smaller is better in each."""


@dataclass(frozen=True)
class Rung:
    """How many candidates are compared, and the tokens that each was trained on by then."""

    candidates: int
    tokens: int


def rungs_of(config: HalvingConfig, candidates: int) -> list[Rung]:
    """The plan for so many candidates; at least one is left, and every rung has at least one token."""
    last = config.rungs - 1
    return [
        Rung(max(1, candidates // config.eta**i), max(1, config.tokens // config.eta ** (last - i)))
        for i in range(config.rungs)
    ]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is at least as good in everything and better in something."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def front(points: Mapping[str, Point]) -> list[str]:
    """Names of those that nobody dominates, in their order."""
    return [name for name, mine in points.items() if not any(dominates(o, mine) for o in points.values())]


def ranks(points: Mapping[str, Point]) -> dict[str, int]:
    """0 for the front, 1 for the front of the others, and so on (nondominated sorting, Deb et al. 2002)."""
    left, found, rank = dict(points), dict[str, int](), 0
    while left:
        for name in front(left):
            found[name] = rank
        left = {name: point for name, point in left.items() if name not in found}
        rank += 1
    return found


def survivors(costs: Mapping[str, float], losses: Mapping[str, float], keep: int) -> list[str]:
    """The `keep` names that go on: first by their rank in (cost, loss), then by loss, then by cost."""
    rank = ranks({name: (costs[name], losses[name]) for name in losses})
    order = sorted(losses, key=lambda name: (rank[name], losses[name], costs[name], name))
    return order[:keep]


def trained_tokens(plan: Sequence[Rung], shared: int = 1) -> int:
    """Tokens that the plan trains when survivors go on from their checkpoints, and `shared` candidates share
    each training."""
    before = [0, *(rung.tokens for rung in plan)]
    return sum(-(-r.candidates // shared) * (r.tokens - b) for r, b in zip(plan, before, strict=False))
