"""Does a draft speed a model up on a route's own requests: plain and drafting engines, side by side.

Turns alternate between the two, so that a machine that slows down slows both; answers are greedy and compared
text by text. Knows nothing about the log's files, nor who trained the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from contracts.config import Record
from contracts.speculative import Speculative
from serve.engine.config import EngineOptions
from serve.tuning import engines
from serve.tuning.load import Turn, answers
from serve.tuning.traffic import Work

Say = Callable[[str], None]


class Drafted(Record):
    """One task (or all together) with one way to draft, against plain decoding."""

    speculative: Speculative
    task: str
    requests: int
    same: int
    """Requests whose greedy answer is the plain engine's, character by character."""
    acceptance: float
    """Proposed tokens that were kept, of all proposed: vLLM's counters."""
    tokens_a_pass: float
    """Tokens that one pass of the model yields, the model's own one included."""
    plain_tokens_per_s: float
    tokens_per_s: float
    speed_up: float
    """Median over the rounds of drafting / plain, two turns next to each other."""


def by_task(work: Sequence[Work]) -> dict[str, list[Work]]:
    """Requests of each task, the most frequent task first."""
    found: dict[str, list[Work]] = {}
    for one in work:
        found.setdefault(one.task, []).append(one)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def measure(
    model: str,
    options: EngineOptions,
    ways: Sequence[Speculative],
    work: Sequence[Work],
    logs: Path,
    *,
    concurrency: int = 1,
    rounds: int = 3,
    say: Say = lambda text: None,
) -> list[Drafted]:
    """Every way to draft, task by task and all together (task 'all', first of each way).

    Raises: EngineError when an engine does not start or answer; ConfigError for a draft that does not fit.
    """
    found: list[Drafted] = []
    plain = options.model_copy(update={"speculative": None})
    say("starting the plain engine …")
    with engines.running(model, plain, logs / "plain.log") as base:
        answers(base, engines.MODEL, work[:4], concurrency)
        for number, way in enumerate(ways, 1):
            say(f"starting {name_of(way)} ({number} of {len(ways)}) …")
            drafting = plain.model_copy(update={"speculative": way})
            with engines.running(model, drafting, logs / f"{name_of(way)}.log") as url:
                answers(url, engines.MODEL, work[:4], concurrency)
                parts = [
                    _task(way, task, part, (base, url), concurrency, rounds)
                    for task, part in by_task(work).items()
                ]
            found += [_together(parts), *(parts if len(parts) > 1 else ())]
            say(f"{name_of(way)}: {found[-len(parts) - (len(parts) > 1)].speed_up:.2f} × plain decoding")
    return found


def name_of(way: Speculative) -> str:
    """e.g. draft-4, ngram-5, draft-4-probabilistic."""
    return f"{way.method}-{way.tokens}" + ("" if way.sampling == "greedy" else f"-{way.sampling}")


def _task(
    way: Speculative, task: str, work: list[Work], urls: tuple[str, str], concurrency: int, rounds: int
) -> Drafted:
    before = engines.drafted(urls[1])
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    texts: dict[int, list[str]] = {}
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            seen, texts[side] = answers(urls[side], engines.MODEL, work, concurrency)
            turns[side].append(seen)
    counted = {name: value - before.get(name, 0.0) for name, value in engines.drafted(urls[1]).items()}
    drafts = max(1.0, counted.get("drafts", 0.0))
    pairs = zip(*turns, strict=True)
    return Drafted(
        speculative=way,
        task=task,
        requests=len(work),
        same=sum(a == b for a, b in zip(texts[0], texts[1], strict=True)),
        acceptance=counted.get("accepted_tokens", 0.0) / max(1.0, counted.get("draft_tokens", 0.0)),
        tokens_a_pass=1 + counted.get("accepted_tokens", 0.0) / drafts,
        plain_tokens_per_s=median(one.tokens_per_s for one in turns[0]),
        tokens_per_s=median(one.tokens_per_s for one in turns[1]),
        speed_up=median(ours.tokens_per_s / plain.tokens_per_s for plain, ours in pairs),
    )


def _together(parts: Sequence[Drafted]) -> Drafted:
    """All tasks as one: means weighted by their requests, the speed-up by the seconds they took."""
    total = sum(one.requests for one in parts)

    def mean(values: Sequence[float]) -> float:
        return sum(v * one.requests for v, one in zip(values, parts, strict=True)) / total

    slow = sum(one.requests / one.plain_tokens_per_s for one in parts)
    fast = sum(one.requests / one.plain_tokens_per_s / one.speed_up for one in parts)
    return parts[0].model_copy(
        update={
            "task": "all",
            "requests": total,
            "same": sum(one.same for one in parts),
            "acceptance": mean([one.acceptance for one in parts]),
            "tokens_a_pass": mean([one.tokens_a_pass for one in parts]),
            "plain_tokens_per_s": mean([one.plain_tokens_per_s for one in parts]),
            "tokens_per_s": mean([one.tokens_per_s for one in parts]),
            "speed_up": slow / fast,
        }
    )


def choose(found: Sequence[Drafted], at_least: float = 1.05) -> Drafted | None:
    """The fastest way over all tasks, None where none gains `at_least`."""
    whole = [one for one in found if one.task == "all"]
    best = max(whole, key=lambda one: one.speed_up, default=None)
    return best if best is not None and best.speed_up >= at_least else None
