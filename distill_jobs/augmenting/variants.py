"""Variants of requests: what the teacher is asked to write, and how its lines become new samples.

A new sample remembers which samples it came from. Knows nothing about where the text comes from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from string import Template
from typing import Any

import numpy as np

from contracts.plugins import load_function
from distill_jobs.augmenting.config import AugmentConfig, HardNegativesConfig
from distill_jobs.collecting.rows import normalise, request_text
from distill_jobs.keys import sha256_of
from distill_jobs.sorting import Spilled
from distill_jobs.teaching.ask import Question

Sample = dict[str, Any]
Label = Callable[[dict[str, Any], str], str | None]

_NUMBERED = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+")
_BLOCK = 1024
_POOL = 4000
"""Samples compared for hard negatives: all pairs of these are looked at."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to the teacher, and the samples that its answer's lines come from: the first gives the new
    request its form (system message, tools).
    """

    kind: str
    question: Question
    origin: tuple[Sample, ...]
    answer: str | None = None


class Asks:
    """Everything that the configuration wants asked, in a fixed order, read as often as wanted. Paraphrases
    are made one at a time; the others, whose number the configuration says, are held.
    """

    def __init__(self, config: AugmentConfig, solved: Spilled[Sample], prompts: dict[str, Template]) -> None:
        """`solved`: the plain samples by digest."""
        self._config, self._solved, self._prompts = config, solved, prompts
        self._held: list[Ask] = []
        if config.expand is not None:
            self._held += _expansions(config, solved, prompts["expand"])
        if config.hard_negatives is not None:
            shown = list(islice(solved, _POOL))
            self._held += _hard_negatives(config.hard_negatives, shown, prompts["hard_negatives"])

    def __iter__(self) -> Iterator[Ask]:
        if self._config.paraphrase is not None:
            yield from _paraphrases(self._config, self._solved, self._prompts["paraphrase"])
        yield from self._held


def is_plain(sample: Sample) -> bool:
    """One user message after instructions, and an answer: what can be varied without inventing a
    conversation.
    """
    turns = [m["role"] for m in json.loads(sample["messages"]) if m["role"] not in ("system", "developer")]
    return turns == ["user"] and bool(sample["answer"] and sample["text"].strip())


def new_samples(ask: Ask, texts: Sequence[str], weight: float) -> Iterator[Sample]:
    """The lines of the teacher's texts as samples, each once."""
    first = ask.origin[0]
    seen = set()
    for line in (line for text in texts for line in lines_of(text)):
        if normalise(line) in seen:
            continue
        seen.add(normalise(line))
        messages = [
            m | {"content": line} if m["role"] == "user" else m for m in json.loads(first["messages"])
        ]
        request = json.loads(first["request"]) | {"messages": messages}
        identity = [[m["role"], normalise(m["content"])] for m in messages]
        yield first | {
            "sample_digest": sha256_of([identity, request.get("tools")]),
            "request": json.dumps(request),
            "messages": json.dumps(messages),
            "answer": ask.answer,
            "text": request_text(messages),
            "student_messages": _student_messages(first, line),
            "class": first.get("class") if ask.answer is not None else None,
            "source": "augment",
            "corrected": False,
            "weight": weight * (1.0 if first.get("weight") is None else first["weight"]),
            "task": "answer",
            "origin": [s["sample_digest"] for s in ask.origin],
            "kind": ask.kind,
        }


def _student_messages(sample: Sample, line: str) -> str | None:
    """What the student reads where collect took constant text out; None is the whole conversation, where that
    was a part of the user's own message.
    """
    if sample.get("student_messages") is None:
        return None
    messages = json.loads(sample["student_messages"])
    if [m["content"] for m in messages if m["role"] == "user"] != [said(sample)]:
        return None
    return json.dumps([m | {"content": line} if m["role"] == "user" else m for m in messages])


def lines_of(text: str) -> list[str]:
    """The requests of a reply: a line each, without numbers, bullets or surrounding quotes."""
    found = []
    for line in text.splitlines():
        bare = _NUMBERED.sub("", line).strip()
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
            bare = bare[1:-1].strip()
        if bare and not bare.endswith(":"):  # "Here are three requests:"
            found.append(bare)
    return found


