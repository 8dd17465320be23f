"""Takes what detectors find out of a row: every string of request and answer, however it is packed.

Works on whole texts, so nothing is torn between the chunks of a stream. What detectors cannot read (images,
audio, token ids, log-probabilities) is taken out unseen. Knows nothing about what detectors look for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from contracts.detectors import Detector, Span
from contracts.errors import DataError
from contracts.traffic import LogMode, RequestRow

_LABEL = re.compile(r"[A-Z][A-Z0-9_]{0,31}")
_UNTOUCHED = frozenset(("model", "tools", "functions", "tool_choice", "response_format"))
"""Fields of a request that its developer wrote, not a person."""
_TORN = frozenset(("logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids", "choices_token_ids"))
"""Fields that say the text again in pieces too small to be recognised."""
_BINARY = frozenset(("file_data", "data", "b64_json"))
_MIN_NUMBER = 10**6


class Redactor:
    """Applies detectors to rows. Raises whatever a detector raises: the caller must not log such a row."""

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self._detectors = tuple(detectors)

    def row(self, row: RequestRow) -> RequestRow:
        """The row with its texts redacted."""
        request = {
            key: value if key in _UNTOUCHED else self._field(key, value) for key, value in row.request.items()
        }
        response = row.response
        if response is not None:
            response = {key: self._field(key, value) for key, value in response.items()}
        return row.model_copy(
            update={
                "log_mode": LogMode.REDACTED,
                "request": request,
                "response": response,
                "response_text": None if row.response_text is None else self.text(row.response_text),
                "error": None if row.error is None else self.text(row.error),
            }
        )

    def text(self, text: str) -> str:
        """One text; inside of JSON the strings and numbers are looked at one by one."""
        if text.lstrip()[:1] in ("{", "["):
            inside = self._json(text)
            if inside is not None:
                return inside
        return replaced(text, self._spans(text))

    # values ----------------------------------------------------------------------------------------

    def _field(self, key: str, value: Any) -> Any:
        """A field at the top: its own numbers are parameters, and stay."""
        if key in ("prompt", "input") and _holds_token_ids(value):
            return "[TOKENS]"
        if isinstance(value, str | list | dict):
            return self._named(key, value)
        return value

    def _named(self, key: str, value: Any) -> Any:
        if key in _TORN and isinstance(value, list | dict):
            return None
        if key in _BINARY and isinstance(value, str) and len(value) > 64 and " " not in value:
            return "[BINARY]"
        return self._value(value)

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return "[BINARY]" if value[:5] == "data:" and ";base64," in value[:200] else self.text(value)
        if isinstance(value, list):
            return [self._value(item) for item in self._joined(value)]
        if isinstance(value, dict):
            return {self._key(key): self._named(key, item) for key, item in value.items()}
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _MIN_NUMBER:
            hidden = self.text(str(value))
            return value if hidden == str(value) else hidden
        return value

    def _key(self, key: str) -> str:
        return replaced(key, self._spans(key))

    def _joined(self, parts: list[Any]) -> list[Any]:
        """Text parts of one content, redacted as one text: a part may end in the middle of a number."""
        at = [i for i, p in enumerate(parts) if isinstance(p, dict) and isinstance(p.get("text"), str)]
        if len(at) < 2:
            return parts
        texts = [parts[i]["text"] for i in at]
        changed = list(parts)
        for i, text in zip(at, replaced_in_parts(texts, self._spans("".join(texts))), strict=True):
            changed[i] = {**parts[i], "text": text}
        return changed

    def _json(self, text: str) -> str | None:
        """JSON with its contents redacted; None when it is no JSON, or nothing was found inside it."""
        try:
            value = json.loads(text)
            inside = self._value(value)
        except (ValueError, RecursionError):
            return None
        return None if inside == value else json.dumps(inside, ensure_ascii=False)

    def _spans(self, text: str) -> list[Span]:
        if not text:
            return []
        return merged(text, (span for detector in self._detectors for span in detector(text)))


def merged(text: str, spans: Iterable[Span]) -> list[Span]:
    """Spans in order, overlapping ones as one under the longest one's label. Raises: DataError."""
    found: list[Span] = []
    longest = 0
    for start, end, label in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not 0 <= start < end <= len(text) or not _LABEL.fullmatch(label):
            raise DataError(
                "A detector gave a span outside of the text, or a label that is not like EMAIL_1."
            )
        if found and start < found[-1][1]:
            first, last, name = found[-1]
            name, longest = (label, end - start) if end - start > longest else (name, longest)
            found[-1] = (first, max(last, end), name)
        else:
            found.append((start, end, label))
            longest = end - start
    return found


def replaced(text: str, spans: Sequence[Span]) -> str:
    """The text with its (merged) spans replaced by their labels."""
    return replaced_in_parts([text], spans)[0] if spans else text


def replaced_in_parts(parts: Sequence[str], spans: Sequence[Span]) -> list[str]:
    """The same in a text that comes in parts; a label stands in the part where its span begins."""
    made, offset, first = [], 0, 0
    for part in parts:
        end, at = offset + len(part), offset
        pieces = []
        while first < len(spans) and spans[first][0] < end:
            start, stop, label = spans[first]
            if start >= offset:
                pieces += [part[at - offset : start - offset], f"[{label}]"]
            at = min(stop, end)
            if stop > end:
                break
            first += 1
        pieces.append(part[at - offset :])
        made.append("".join(pieces))
        offset = end
    return made


def _holds_token_ids(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(item, int) or (isinstance(item, list) and item and isinstance(item[0], int))
        for item in value[:1]
    )
