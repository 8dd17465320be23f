"""How sure an upstream is of an answer: one number, larger is surer.

Pure. Knows nothing about who is asked, or what is done with the number. Sources: contracts.cascade.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from contracts.cascade import Signal
from contracts.config import canonical_json
from serve.cascade.logprobs import CHAT, COMPLETIONS, ENDPOINTS, TokenScores

TOP = {Signal.MARGIN: 2}
"""How many of the most likely tokens a signal needs; others need none."""
GRADED = frozenset((CHAT, COMPLETIONS, "/v1/responses", "/v1/messages"))
"""APIs whose answers have a text that a grader can read."""


def can_judge(signal: Signal, endpoint: str, body: Mapping[str, Any]) -> bool:
    """True for a request with one answer, of an API in which the signal can be measured."""
    if endpoint not in (GRADED if signal is Signal.GRADER else ENDPOINTS):
        return False
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")) or body.get("use_beam_search"):
        return False
    if endpoint != COMPLETIONS:
        return True
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return not several and not body.get("echo")


def of_scores(signal: Signal, scores: TokenScores) -> float | None:
    """A signal of log-probabilities; None when there are none, or no margins."""
    values = scores.margins if signal is Signal.MARGIN else scores.logprobs
    if not values or len(values) < len(scores.logprobs):
        return None
    return fmean(values) if signal is Signal.MEAN_LOGPROB else min(values)


def agreement(answer: str, samples: Sequence[str]) -> float | None:
    """Share of the samples that are the answer, all of them normalised; None without samples."""
    return sum(one == answer for one in samples) / len(samples) if samples else None


def normalised(choice: dict[str, Any]) -> str | None:
    """What a choice says, as far as it matters: case, white space and the order of JSON's keys do not.

    Calls of tools count by name and arguments; None when there is neither text nor call.
    """
    message = choice.get("message")
    inside = message if isinstance(message, dict) else {"content": choice.get("text")}
    text, calls = inside.get("content"), inside.get("tool_calls")
    if not isinstance(text, str) and not calls:
        return None
    return canonical_json([normalised_text(text) if isinstance(text, str) else None, _calls(calls)])


def normalised_text(text: str) -> str:
    """JSON in its canonical form, other text without its case and with single spaces."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split()).casefold()
    return canonical_json(value)


def _calls(calls: object) -> list[list[str]]:
    functions = [c.get("function") for c in calls if isinstance(c, dict)] if isinstance(calls, list) else []
    return [
        [str(f.get("name")), normalised_text(str(f.get("arguments")))]
        for f in functions
        if isinstance(f, dict)
    ]
