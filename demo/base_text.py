"""What the student's base model is pre-trained on: requests without answers, and plain JSON notes of what
they mention.

A team starts a student from a small pretrained checkpoint; this stands for that pretraining. The notes quote
the identifiers of a text and spell its dates, hours and small numbers in figures, in the order in which they
stand. No tool name, no argument name, no choice between tools and no answer of the task occurs in it.
"""

from __future__ import annotations

import json
import re

from demo.world import case
from demo.world.phrases_en import MONTHS

#: Cases of the teacher split from here on; the teacher itself is trained on lower ones.
FIRST_CASE = 5_000_000
_KEYS = ("note", "quote", "item", "text")
_NUMBERS = {
    word: number
    for words in (("two", "three", "four", "five", "six", "seven", "eight", "nine"), "两三四五六七八九")
    for number, word in enumerate(words, start=2)
}
_MONTH = "|".join(MONTHS)
_MENTIONED = re.compile(
    r"(?P<id>[A-H]-\d{5}|[a-z]+\d\d@[a-z.]+[a-z]|[A-Z]+\d{2,6}|\d{5,6})"
    r"|(?P<amount>\d+\.\d\d)"
    rf"|(?P<month>{_MONTH}) (?P<day>\d+)|(?P<day2>\d+) (?:of )?(?P<month2>{_MONTH})"
    r"|(?P<zh_month>\d+)月(?P<zh_day>\d+)"
    r"|(?P<hour>\d+):00|(?P<clock>\d+) (?P<half>am|pm)|(?P<zh_half>下午)?(?P<zh_hour>\d+)点"
    r"|\b(?P<word>two|three|four|five|six|seven|eight|nine)\b|(?P<zh_word>[两三四五六七八九])(?=[个件])|(?P<digit>\d)(?!\d)"
)
_NAME = re.compile(r"[A-Z][a-z]{3,}|[\u4e00-\u9fff]{3}(?=。|，|$)")


def _hour(clock: str, afternoon: bool) -> int:
    return int(clock) + 12 if afternoon and int(clock) < 12 else int(clock)


def _value(found: re.Match[str]) -> str | int | float:
    """A mention in figures: ids as they stand, dates as MM-DD, hours of 24, numbers as numbers."""
    part = found.groupdict()
    if part["id"]:
        return part["id"]
    if part["amount"]:
        return float(part["amount"])
    month = part["month"] or part["month2"]
    if month:
        return f"{MONTHS.index(month) + 1:02d}-{int(part['day'] or part['day2']):02d}"
    if part["zh_month"]:
        return f"{int(part['zh_month']):02d}-{int(part['zh_day']):02d}"
    if part["hour"]:
        return int(part["hour"])
    if part["clock"] or part["zh_hour"]:
        return _hour(part["clock"] or part["zh_hour"], part["half"] == "pm" or bool(part["zh_half"]))
    word = part["word"] or part["zh_word"]
    return _NUMBERS[word] if word else int(part["digit"])


def notes(text: str, number: int) -> str:
    """What a text mentions, as JSON; a name when it mentions nothing else."""
    key = _KEYS[number % len(_KEYS)]
    values: list[str | int | float] = [_value(found) for found in _MENTIONED.finditer(text)]
    return json.dumps(
        [{key: value} for value in values or _NAME.findall(text)[-1:]],
        separators=(",", ":"),
        ensure_ascii=False,
    )


def base_pair(number: int) -> tuple[str, str]:
    """The `number`-th text of the pretraining and its notes."""
    text = case("teacher", FIRST_CASE + number).text
    return text, notes(text, number)
