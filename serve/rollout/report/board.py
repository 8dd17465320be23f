"""The board of a route: everything that answered it, ranked by judged pairs over all its rollouts.

A pair is one request that both arms answered and a judge compared: a game of the candidate against the
stable upstream of its time. Reads the state store. Decides nothing: that is each rollout's own evidence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from contracts.config import Record
from contracts.errors import DataError, NotFoundError
from contracts.metrics import PAIR, SCORE_STEPS, ArmCounts
from serve.rollout.stats import bradley_terry
from serve.rollout.stats.bradley_terry import Games
from serve.state.rollouts import RolloutState, StoredRollout


class BoardRow(Record):
    """One model: its strength in Elo points against the first stable upstream, and how it got there."""

    model: str
    elo: float
    low: float
    high: float
    """95 % Wald interval of `elo`."""
    win_share: float
    """How often the first stable upstream would lose to it, ties counted half, by the fitted strengths."""
    games: int
    won: int
    tied: int
    lost: int


class Board(Record):
    """A route's ranking, strongest first."""

    route: str
    judge: str
    rows: tuple[BoardRow, ...]
    rollouts: int
    """Rollouts that had judged pairs."""
    said: str


def board(rollouts: RolloutState, route: str, judge: str | None = None) -> Board:
    """Rank what answered a route.

    Raises:
        NotFoundError: the route never had a rollout, none of them had judged pairs, or not by this judge.
        DataError: several judges judged, and none was named: their scales are not comparable.
    """
    history = rollouts.history(route)
    if not history:
        raise NotFoundError(f"route {route!r} never had a rollout.")
    judged = [(r, r.status.total_counts.get(PAIR, ArmCounts())) for r in history if r.status.stable]
    names = sorted({name for _, counts in judged for name, found in counts.scores.items() if sum(found)})
    chosen = _judge(route, names, judge)
    games: dict[tuple[str, str], Games] = {}
    met = [(r, counts.scores[chosen]) for r, counts in judged if sum(counts.scores.get(chosen, ()))]
    for stored, scores in met:
        pair = (stored.spec.candidate.name, _stable(stored))
        before, new = games.get(pair, Games(0, 0, 0)), outcomes(scores)
        games[pair] = Games(*(a + b for a, b in zip(before, new, strict=True)))
    first = _stable(met[0][0])
    rows = rank(games, first)
    return Board(route=route, judge=chosen, rows=rows, rollouts=len(met), said=_said(first, len(met)))


def outcomes(scores: Iterable[int]) -> Games:
    """Wins, ties and losses of the canary from counts on SCORE_VALUES of (canary - stable + 1) / 2."""
    counted, half = list(scores), SCORE_STEPS // 2
    return Games(sum(counted[half + 1 :]), counted[half], sum(counted[:half]))


def rank(games: dict[tuple[str, str], Games], reference: str) -> tuple[BoardRow, ...]:
    """Bradley-Terry strengths against one model; `games` are the first's against the second."""
    record: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (a, b), played in games.items():
        for name, found in ((a, played), (b, reversed(played))):
            record[name] = [x + y for x, y in zip(record[name], found, strict=True)]
    fitted = bradley_terry.board(games, reference=reference)
    base = next(r for r in fitted if r.name == reference)
    return tuple(
        BoardRow(
            model=r.name,
            elo=r.elo,
            low=bradley_terry.ELO * r.low,
            high=bradley_terry.ELO * r.high,
            win_share=bradley_terry.win_probability(r, base),
            games=r.games,
            won=record[r.name][0],
            tied=record[r.name][1],
            lost=record[r.name][2],
        )
        for r in fitted
    )


def _judge(route: str, names: list[str], wanted: str | None) -> str:
    if not names:
        raise NotFoundError(
            f"route {route!r} has no judged pairs: give it a shadow and a judge, and a metric of kind pairs."
        )
    if wanted is not None:
        if wanted not in names:
            raise NotFoundError(f"no pairs judged by {wanted!r} on {route!r}; judges: {', '.join(names)}.")
        return wanted
    if len(names) > 1:
        raise DataError(f"several judges on {route!r}: choose one with --judge: {', '.join(names)}.")
    return names[0]


def _stable(stored: StoredRollout) -> str:
    assert stored.status.stable is not None
    return stored.status.stable.name


def _said(first: str, count: int) -> str:
    over = "one rollout" if count == 1 else f"{count} rollouts"
    return (
        f"Bradley-Terry strengths in Elo points against {first}, over {over}; 95 % intervals at this moment, "
        "games taken as independent. For reading: promotions rest on each rollout's own evidence."
    )
