"""Which engine settings answer the most requests a second within a latency target, measured.

Every candidate runs beside the default engine and turns alternate between them, so the machine's drift falls
on both; a gain is always of two such sides. Screening: every single change, briefly. The better half again,
longer (successive halving). What gained is combined, best first, each addition kept only if it gains; the
result is measured once more, in rounds. Knows nothing about logs, files of settings or terminals.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from contracts.config import Record, write_atomic
from contracts.errors import ConfigError, EngineError
from serve.engine.config import EngineOptions
from serve.tuning.load import Turn
from serve.tuning.traffic import Work

Run = Callable[[EngineOptions, Path], AbstractContextManager[str]]
"""An engine with these options and this log file, as the URL it answers at."""
Ask = Callable[[str, Sequence[Work], int], Turn]
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GAIN = 1.02
"""Smaller gains are noise; they are not combined."""


class Target(Record):
    """What must hold while requests a second are counted."""

    of: Literal["e2e", "ttft", "tpot"] = "e2e"
    p95_s: float = Field(gt=0)


class Trial(Record):
    """One candidate beside the default."""

    changes: dict[str, Any]
    """EngineOptions' fields that differ from the default."""
    requests: int
    """Of each turn."""
    rounds: int
    base: list[Turn]
    turns: list[Turn]
    base_rate: float = 0.0
    """Requests a second of the default within the target, at its best concurrency; median over the rounds."""
    rate: float = 0.0
    gain: float = 0.0
    """Median over the rounds of the two rates' ratio."""
    error: str | None = None
    """Why the engine did not start or answer."""

    @property
    def name(self) -> str:
        """The changes in words."""
        return ", ".join(f"{n}={v}" for n, v in self.changes.items()) or "default"


