"""What an upstream's answer says: text, finish reason and usage, of whole bodies and of event streams.

Used off the hot path, except `parse_body`. Tolerates anything: what is missing or odd is None. Knows nothing
about arms or sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import orjson

from serve.router.sse import event_json, split_events


class Answer(NamedTuple):
    """The first choice of an answer."""

    text: str | None
    finish_reason: str | None


def parse_body(body: bytes) -> dict[str, Any] | None:
    """A JSON object, or None."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def usage_tokens(usage: object) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens of a usage object, by OpenAI's names or those of the Responses API."""
    if not isinstance(usage, dict):
        return None, None
    return (
        _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
    )


def answer_of(body: dict[str, Any] | None) -> Answer:
    """The first choice of a whole answer."""
    choice = _first_choice(body)
    if choice is None:
        return Answer(None, None)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return Answer(text if isinstance(text, str) else None, _text(choice.get("finish_reason")))


def answer_of_stream(data: bytes) -> Answer:
    """The first choice assembled from the events of a stream; text is None when no event carried any."""
    parts: list[str] = []
    finish: str | None = None
    for chunk in _chunks(data):
        choice = _first_choice(chunk)
        if choice is None:
            continue
        delta = choice.get("delta")
        piece = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        if isinstance(piece, str):
            parts.append(piece)
        finish = _text(choice.get("finish_reason")) or finish
    return Answer("".join(parts) if parts else None, finish)


def _chunks(data: bytes) -> Iterable[Any]:
    """The JSON of every event. Streams framed as all servers of ours do are parsed at once, as one array."""
    plain = data.removesuffix(b"data: [DONE]\n\n")
    if plain.startswith(b"data: {") and plain.endswith(b"}\n\n"):
        # A line break inside JSON text is always escaped, so this one only occurs between events.
        try:
            return cast(list[Any], orjson.loads(b"[" + plain[6:-2].replace(b"\n\ndata: ", b",") + b"]"))
        except orjson.JSONDecodeError:
            pass  # comments, event names, other framing: event by event
    return map(event_json, split_events(data))


def _first_choice(body: object) -> dict[str, Any] | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        return None
    for choice in choices:
        if isinstance(choice, dict) and choice.get("index", 0) == 0:
            return choice
    return None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
