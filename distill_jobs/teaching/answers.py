"""The teacher's own text for samples: those nobody good answered, or all of them; one greedy answer, or the
best of several.

Texts are shared between jobs by conversation, teacher and sampling. Knows nothing about tokens or
distributions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contracts.config import write_atomic
from contracts.plugins import load_function
from distill_jobs.engine import read_lines
from distill_jobs.keys import sha256_of
from distill_jobs.teaching.ask import Question, Sampling, Voice
from distill_jobs.teaching.config import TeachConfig

Grade = Callable[[dict[str, Any], str], bool | float | None]
Sample = dict[str, Any]


class Texts:
    """Finished texts by conversation, in a folder that jobs share: one file of lines a job, whole or not
    there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, list[str]] = {}
        for file in sorted(folder.glob("*.jsonl")) if folder is not None and folder.is_dir() else ():
            self._known |= {r["key"]: r["texts"] for r in read_lines(file)}

    def find(self, question: Question) -> list[str] | None:
        """The texts of a conversation; None when no job asked."""
        return self._known.get(key_of(question))

    def add(self, questions: Sequence[Question], texts: dict[str, list[str]]) -> None:
        """Keep the texts of answered questions for other jobs."""
        lines = [{"key": key_of(q), "texts": texts[q.id]} for q in questions if q.id in texts]
        if self._folder is not None and lines:
            name = sha256_of([line["key"] for line in lines])[:32]
            write_atomic(self._folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def key_of(question: Question) -> str:
    """Digest of everything that the teacher is shown."""
    body = {k: v for k, v in question.request.items() if k not in ("messages", "model", "stream", "user")}
    return sha256_of([question.messages, body])


def sampling_of(config: TeachConfig) -> Sampling:
    """How the configuration wants answers drawn."""
    answers = config.answers
    return Sampling(config.answer_tokens, answers.temperature, answers.top_p, answers.n)


def fill_answers(
    samples: Sequence[Sample],
    config: TeachConfig,
    voice: Voice,
    texts: Texts,
    folder: Path,
    counts: Counter[str],
) -> None:
    """Give every sample that `config.answers` means the teacher's answer, or None when it has no finished,
    good one.
    """
    wanted = [s for s in samples if _is_asked(s, config)]
    questions = [question_of(s) for s in wanted]
    found = {q.id: known for q in questions if (known := texts.find(q)) is not None}
    counts["answers_cached"] += len(found)
    missing = [q for q in questions if q.id not in found]
    if missing:
        new = voice.ask(missing, sampling_of(config), folder)
        texts.add(missing, new)
        found |= new
    grade = load_function(config.answers.grader, "teach.answers.grader") if config.answers.grader else None
    for sample, question in zip(wanted, questions, strict=True):
        drawn = found.get(question.id, [])
        sample["answer"] = best(json.loads(sample["request"]), drawn, grade)
        counts["answered_offline"] += sample["answer"] is not None
        counts["no_good_answer"] += bool(drawn) and sample["answer"] is None


def question_of(sample: Sample) -> Question:
    """A sample's conversation as the teacher sees it."""
    messages = json.loads(sample.get("teacher_messages") or sample["messages"])
    return Question(sample["sample_digest"], messages, json.loads(sample["request"]))


def best(request: dict[str, Any], drawn: Sequence[str], grade: Grade | None) -> str | None:
    """Of several answers the one with the highest grade, then the most frequent, then the first; None when
    the grader calls all of them wrong. What cannot be graded counts as between wrong and right.
    """
    often = Counter(text.strip() for text in drawn)
    grades = [_number(grade(request, text)) if grade is not None else 0.5 for text in drawn]
    ranked = sorted(range(len(drawn)), key=lambda i: (-grades[i], -often[drawn[i].strip()], i))
    return drawn[ranked[0]] if ranked and grades[ranked[0]] > 0 else None


def _number(grade: bool | float | None) -> float:
    return 0.5 if grade is None else float(grade)


def _is_asked(sample: Sample, config: TeachConfig) -> bool:
    if sample["answer"] is None:
        return True
    return (
        config.answers.which == "all"
        and not sample.get("corrected")
        and sample.get("task") in (None, "answer")
    )