@dataclass
class Tuner:
    """One search. What is measured is kept in `file` and not measured again."""

    base: EngineOptions
    work: Sequence[Work]
    target: Target
    folder: Path
    run: Run
    ask: Ask
    requests: int = 48
    rounds: int = 3
    say: Callable[[str], None] = lambda text: None
    ladder: Sequence[int] = LADDER
    _taken: int = 0
    _known: dict[str, Trial] = field(default_factory=dict)

    def search(self, singles: Sequence[dict[str, Any]]) -> tuple[Trial, list[Trial]]:
        """The final trial of what was chosen (no changes: the default is best), and all trials."""
        self._load()
        with self.run(self.base, self.folder / "default.log") as base:
            self.ask(base, self.work[:8], 4)
            screened = [self._trial(base, one, self.requests // 2, 1, "screening") for one in singles]
            ranked = sorted((t for t in screened if t.error is None), key=lambda t: -t.gain)
            half = [t for t in ranked[: max(1, len(ranked) // 2)] if t.gain > 1.0]
            again = [self._trial(base, t.changes, self.requests, 1, "halving") for t in half]
            chosen, combined = self._combine(base, sorted(again, key=lambda t: -t.gain))
            trials = [*screened, *again, *combined]
            if not chosen:
                return Trial(changes={}, requests=0, rounds=0, base=[], turns=[], gain=1.0), trials
            final = self._trial(base, chosen, self.requests, self.rounds, "final")
        return final, [*trials, final]

    def _combine(self, base: str, ranked: Sequence[Trial]) -> tuple[dict[str, Any], list[Trial]]:
        good = [t for t in ranked if t.error is None and t.gain >= GAIN]
        if not good:
            return {}, []
        chosen, gain, tried = dict(good[0].changes), good[0].gain, []
        for one in good[1:]:
            if set(one.changes) & set(chosen):
                continue
            both = self._trial(base, {**chosen, **one.changes}, self.requests, 1, "combining")
            tried.append(both)
            if both.error is None and both.gain > gain:
                chosen, gain = dict(both.changes), both.gain
        return chosen, tried

    def _trial(self, base: str, changes: dict[str, Any], requests: int, rounds: int, stage: str) -> Trial:
        requests = max(4, requests)
        key = self._key(changes, requests, rounds)
        if key not in self._known:
            self.say(f"{stage}: {', '.join(f'{n}={v}' for n, v in changes.items())} …")
            self._known[key] = self._measure(base, changes, requests, rounds)
            self._keep()
        trial = self._known[key]
        self.say(
            f"  {trial.name}: {trial.error.splitlines()[0]}"
            if trial.error
            else f"  {trial.name}: {trial.rate:.2f} req/s, default {trial.base_rate:.2f}: {trial.gain:.2f} ×"
        )
        return trial

    def _measure(self, base: str, changes: dict[str, Any], requests: int, rounds: int) -> Trial:
        told = {"changes": changes, "requests": requests, "rounds": rounds}
        log = self.folder / f"trial-{len(self._known)}.log"
        try:
            # Validated as a whole: what pydantic refuses is no candidate.
            options = EngineOptions.model_validate({**self.base.model_dump(), **changes})
            with self.run(options, log) as url:
                self.ask(url, self.work[:8], 4)
                both = [self._sides(base, url, requests, number) for number in range(rounds)]
        except EngineError as err:
            return Trial(**told, base=[], turns=[], error=str(err))
        rates = [(rate(a, self.target), rate(b, self.target)) for a, b in both]
        if min(a for a, _ in rates) <= 0:
            best = min(t.p95[self.target.of] for a, _ in both for t in a)
            raise ConfigError(
                f"the default settings do not reach a p95 {self.target.of} of {self.target.p95_s:g} s even "
                f"with one request at a time ({best:.3g} s). Give a larger target."
            )
        return Trial(
            **told,
            base=[turn for a, _ in both for turn in a],
            turns=[turn for _, b in both for turn in b],
            base_rate=median(a for a, _ in rates),
            rate=median(b for _, b in rates),
            gain=median(b / a for a, b in rates),
        )

    def _sides(self, base: str, url: str, requests: int, number: int) -> tuple[list[Turn], list[Turn]]:
        """Both up the ladder, step by step beside each other, until each misses the target."""
        turns: tuple[list[Turn], list[Turn]] = ([], [])
        going = {0, 1}
        for step, concurrency in enumerate(self.ladder):
            work = self._next(max(requests, 2 * concurrency))
            for side in sorted(going, reverse=(number + step) % 2 == 1):
                turns[side].append(self.ask((base, url)[side], work, concurrency))
            going = {s for s in going if turns[s][-1].p95[self.target.of] <= self.target.p95_s}
            if not going:
                break
        return turns

    def _next(self, count: int) -> list[Work]:
        """Requests that no turn had yet, from the start again when all had."""
        start, self._taken = self._taken, self._taken + count
        return list(itertools.islice(_round(self.work, start), count))

    def _key(self, changes: dict[str, Any], requests: int, rounds: int) -> str:
        told = [
            self.base.model_dump(),
            changes,
            requests,
            rounds,
            self.target.model_dump(),
            list(self.ladder),
        ]
        return json.dumps([*told, len(self.work), self.work[0], self.work[-1]], sort_keys=True)

    @property
    def _file(self) -> Path:
        return self.folder / "trials.json"

    def _load(self) -> None:
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._known = {key: Trial.model_validate(value) for key, value in kept.items()}
        except FileNotFoundError:
            self._known = {}
        except (ValueError, AttributeError) as err:
            raise ConfigError(
                f"{self._file} is not what a former run wrote; delete it or give another --out."
            ) from err

    def _keep(self) -> None:
        kept = {key: trial.model_dump() for key, trial in self._known.items()}
        write_atomic(self._file, json.dumps(kept) + "\n")


def rate(turns: Sequence[Turn], target: Target) -> float:
    """Requests a second of the best turn within the target; 0 where none is."""
    return max((t.requests_per_s for t in turns if t.p95[target.of] <= target.p95_s), default=0.0)


def _round(work: Sequence[Work], start: int) -> Iterator[Work]:
    return (work[(start + number) % len(work)] for number in itertools.count())


def singles(base: EngineOptions, cores: int, longest: int) -> list[dict[str, Any]]:
    """Every single change worth trying on a CPU of so many cores.

    Args:
        longest: tokens of the longest request with its answer; unchunked prefill needs room for it.
    """
    eager = {"enforce_eager": not base.enforce_eager}
    found: list[dict[str, Any]] = [eager]
    found += [{"threads": n} for n in _doublings(cores) if n != base.threads]
    found += [{"threads": n, "bind": f"0-{n - 1}" if n > 1 else "0"} for n in {cores}]
    found += [{"max_num_seqs": n} for n in (8, 32) if n != base.max_num_seqs]
    found += [{"max_num_batched_tokens": n} for n in (256, 4096) if n != base.max_num_batched_tokens]
    found += [{"block_size": n} for n in (32, 64) if n != base.block_size]
    found += [{"prefix_caching": base.prefix_caching is False}]
    room = max(2048, base.max_model_len or longest)
    found += [{"chunked_prefill": False, "max_num_batched_tokens": room}]
    if base.kv_cache_bytes is not None:
        found += [{"kv_cache_bytes": 2 * base.kv_cache_bytes}]
    return found


def _doublings(cores: int) -> list[int]:
    return [2**n for n in range(cores.bit_length()) if 2**n <= cores]
