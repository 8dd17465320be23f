"""Rationales: the teacher's steps before an answer, parsed, checked, and made rows of a second task.

"Distilling step-by-step" (arXiv 2305.02301): the student learns to answer and, asked otherwise, to explain;"
" served,
it is only asked to answer. Knows nothing about where the text comes from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from string import Template
from typing import Any

from contracts.config import canonical_json
from contracts.plugins import load_function
from distill_jobs.augmenting.config import RationaleConfig
from distill_jobs.collecting.rows import normalise
from distill_jobs.keys import sha256_of
from distill_jobs.teaching.ask import Answers, Question

Sample = dict[str, Any]
Agree = Callable[[dict[str, Any], str, str], bool]

TASK = "rationale"


def questions(samples: Sequence[Sample], prompt: Template, marker: str) -> list[Question]:
    """What the teacher is asked: each conversation with its last user message asking for steps."""
    return [
        Question(
            _id(s),
            _asked(s["messages"], prompt.substitute(request="$request", marker=marker)),
            json.loads(s["request"]),
        )
        for s in samples
    ]


def split_answer(text: str, marker: str) -> tuple[str, str] | None:
    """(steps, final answer) of the teacher's text at the last line that starts with the marker; None when it
    has no such line, no steps, or no answer.
    """
    lines = text.strip().splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().casefold().startswith(marker.casefold())]
    if not places:
        return None
    at = places[-1]
    steps = "\n".join(lines[:at]).strip()
    answer = "\n".join([lines[at].strip()[len(marker) :], *lines[at + 1 :]]).strip()
    return (steps, answer) if steps and answer else None


def rows(
    config: RationaleConfig,
    samples: Sequence[Sample],
    said: Answers,
    teacher_prompt: Template,
    student_prompt: Template,
    counts: Counter[str],
) -> list[Sample]:
    """One sample of task `rationale` for each whose steps lead to the logged answer.

    The student's request is that of rationale_student.txt; the teacher is scored on the prompt it wrote them
    for.
    """
    agree: Agree = load_function(config.agree, "augment.rationale.agree") if config.agree else agrees
    made = []
    for sample in samples:
        texts = said.get(_id(sample), [])
        parsed = split_answer(texts[0], config.marker) if texts else None
        if parsed is None:
            counts["rationale_unreadable" if texts else "rationale_unfinished"] += 1
            continue
        steps, stated = parsed
        if not agree(json.loads(sample["request"]), sample["answer"], stated):
            counts["rationale_disagrees"] += 1
            continue
        read = _read_by_student(sample)
        asked = _asked(
            sample["messages"], teacher_prompt.substitute(request="$request", marker=config.marker)
        )
        made.append(
            sample
            | {
                "sample_digest": _id(sample),
                "messages": json.dumps(_asked(read, student_prompt.substitute(request="$request"))),
                "student_messages": None,
                "teacher_messages": json.dumps(asked),
                "answer": texts[0].strip() if config.with_answer else steps,
                "task": TASK,
                "origin": [sample["sample_digest"]],
                "kind": TASK,
            }
        )
    counts[TASK] += len(made)
    return made


def agrees(request: dict[str, Any], logged: str, stated: str) -> bool:
    """Equal as JSON values, or as normalised text."""
    try:
        return canonical_json(json.loads(logged)) == canonical_json(json.loads(stated))
    except json.JSONDecodeError:
        return normalise(logged) == normalise(stated)


def _asked(conversation: str, form: str) -> list[dict[str, Any]]:
    """The conversation with its last user message put into a form that says $request once."""
    messages = json.loads(conversation)
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    text = form.replace("$request", messages[last]["content"])
    return [m | {"content": text} if i == last else m for i, m in enumerate(messages)]


def _read_by_student(sample: Sample) -> str:
    """The student's conversation, where collect left a user's message in it."""
    read = sample.get("student_messages")
    return read if read and any(m["role"] == "user" for m in json.loads(read)) else sample["messages"]


def _id(sample: Sample) -> str:
    return sha256_of([TASK, sample["sample_digest"]])