def _paraphrases(config: AugmentConfig, solved: Spilled[Sample], prompt: Template) -> Iterator[Ask]:
    assert config.paraphrase is not None
    own = config.paraphrase
    for s in chosen(solved, own.samples, f"paraphrase-{config.seed}"):
        text = prompt.substitute(request=said(s), n=own.per_sample)
        yield _ask("paraphrase", text, (s,), s["answer"] if own.keep_answer else None)


def _expansions(config: AugmentConfig, solved: Spilled[Sample], prompt: Template) -> list[Ask]:
    assert config.expand is not None
    own = config.expand
    if not len(solved):
        return []
    asked = range(-(-own.requests // own.each))
    drawn = [picked(len(solved), own.shown, f"expand-{config.seed}-{number}") for number in asked]
    wanted = {place for places in drawn for place in places}
    found = {place: s for place, s in enumerate(solved) if place in wanted}
    made = []
    for number, places in enumerate(drawn):
        shown = [found[place] for place in places]
        examples = "\n---\n".join(said(s) for s in shown)
        n = min(own.each, own.requests - number * own.each)
        made.append(_ask("expansion", prompt.substitute(examples=examples, n=n), tuple(shown), salt=number))
    return made


def _hard_negatives(config: HardNegativesConfig, samples: Sequence[Sample], prompt: Template) -> list[Ask]:
    made = []
    for number, (a, b, label, other) in enumerate(borders(config, samples)):
        left = config.requests - number * config.each
        if left <= 0:
            break
        text = prompt.substitute(
            request=said(a), label=label, other=said(b), other_label=other, n=min(config.each, left)
        )
        made.append(_ask("hard_negative", text, (a, b), salt=number))
    return made


def borders(config: HardNegativesConfig, samples: Sequence[Sample]) -> list[tuple[Sample, Sample, str, str]]:
    """Each sample with the most similar one of another class, the closest pairs first: (a, b, class of a, of
    b).

    Likeness: cosine of TF-IDF over character 3- to 5-grams, as for demonstrations.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    classed = [(s, label) for s in samples[:_POOL] if (label := label_of(config, s)) is not None]
    labels = np.array([label for _, label in classed])
    if len(set(labels.tolist())) < 2:
        return []
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
    matrix = vectors.fit_transform([s["text"] for s, _ in classed])
    found = []
    for start in range(0, len(classed), _BLOCK):
        likeness = (matrix[start : start + _BLOCK] @ matrix.T).toarray()
        for row, scores in enumerate(likeness, start=start):
            scores[labels == labels[row]] = -1.0
            near = int(np.argmax(scores))
            found.append((-float(scores[near]), row, near))
    return [(classed[a][0], classed[b][0], classed[a][1], classed[b][1]) for _, a, b in sorted(found)]


def label_of(config: HardNegativesConfig, sample: Sample) -> str | None:
    """A sample's class: by the configured function, else what collect called it, else its answer."""
    if config.label is None:
        return sample.get("class") or normalise(sample["answer"])
    label: Label = load_function(config.label, "augment.hard_negatives.label")
    return label(json.loads(sample["request"]), sample["answer"])


def said(sample: Sample) -> str:
    """The user's message."""
    return str(next(m["content"] for m in json.loads(sample["messages"]) if m["role"] == "user"))


def picked(total: int, count: int | None, seed: str) -> list[int]:
    """Random places in 0..total-1, the same for the same total and seed."""
    if count is None or count >= total:
        return list(range(total))
    return random.Random(seed).sample(range(total), count)


def chosen(solved: Spilled[Sample], count: int | None, seed: str) -> Iterator[Sample]:
    """A random choice in the order of the samples."""
    if count is None:
        yield from solved
        return
    places = set(picked(len(solved), count, seed))
    yield from (s for place, s in enumerate(solved) if place in places)


def _ask(kind: str, text: str, origin: tuple[Sample, ...], answer: str | None = None, salt: int = 0) -> Ask:
    messages = [{"role": "user", "content": text}]
    question = Question(sha256_of([kind, text, salt]), messages, {"messages": messages})
    return Ask(kind, question, origin, answer)
