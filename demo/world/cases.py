"""Seeded, random-access requests with their answers: `case("live", 123)` is the same request everywhere, for
ever.

It composes phrasings, values and the talk around them; it does not know who answers or how answers are
judged.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from demo.world import phrases_en, phrases_zh, splits
from demo.world.tools import ARGUMENTS, CITIES, PRODUCTS

SEED = 20261120
CHINESE_SHARE = 0.2
NO_TOOL_SHARE = 0.08
TWO_CALLS_SHARE = 0.3
#: Two splits stay below Jaccard 0.7 while what is owned exceeds 0.214 of what may be shared; keep slack.
OWNED_SHARE = 0.35

_IDENTIFIER = re.compile(r"[a-z]+\d")
_TOOL_NAMES = tuple(ARGUMENTS)
_PHRASES: dict[str, Any] = {"en": phrases_en, "zh": phrases_zh}
_OWNED: dict[str, Callable[[random.Random, str], str]] = {
    "order_id": splits.order_id,
    "email": splits.email,
    "zip": splits.zip_code,
    "card": splits.card,
    "serial": splits.serial,
    "code": splits.coupon,
    "amount": splits.amount,
}


@dataclass(frozen=True, slots=True)
class Spoken:
    """The words of the text that ask for one call."""

    words: str
    tool: str
    slots: dict[str, tuple[str, Any]]
    """Argument -> what the customer writes for it, and the value that it means."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request of one split, and the only right answer to it."""

    id: str
    split: str
    index: int
    text: str
    language: str
    answer: list[dict[str, Any]]
    spoken: tuple[Spoken, ...] = field(default=(), repr=False, compare=False)
    """How the text says each call of the answer."""


@dataclass(slots=True)
class _Draft:
    """A request being written: the text so far and how much of it no other split can contain."""

    rng: random.Random
    split: str
    language: str
    owned_chars: int = 0
    spoken: list[Spoken] = field(default_factory=list)

    def pick(self, items: Any) -> Any:
        return items[int(self.rng.random() * len(items))]

    def own(self, value: str) -> str:
        # A differing stretch of n characters changes n + 4 character 5-shingles.
        self.owned_chars += len(value) + 4
        return value


def _date(draft: _Draft) -> tuple[str, str]:
    month, day = 1 + int(draft.rng.random() * 12), 1 + int(draft.rng.random() * 28)
    phrases = _PHRASES[draft.language]
    shown = phrases_en.MONTHS[month - 1] if draft.language == "en" else month
    return draft.pick(phrases.DATES).format(month=shown, day=day), f"{month:02d}-{day:02d}"


def _slot(draft: _Draft, name: str) -> tuple[str, Any]:
    """What the customer writes for an argument, and the value that it means."""
    if name in _OWNED:
        shown = draft.own(_OWNED[name](draft.rng, draft.split))
        return shown, float(shown) if name == "amount" else shown
    if name == "date":
        return _date(draft)
    words = _PHRASES[draft.language].WORDS.get(name)
    if words is None:
        shown = draft.pick(PRODUCTS if name == "product" else CITIES)
        return shown, shown
    value = draft.pick(_values(draft.language, name))
    return draft.pick(words[value]), value


@functools.cache
def _values(language: str, name: str) -> tuple[Any, ...]:
    return tuple(_PHRASES[language].WORDS[name])


def _call(draft: _Draft, tool: str) -> tuple[str, dict[str, Any]]:
    """One request for one tool: what is said, and the call."""
    slots = {name: _slot(draft, name) for name in ARGUMENTS[tool]}
    said = draft.pick(_PHRASES[draft.language].REQUESTS[tool]).format(
        **{name: shown for name, (shown, _) in slots.items()}
    )
    draft.spoken.append(Spoken(said, tool, slots))
    return said, {"tool": tool, **{name: value for name, (_, value) in slots.items()}}


def _body(draft: _Draft) -> tuple[str, list[dict[str, Any]]]:
    phrases = _PHRASES[draft.language]
    roll = draft.rng.random()
    if roll < NO_TOOL_SHARE:
        return draft.pick(phrases.CHAT), []
    said, call = _call(draft, draft.pick(_TOOL_NAMES))
    if roll > 1 - TWO_CALLS_SHARE:
        again, second = _call(draft, draft.pick(_TOOL_NAMES))
        return draft.pick(phrases.OPENERS) + said + draft.pick(phrases.JOINS) + again, [call, second]
    return draft.pick(phrases.OPENERS) + said, [call]


def _frame(draft: _Draft, frames: tuple[str, ...]) -> str:
    """A sentence around the request, filled with names that only this split uses."""
    frame: str = draft.pick(frames)
    names = {}
    if "{name}" in frame:
        names["name"] = draft.own(splits.zh_name(draft.rng, draft.split))
    if "{first}" in frame:
        names["first"] = draft.own(splits.first_name(draft.rng, draft.split))
    if "{last}" in frame:
        names["last"] = draft.own(splits.surname(draft.rng, draft.split))
    if "{town}" in frame:
        names["town"] = draft.own(splits.town(draft.rng, draft.split))
    return frame.format(**names)


def _dressed(draft: _Draft, body: str) -> str:
    """The request with talk around it: always as much of it as keeps the splits apart."""
    phrases = _PHRASES[draft.language]
    space = " " if draft.language == "en" else ""
    stop = "." if draft.language == "en" else ""
    before = draft.rng.random() < 0.5
    text = (
        _frame(draft, phrases.BEFORE) + space + body
        if before
        else body + stop + space + _frame(draft, phrases.AFTER)
    )
    if draft.owned_chars < OWNED_SHARE * (len(text) - draft.owned_chars):
        text = (
            text + stop + space + _frame(draft, phrases.AFTER)
            if before
            else _frame(draft, phrases.BEFORE) + space + text
        )
    return text


def case(split: str, index: int, seed: int = SEED) -> Case:
    """The `index`-th request of a split."""
    if split not in splits.SHARES:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(splits.SPLITS)}")
    rng = random.Random(f"{seed}/{split}/{index}")
    draft = _Draft(rng, split, "zh" if rng.random() < CHINESE_SHARE else "en")
    body, answer = _body(draft)
    text = _dressed(draft, body)
    if not _IDENTIFIER.match(text):  # a capital would change an email address that comes first
        text = text[0].upper() + text[1:]
    return Case(f"{split}:{index}", split, index, text, draft.language, answer, tuple(draft.spoken))


def find(case_id: str, seed: int = SEED) -> Case | None:
    """The case of an id such as `live:123`, or None when it is no such id."""
    split, _, index = case_id.partition(":")
    return case(split, int(index), seed) if split in splits.SHARES and index.isdecimal() else None
