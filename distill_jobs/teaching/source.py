"""Collected samples as their teachers see them, a window at a time: who is asked, and with what before it.

Windows are read as often as a phase needs them; only the pool of demonstrations stays in memory. Knows
nothing about how questions are answered.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contracts.plugins import load_function
from distill_jobs import samples
from distill_jobs.teaching.answers import Texts, is_asked, unknown
from distill_jobs.teaching.ask import Question
from distill_jobs.teaching.config import DemonstrationsConfig, TeachConfig
from distill_jobs.teaching.demonstrations import READ, Pool, fitting
from distill_jobs.teaching.merge import JOIN, assign
from distill_jobs.tokens import ChatTokenizer

SPLITS = ("train", "validation")

Sample = dict[str, Any]


class Source:
    """The collected splits of a job."""

    def __init__(self, config: TeachConfig, collected: dict[str, Path], tokenizer: ChatTokenizer) -> None:
        self._config, self._collected, self._tokenizer = config, collected, tokenizer
        self._label = load_function(config.label, "teach.label") if config.label else None
        shown = config.demonstrations
        # Demonstrations are training samples only.
        self._pool = Pool(samples.each(collected["train"], READ), shown.pool) if shown else None

    def count(self) -> int:
        """Samples of all splits."""
        return sum(samples.count(self._collected[split]) for split in SPLITS)

    def windows(self, split: str, counts: Counter[str]) -> Iterator[list[Sample]]:
        """The samples of a split with their `teacher` and `teacher_messages`; those that no teacher wants are
        dropped and counted.
        """
        for window in samples.windows(self._collected[split], self._config.window):
            yield self._shown(self._assigned(window, counts))

    def unknown(self, teacher: str, texts: Texts) -> Iterator[Question]:
        """What this teacher has to be asked, over all splits."""
        for split in SPLITS:
            for window in samples.windows(self._collected[split], self._config.window):
                asked = self._assigned([s for s in window if is_asked(s, self._config)], Counter())
                yield from unknown(self._shown(of_teacher(asked, teacher)), self._config, texts)

    def _assigned(self, window: Sequence[Sample], counts: Counter[str]) -> list[Sample]:
        """Samples with the names of their teachers."""
        wanted = []
        for sample in window:
            sample["teacher"] = assign(self._config, sample, self._label) if self._config.teachers else ""
            if self._config.teachers and not sample["teacher"]:
                counts["no_teacher"] += 1
                continue
            for name in filter(None, sample["teacher"].split(JOIN)):
                counts[f"teacher_{name}"] += 1
            wanted.append(sample)
        return wanted

    def _shown(self, window: list[Sample]) -> list[Sample]:
        """Samples with the conversation that their teachers see."""
        own = self._config.demonstrations
        if own is None or self._pool is None:
            return window
        plain = [s for s in window if s.get("task") in (None, "answer")]
        for sample, shown in zip(plain, self._pool.choose(plain, own.k), strict=True):
            length = partial(self._prompt_tokens, sample["request"])
            room = self._room(own, sample)
            sample["teacher_messages"] = json.dumps(fitting(sample, shown, length, room))
        return window

    def _prompt_tokens(self, request: str, messages: list[Sample]) -> int:
        return len(self._tokenizer.prompt(request, messages))

    def _room(self, own: DemonstrationsConfig, sample: Sample) -> int:
        """Tokens left for a prompt: beside the answer, or what one may take that is yet to be written."""
        if sample["answer"] is None:
            return own.max_tokens - self._config.answer_tokens
        return own.max_tokens - len(self._tokenizer.answer(sample["answer"]))


def of_teacher(window: Sequence[Sample], name: str) -> list[Sample]:
    """The samples whose first teacher this is: the one that answers."""
    return [s for s in window if s["teacher"].split(JOIN)[0] == name]
