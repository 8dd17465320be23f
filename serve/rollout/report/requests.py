"""The request log as the report needs it: tokens by arm, the canary's worst answers, and what stands beside.

Reads the log twice, a row at a time, so that its size does not matter: once for sums and for the worst, once
for the other arm's answers to the most similar requests. Knows nothing about prices or how things look.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from contracts.rollout import RolloutSpec
from contracts.traffic import Arm, Outcome, RequestRow
from serve.request_log.segments import final_segments, open_segments, opened_at
from serve.rollout.report import alike

_RIGHT = 0.5
KINDS = ("failed", "graded wrong", "slowest")
SPARE = 4
"""So many times more candidates than examples are kept, so that those with the best counterpart are shown."""


@dataclass
class Usage:
    """Tokens of one arm's requests that one upstream served."""

    rows: int = 0
    prompt: int = 0
    completion: int = 0
    unknown: int = 0
    """Answered rows that say nothing about tokens; not in `rows`."""


@dataclass
class Match:
    """A bad answer of the canary and the best counterpart found so far."""

    kind: str
    row: RequestRow
    words: frozenset[str]
    other: RequestRow | None = None
    relation: str = "no other answer in the log is alike"
    rank: tuple[int, float, int] = (0, 0.0, 0)
    """(a pair, similarity, graded right): more is better."""


@dataclass
class Scan:
    """What the log says about one rollout."""

    rows: int = 0
    broken: int = 0
    """Lines that are no rows."""
    usage: dict[tuple[str, str], Usage] = field(default_factory=dict)
    """(assigned arm, upstream that served) → its tokens."""
    worst: list[Match] = field(default_factory=list)


def scan(folder: Path, spec: RolloutSpec, end: float, each: int) -> Scan:
    """Both passes. `each` examples are wanted of every kind; 0 skips them.

    Args:
        end: Unix seconds after which the rollout saw no request.
    """
    found = Scan()
    heaps: dict[str, list[tuple[float, int, RequestRow]]] = {kind: [] for kind in KINDS}
    order = itertools.count()
    for row in rows(folder, spec, end, found):
        found.rows += 1
        _count(found, row)
        kind = badness(row) if each and of_candidate(row, spec) else None
        if kind is not None:
            worth = row.e2e_s if kind == "slowest" else row.ts
            _keep(heaps[kind], (worth, next(order), row), each * SPARE)
    for kind, heap in heaps.items():
        for _, _, row in sorted(heap, reverse=True):
            found.worst.append(Match(kind, row, alike.words(alike.conversation(row.request))))
    if found.worst:
        _find_counterparts(found.worst, rows(folder, spec, end, Scan()), spec)
    return found


def rows(folder: Path, spec: RolloutSpec, end: float, counted: Scan) -> Iterator[RequestRow]:
    """Rows of one rollout. Lines of others are passed over unparsed, broken ones are counted.

    A row of the stable arm names one rollout; in an A/B/n test it belongs to every student's.
    """
    wanted = f'"{spec.id}"'.encode() if spec.test is None else f'"{spec.test}-'.encode()
    for path in segments(folder, spec.created_at, end):
        try:
            file = path.open("rb")
        except FileNotFoundError:  # a segment is renamed when it is closed, removed when it expires
            renamed = path.with_name(path.name.replace(".open.jsonl", ".jsonl"))
            if not renamed.is_file():
                continue
            file = renamed.open("rb")
        with file:
            for line in file:
                if wanted not in line:
                    continue
                try:
                    row = RequestRow.model_validate_json(line)
                except ValidationError:
                    counted.broken += 1
                    continue
                if row.rollout_id == spec.id or (row.arm is Arm.STABLE and _same_test(row, spec)):
                    yield row


def _same_test(row: RequestRow, spec: RolloutSpec) -> bool:
    return spec.test is not None and (row.rollout_id or "").startswith(f"{spec.test}-")


def segments(folder: Path, start: float, end: float) -> list[Path]:
    """Segments that may hold rows of that time."""
    paths = [p for p in (*final_segments(folder), *open_segments(folder)) if p.name.startswith("requests-")]
    return [p for p in paths if _opened(p) <= end and _touched(p) >= start]


def of_candidate(row: RequestRow, spec: RolloutSpec) -> bool:
    """True for the canary's answers: its own share, and copies that it answered as a shadow."""
    return row.arm is Arm.CANARY or (row.arm is Arm.SHADOW and row.upstream == spec.candidate.name)


def right(row: RequestRow) -> bool | None:
    """Whether the answer satisfied the grader that liked it least (half a score and more); None: ungraded."""
    return min(row.scores.values()) >= _RIGHT if row.scores else None


def badness(row: RequestRow) -> str | None:
    """Which kind of bad answer a row could be an example of."""
    if row.outcome.failed:
        return "failed"
    if right(row) is False:
        return "graded wrong"
    return "slowest" if row.outcome is Outcome.OK else None


def _keep(heap: list[tuple[float, int, RequestRow]], item: tuple[float, int, RequestRow], most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def _count(found: Scan, row: RequestRow) -> None:
    if row.arm is Arm.SHADOW or row.outcome is not Outcome.OK:
        return
    asked = row.cascade
    usage = found.usage.setdefault((row.arm.value, row.upstream if asked is None else asked.by), Usage())
    if asked is not None and asked.by != asked.first:  # its tokens cost, its answer went to nobody
        first = found.usage.setdefault((row.arm.value, asked.first), Usage())
        first.prompt += asked.first_prompt_tokens
        first.completion += asked.first_completion_tokens
    if row.prompt_tokens is None or row.completion_tokens is None:
        usage.unknown += 1
        return
    usage.rows += 1
    served = (
        asked is not None and asked.by == asked.first
    )  # with its samples, which the row itself leaves out
    usage.prompt += asked.first_prompt_tokens if asked and served else row.prompt_tokens
    usage.completion += asked.first_completion_tokens if asked and served else row.completion_tokens


def _find_counterparts(worst: list[Match], found: Iterator[RequestRow], spec: RolloutSpec) -> None:
    """The answer to the same request where a shadow gave one, else the stable arm's to the most similar."""
    by_id = {m.row.request_id: m for m in worst}
    copies = {m.row.pair_id: m for m in worst if m.row.pair_id is not None}
    for row in found:
        if row.outcome is not Outcome.OK or row.request_id in by_id:
            continue
        pair = by_id.get(row.pair_id or "") or copies.get(row.request_id)
        if pair is not None:
            _offer(pair, row, (1, 1.0, right(row) is True), "the same request, answered by both")
        elif row.arm is Arm.STABLE and row.served_arm is Arm.STABLE:
            known = alike.words(alike.conversation(row.request))
            for match in worst:
                near = alike.similarity(match.words, known)
                if near > 0.0:
                    said = "an equal request" if near == 1.0 else "the most similar request"
                    _offer(match, row, (0, near, right(row) is True), said)


def _offer(match: Match, row: RequestRow, rank: tuple[int, float, int], relation: str) -> None:
    if match.other is None or rank > match.rank:
        match.other, match.rank, match.relation = row, rank, relation


def _opened(path: Path) -> float:
    return opened_at(path.name)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
