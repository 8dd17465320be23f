"""The teacher's own text for samples: those nobody good answered, or all of them; one greedy answer, or the
best of several.

Texts are shared between jobs by conversation, teacher and sampling. Knows nothing about tokens or
distributions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from contracts.config import write_atomic
from contracts.plugins import load_function
from distill_jobs.keys import sha256_of
from distill_jobs.lines import LineIndex
from distill_jobs.teaching.ask import Answers, Question, Sampling
from distill_jobs.teaching.config import TeachConfig

Grade = Callable[[dict[str, Any], str], bool | float | None]
Sample = dict[str, Any]


class Texts:
    """Finished texts by conversation, in a folder that jobs share: files of lines, each whole or not there.
    28 bytes of memory a text. What this object adds others find, and it does not: a job's windows see what
    was there when it started.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        files = sorted(folder.glob("*.jsonl")) if folder is not None and folder.is_dir() else []
        self._known = LineIndex(files, "key")

    def find(self, question: Question) -> list[str] | None:
        """The texts of a conversation; None when no job asked."""
        row = self._known.find(key_of(question))
        return None if row is None else row["texts"]

    def add(self, questions: Sequence[Question], said: Answers) -> None:
        """Keep the texts of answered questions for other jobs."""
        found = [(q, said.get(q.id)) for q in questions]
        lines = [{"key": key_of(q), "texts": texts} for q, texts in found if texts is not None]
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


def unknown(samples: Sequence[Sample], config: TeachConfig, texts: Texts) -> Iterator[Question]:
    """What the teacher has to be asked: the samples that `config.answers` means and no job asked about."""
    for question in (question_of(s) for s in samples if is_asked(s, config)):
        if texts.find(question) is None:
            yield question


def fill_answers(
    samples: Sequence[Sample], config: TeachConfig, said: Answers, texts: Texts, counts: Counter[str]
) -> None:
    """Give every sample that `config.answers` means the teacher's answer, or None when it has no finished,
    good one. `said` is what the teacher said to what was `unknown`.
    """
    wanted = [s for s in samples if is_asked(s, config)]
    questions = [question_of(s) for s in wanted]
    found = [texts.find(q) for q in questions]
    counts["answers_cached"] += sum(known is not None for known in found)
    texts.add([q for q, known in zip(questions, found, strict=True) if known is None], said)
    grade = load_function(config.answers.grader, "teach.answers.grader") if config.answers.grader else None
    for sample, question, known in zip(wanted, questions, found, strict=True):
        drawn = said.get(question.id) or [] if known is None else known
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


def is_asked(sample: Sample, config: TeachConfig) -> bool:
    """Whether the teacher's own answer takes the place of what the sample has."""
    if sample["answer"] is None:
        return True
    return (
        config.answers.which == "all"
        and not sample.get("corrected")
        and sample.get("task") in (None, "answer")
    )
