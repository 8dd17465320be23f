"""Samples to rows of token ids: what the student reads, and what the teacher reads when that is more.

A row's key is the digest of its sample and of all token ids that the teacher sees, so a cached distribution
can never meet another prompt or another answer. Knows nothing about distributions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_jobs.tokens import ChatTokenizer

CARRIED: dict[str, Any] = {"weight": 1.0, "task": "answer", "difficulty": 0.0}
"""Columns of a sample that its row keeps, and what a sample without one gets when another has it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample in token ids. The last `completion` ids of both sequences are the same."""

    sample_digest: str
    input_ids: np.ndarray  # (prompt + completion,) int32: the student's
    prompt_len: int
    teacher_ids: np.ndarray  # (longer prompt + completion,) int32
    teacher: str = ""  # names of those who score it, joined by '+'
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> int:
        """Tokens of the completion with its end."""
        return len(self.input_ids) - self.prompt_len

    @property
    def teacher_prompt_len(self) -> int:
        """Where the completion starts in `teacher_ids`."""
        return len(self.teacher_ids) - self.completion

    @property
    def token_digest(self) -> str:
        """sha256 of the student's token ids."""
        return hashlib.sha256(self.input_ids.tobytes()).hexdigest()

    @property
    def key(self) -> str:
        """32 hexadecimal digits: sample, the teacher's token ids, and where the completion starts."""
        about = f"{self.sample_digest}:{self.teacher_prompt_len}:".encode()
        return hashlib.sha256(about + self.teacher_ids.tobytes()).hexdigest()[:32]


def tokenise(
    samples: Sequence[dict[str, Any]],
    max_tokens: int,
    tokenizer: ChatTokenizer,
    counts: Counter[str],
    teacher_max_tokens: int | None = None,
) -> list[Row]:
    """Rows of the samples that have an answer, in their order.

    The student reads a sample's `student_messages` where it has them (collect took constant text out), the
    teacher its `teacher_messages` (demonstrations, the form of a rationale), both else its `messages`; all
    are JSON strings. Rows longer than `max_tokens`, or for the teacher than `teacher_max_tokens`, are
    dropped.
    """
    rows = []
    for sample in samples:
        if sample["answer"] is None:
            counts["no_teacher_answer"] += 1
            continue
        row = _row(sample, tokenizer)
        if len(row.input_ids) > max_tokens or len(row.teacher_ids) > (teacher_max_tokens or max_tokens):
            counts["too_many_tokens"] += 1
            continue
        rows.append(row)
    return rows


def carried_by(samples: Sequence[dict[str, Any]]) -> set[str]:
    """The columns of CARRIED that any of the samples has."""
    return {name for name in CARRIED if any(s.get(name) is not None for s in samples)}


def by_length(row: Row) -> tuple[int, str]:
    """The order of rows in parts: a batch of neighbours pads little, the same samples give the same parts."""
    return len(row.teacher_ids), row.sample_digest


def _row(sample: dict[str, Any], tokenizer: ChatTokenizer) -> Row:
    answer = tokenizer.answer(sample["answer"])
    read = sample.get("student_messages") or sample["messages"]
    shown = sample.get("teacher_messages") or sample["messages"]
    prompt = tokenizer.prompt(sample["request"], read)
    ids = np.asarray(prompt + answer, dtype=np.int32)
    teacher_ids = ids
    if shown != read:
        teacher_ids = np.asarray(tokenizer.prompt(sample["request"], shown) + answer, dtype=np.int32)
    kept = {c: default if sample.get(c) is None else sample[c] for c, default in CARRIED.items()}
    return Row(sample["sample_digest"], ids, len(prompt), teacher_ids, sample.get("teacher") or "", kept)
