"""Rules over the texts of a sample: patterns, lengths, refusals, a JSON Schema of the answer.

A sample without an answer is held to the rules of its request only: the teacher has not answered it yet.
Knows nothing about log rows.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

_NOT = r"(?:can(?:['’]t|not)|unable|not able|won['’]t)"
_REFUSAL = re.compile(
    r"(?is)\W*(?:"
    + r"|".join(
        (
            rf"(?:i['’]?m|i am) (?:very |really |so )?(?:sorry|afraid)\b.{{0,60}}?{_NOT}",
            rf"(?:sorry|unfortunately|apologies),? .{{0,40}}?{_NOT}",
            r"i (?:can(?:['’]t|not)|won['’]t) (?:help|assist|comply|provide|answer|do|fulfil)",
            r"(?:i['’]m|i am) (?:not able|unable) to (?:help|assist|comply|provide|answer|do|fulfil)",
            r"i must decline",
            r"as an? (?:ai|language model|ai language model)\b",
            r"(?:很?抱歉|对不起|不好意思)[,，。 ]{0,2}.{0,20}?(?:无法|不能|没办法)",
            r"(?:我|作为.{0,12}(?:模型|助手|AI)).{0,4}(?:无法|不能)(?:提供|回答|帮助|协助)",
        )
    )
    + r")"
)


class TextRules:
    """A RulesConfig (as JSON values), compiled."""

    def __init__(self, rules: dict[str, Any]) -> None:
        self._rules = rules
        self._patterns = [
            (name, name.endswith("request"), name.startswith("drop"), re.compile(pattern, _flags(name)))
            for name in ("drop_request", "require_request", "drop_answer", "require_answer")
            for pattern in rules[name]
        ]
        self._schema = None
        if rules["answer_schema"] is not None:
            from jsonschema.validators import validator_for

            self._schema = validator_for(rules["answer_schema"])(rules["answer_schema"])

    def broken(self, text: str, answer: str | None) -> str | None:
        """The first rule that a request's (normalised) text and its answer break; None keeps the sample."""
        why = _length(text, "request", self._rules)
        if why is None and answer is not None:
            why = _length(answer, "answer", self._rules)
        if why is not None:
            return why
        for name, of_request, unwanted, pattern in self._patterns:
            told = text if of_request else answer
            if told is not None and (pattern.search(told) is not None) is unwanted:
                return name
        if answer is None:
            return None
        if self._rules["drop_refusals"] and _REFUSAL.match(answer):
            return "refusal"
        return self._of_schema(answer)

    def _of_schema(self, answer: str) -> str | None:
        if self._schema is None:
            return None
        try:
            value = orjson.loads(answer)
        except orjson.JSONDecodeError:
            return "not_json"
        return None if self._schema.is_valid(value) else "schema"


def _flags(name: str) -> int:
    # Requests are compared case-folded, so a pattern in capitals must find them too.
    return re.IGNORECASE if name.endswith("request") else 0


def _length(text: str, of: str, rules: dict[str, Any]) -> str | None:
    if len(text) < rules[f"min_{of}_chars"]:
        return f"{of}_short"
    longest = rules[f"max_{of}_chars"]
    return f"{of}_long" if longest is not None and len(text) > longest else None
