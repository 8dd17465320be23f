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
    """The text of an answer, the first choice's when it has several, and why it ended there."""

    text: str | None
    finish_reason: str | None
    """In the words of chat completions (stop, length, tool_calls) whatever API the answer came by."""


_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "completed": "stop",
    "max_output_tokens": "length",
}
"""What Messages and Responses call the reasons that chat completions have a word for."""


def parse_body(body: bytes) -> dict[str, Any] | None:
    """A JSON object, or None."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def usage_tokens(usage: object) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens of a usage object, by the names of any of the three APIs."""
    if not isinstance(usage, dict):
        return None, None
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
    if prompt is not None:  # Anthropic's input_tokens leave out what came from, or went to, the cache
        prompt += _count(usage.get("cache_read_input_tokens")) or 0
        prompt += _count(usage.get("cache_creation_input_tokens")) or 0
    return prompt, _count(usage.get("completion_tokens", usage.get("output_tokens")))


def answer_of(body: dict[str, Any] | None) -> Answer:
    """The text and finish reason of a whole answer of any of the three APIs."""
    if body is not None and body.get("type") == "message":
        return Answer(_joined(_texts(body.get("content"), "text")), _reason(body.get("stop_reason")))
    if body is not None and body.get("object") == "response":
        return _answer_of_response(body)
    choice = _first_choice(body)
    if choice is None:
        return Answer(None, None)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return Answer(text if isinstance(text, str) else None, _text(choice.get("finish_reason")))


def answer_of_stream(data: bytes) -> Answer:
    """The answer assembled from the events of a stream; text is None when no event carried any."""
    parts: list[str] = []
    finish: str | None = None
    for chunk in _chunks(data):
        delta = _only_delta(chunk)
        if delta is not None:
            parts.append(delta)
            continue
        piece, reason = _piece(chunk)
        if piece is not None:
            parts.append(piece)
        finish = reason or finish
    return Answer(_joined(parts), finish)


def _only_delta(chunk: Any) -> str | None:
    """The text of a chunk that is one choice with text and nothing else, as nearly every chunk is."""
    try:
        (choice,) = chunk["choices"]
        text = choice["delta"]["content"]
        plain = choice["index"] == 0 and choice["finish_reason"] is None
    except (TypeError, KeyError, ValueError):
        return None
    return text if plain and isinstance(text, str) else None


def model_of_stream(data: bytes) -> str | None:
    """The model that a stream's events name."""
    for event in split_events(data):
        model = model_of(event_json(event))
        if model is not None:
            return model
    return None


def model_of(body: object) -> str | None:
    """The model that a whole answer, or an event, names."""
    if not isinstance(body, dict):
        return None
    inner = body.get("response", body.get("message"))
    return _text(body.get("model")) or (_text(inner.get("model")) if isinstance(inner, dict) else None)


def _piece(event: object) -> Answer:
    """What one event adds."""
    if not isinstance(event, dict):
        return Answer(None, None)
    choice = _first_choice(event)
    delta = choice.get("delta") if choice is not None else event.get("delta")
    if choice is not None:
        piece = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        return Answer(_text(piece), _text(choice.get("finish_reason")))
    kind = event.get("type")
    if kind == "response.output_text.delta":
        return Answer(_text(delta), None)
    if kind == "content_block_delta" and isinstance(delta, dict):
        return Answer(_text(delta.get("text")), None)
    if kind == "message_delta" and isinstance(delta, dict):
        return Answer(None, _reason(delta.get("stop_reason")))
    if kind in ("response.completed", "response.incomplete") and isinstance(event.get("response"), dict):
        return Answer(None, _answer_of_response(event["response"]).finish_reason)
    return Answer(None, None)


def _answer_of_response(body: dict[str, Any]) -> Answer:
    """Of the object that the Responses API makes."""
    output = body.get("output")
    items = [i for i in output if isinstance(i, dict)] if isinstance(output, list) else []
    texts = [t for i in items if i.get("type") == "message" for t in _texts(i.get("content"), "output_text")]
    reason = _reason(body.get("status"))
    details = body.get("incomplete_details")
    if isinstance(details, dict):
        reason = _reason(details.get("reason")) or reason
    elif reason == "stop" and items and items[-1].get("type") == "function_call":
        reason = "tool_calls"
    return Answer(_joined(texts), reason)


def _texts(blocks: object, kind: str) -> list[str]:
    found = (
        [b for b in blocks if isinstance(b, dict) and b.get("type") == kind]
        if isinstance(blocks, list)
        else []
    )
    return [b["text"] for b in found if isinstance(b.get("text"), str)]


def _joined(parts: list[str]) -> str | None:
    return "".join(parts) if parts else None


def _reason(value: object) -> str | None:
    reason = _text(value)
    return _REASONS.get(reason, reason) if reason is not None else None


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
