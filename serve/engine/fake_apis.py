"""What the fake engine says in each API: completions, chat completions, Responses, Messages.

Pure: bodies and events from a request and the scripted behaviour. A request with `"echo": true` gets itself
back as `received`. Knows nothing about HTTP or time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

PROMPT_TOKENS = 7
_ARGUMENTS = '{"city": "Zürich"}'


@dataclass
class Behaviour:
    """What the fake does. All of it can be changed while it runs."""

    text: str = "tick "
    """One token's text."""
    tokens: int = 8
    model: str = "fake"
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    status: int = 200
    """Not 200: answer every generation with this error."""
    fail_every: int = 0
    """Every n-th generation answers 500."""
    cut_after: int = -1
    """Break a stream off after this many tokens, without ending it; -1 never."""
    error_after: int = -1
    """Send an error event after this many tokens; -1 never."""
    hang: bool = False
    """Accept requests and never answer."""
    healthy: bool = True
    logprob: float = -0.5
    """Log-probability of every token, for requests that ask for it."""
    second: float = -2.0
    """That of the best other token."""
    logprobs: bool = True
    """Give them when asked."""
    usage_when_asked: bool = True
    unfinished: bool = False
    """End streams politely but without their last event."""
    tool_calls: int = 0
    """Answer requests that bring tools with this many calls of them instead of a text."""


class Speech(NamedTuple):
    """A stream: events before the first token, one for each token, events after the last."""

    opening: list[bytes]
    token: Callable[[int], bytes]
    closing: Callable[[], Iterable[bytes]]


class Api(ABC):
    """One API's words."""

    ends_after_error = False
    """A stream that failed still gets its last event."""

    @abstractmethod
    def whole(self, body: dict[str, Any], b: Behaviour) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def stream(self, body: dict[str, Any], b: Behaviour) -> Speech:
        """A streamed answer."""

    def error(self, message: str, code: int) -> dict[str, Any]:
        """The body of an error."""
        return error_of(message, code)

    def error_event(self, message: str, code: int) -> bytes:
        """An error within a stream."""
        return _data(self.error(message, code))


class Completions(Api):
    """OpenAI's completions and chat completions."""

    ends_after_error = True

    def __init__(self, chat: bool) -> None:
        self._chat = chat

    def whole(self, body: dict[str, Any], b: Behaviour) -> dict[str, Any]:
        """Every choice says the same."""
        calls = _tool_calls(body, b)
        text = None if calls else _text(body, b)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = calls
        choice = {
            **({"message": message} if self._chat else {"text": text}),
            **_logprobs(body, [b.text] * b.tokens, b, self._chat),
            "finish_reason": "tool_calls" if calls else "stop",
        }
        choices = [{"index": i, **choice} for i in range(_count(body, "n", 1))]
        head = _head(body, "chat.completion" if self._chat else "text_completion")
        return {**head, "choices": choices, "usage": _usage(b.tokens), **_echo(body)}

    def stream(self, body: dict[str, Any], b: Behaviour) -> Speech:
        """Tokens of all choices by turns; usage last, when it was asked for."""
        head = _head(body, "chat.completion.chunk" if self._chat else "text_completion")
        calls, count = _tool_calls(body, b), _count(body, "n", 1)
        pieces = _pieces(_text(body, b), b) if body.get("response_format") else [b.text] * b.tokens
        indexes = range(count)
        asked = b.usage_when_asked and (body.get("stream_options") or {}).get("include_usage")

        def choice(index: int, at: int) -> dict[str, Any]:
            last = at + 1 == b.tokens
            finish = ("tool_calls" if calls else "stop") if last else None
            if not self._chat:
                said = {"index": index, "text": pieces[at], "finish_reason": finish}
                return {**said, **_logprobs(body, [pieces[at]], b, chat=False)}
            delta = _call_delta(calls, at) if calls else {"content": pieces[at]}
            return {
                "index": index,
                "delta": delta,
                **_logprobs(body, [pieces[at]], b),
                "finish_reason": finish,
            }

        def closing() -> list[bytes]:
            if b.unfinished:
                return []
            usage = [_data({**head, "choices": [], "usage": _usage(b.tokens)})] if asked else []
            return [*usage, b"data: [DONE]\n\n"]

        role = {"role": "assistant", "content": ""}
        roles = [{"index": i, "delta": role, "finish_reason": None} for i in indexes]
        opening = [_data({**head, "choices": roles, **_echo(body)})] if self._chat else []
        return Speech(
            opening, lambda at: _data({**head, "choices": [choice(i, at) for i in indexes]}), closing
        )


class Responses(Api):
    """OpenAI's Responses API, as vLLM streams it: numbered events, nothing after response.completed."""

    def whole(self, body: dict[str, Any], b: Behaviour) -> dict[str, Any]:
        """A completed response."""
        usage = {
            "input_tokens": PROMPT_TOKENS,
            "input_tokens_details": {"cached_tokens": 2},
            "output_tokens": b.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": PROMPT_TOKENS + b.tokens,
        }
        output: list[dict[str, Any]] = [
            {"type": "function_call", "id": f"fc_{at}", "call_id": call["id"], "status": "completed"}
            | call["function"]
            for at, call in enumerate(_tool_calls(body, b))
        ]
        return _response(body, "completed", output or [_message(_text(body, b), "completed")], usage)

    def stream(self, body: dict[str, Any], b: Behaviour) -> Speech:
        """One message item with one text part."""
        numbers = iter(range(10**9))
        place = {"item_id": "msg_fake", "output_index": 0, "content_index": 0}

        def event(kind: str, **more: Any) -> bytes:
            return _named(kind, {"type": kind, "sequence_number": next(numbers), **more})

        def closing() -> list[bytes]:
            if b.unfinished:
                return []
            whole = self.whole(body, b)
            return [
                event("response.output_text.done", **place, text=b.text * b.tokens, logprobs=[]),
                event("response.output_item.done", output_index=0, item=whole["output"][0]),
                event("response.completed", response=whole),
            ]

        begun = _response(body, "in_progress", [], None)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        opening = [
            event("response.created", response=begun),
            event("response.in_progress", response=begun),
            event("response.output_item.added", output_index=0, item=_message(None, "in_progress")),
            event("response.content_part.added", **place, part=part),
        ]
        return Speech(
            opening,
            lambda at: event("response.output_text.delta", **place, delta=b.text, logprobs=[]),
            closing,
        )

    def error_event(self, message: str, code: int) -> bytes:
        """The API's own error event."""
        body = {"type": "error", "code": str(code), "message": message, "param": None, "sequence_number": 99}
        return _named("error", body)


class Messages(Api):
    """Anthropic's Messages API."""

    def whole(self, body: dict[str, Any], b: Behaviour) -> dict[str, Any]:
        """A text, or uses of the tools."""
        blocks: list[dict[str, Any]] = [
            {
                "type": "tool_use",
                "id": c["id"],
                "name": c["function"]["name"],
                "input": orjson.loads(_ARGUMENTS),
            }
            for c in _tool_calls(body, b)
        ]
        return {
            "id": "msg_fake", "type": "message", "role": "assistant", "model": body.get("model"),
            "content": blocks or [{"type": "text", "text": b.text * b.tokens}],
            "stop_reason": "tool_use" if blocks else "end_turn", "stop_sequence": None,
            "usage": _anthropic_usage(b.tokens), **_echo(body),
        }  # fmt: skip

    def stream(self, body: dict[str, Any], b: Behaviour) -> Speech:
        """One text block; input tokens at the start, output tokens before the end."""
        message = self.whole(body, b) | {"content": [], "stop_reason": None, "usage": _anthropic_usage(0)}

        def event(kind: str, **more: Any) -> bytes:
            return _named(kind, {"type": kind, **more})

        def closing() -> list[bytes]:
            delta = {"stop_reason": "end_turn", "stop_sequence": None}
            ending = [] if b.unfinished else [event("message_stop")]
            return [
                event("content_block_stop", index=0),
                event("message_delta", delta=delta, usage={"output_tokens": b.tokens}),
                *ending,
            ]

        return Speech(
            [
                event("message_start", message=message),
                event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
                event("ping"),
            ],
            lambda at: event("content_block_delta", index=0, delta={"type": "text_delta", "text": b.text}),
            closing,
        )

    def error(self, message: str, code: int) -> dict[str, Any]:
        """Anthropic's shape."""
        return {"type": "error", "error": {"type": "fake_error", "message": message}}

    def error_event(self, message: str, code: int) -> bytes:
        """The same, as an event."""
        return _named("error", self.error(message, code))


APIS: dict[str, Api] = {
    "/v1/chat/completions": Completions(chat=True),
    "/v1/completions": Completions(chat=False),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
}


def error_of(message: str, code: int) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": "fake_error", "param": None, "code": code}}


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    head = {"id": "fake-1", "object": kind, "created": 1, "model": body.get("model")}
    return {**head, "system_fingerprint": f"seed-{body['seed']}"} if "seed" in body else head


def _count(body: dict[str, Any], name: str, default: int) -> int:
    """A small number of the request's. Raises ValueError, as for anything the engine would refuse."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not 0 <= value <= 128:
        raise ValueError(f"{name} must be a number up to 128")
    return value


def _echo(body: dict[str, Any]) -> dict[str, Any]:
    return {"received": body} if body.get("echo") is True else {}


def _usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


def _anthropic_usage(tokens: int) -> dict[str, int]:
    """Two of the prompt's tokens come from the cache: Anthropic counts them apart."""
    return {"input_tokens": PROMPT_TOKENS - 2, "cache_read_input_tokens": 2, "output_tokens": tokens}


def _text(body: dict[str, Any], b: Behaviour) -> str:
    """The scripted text, or JSON that satisfies a schema of required strings."""
    wanted = body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return b.text * b.tokens
    names = wanted["json_schema"]["schema"]["required"]
    return orjson.dumps(dict.fromkeys(names, b.text)).decode()


def _pieces(text: str, b: Behaviour) -> list[str]:
    """A text as tokens."""
    return [text[len(text) * i // b.tokens : len(text) * (i + 1) // b.tokens] for i in range(b.tokens)]


def _tool_calls(body: dict[str, Any], b: Behaviour) -> list[dict[str, Any]]:
    tools = body.get("tools")
    if not tools:
        return []
    names = [t.get("function", t).get("name") for t in tools]
    return [
        {
            "id": f"call_{at}",
            "type": "function",
            "function": {"name": names[at % len(names)], "arguments": _ARGUMENTS},
        }
        for at in range(b.tool_calls)
    ]


def _call_delta(calls: list[dict[str, Any]], at: int) -> dict[str, Any]:
    """Call by call: its name with one token, its arguments with the next."""
    which, part = divmod(at, 2)
    if which >= len(calls):
        return {}
    call = calls[which]
    if part == 0:
        function = {**call["function"], "arguments": ""}
        return {"tool_calls": [{"index": which, **call, "function": function}]}
    return {"tool_calls": [{"index": which, "function": {"arguments": call["function"]["arguments"]}}]}


def _logprobs(body: dict[str, Any], tokens: list[str], b: Behaviour, chat: bool = True) -> dict[str, Any]:
    """As vLLM gives them: `content` of a chat, lists side by side of a completion; the token itself is first
    of the top ones."""
    asked = body.get("logprobs")
    if not b.logprobs or (asked is not True if chat else type(asked) is not int):
        return {}
    values = [b.logprob, *(b.second - i for i in range(20))]
    if chat:
        count = _count(body, "top_logprobs", 0)
        content = [
            {
                "token": token,
                "logprob": b.logprob,
                "bytes": None,
                "top_logprobs": [
                    {"token": f"x{i}" if i else token, "logprob": v, "bytes": None}
                    for i, v in enumerate(values[:count])
                ],
            }
            for token in tokens
        ]
        return {"logprobs": {"content": content}}
    top = [{f"x{i}" if i else t: v for i, v in enumerate(values[: max(1, asked)])} for t in tokens]
    return {
        "logprobs": {
            "tokens": tokens,
            "token_logprobs": [b.logprob] * len(tokens),
            "top_logprobs": top,
            "text_offset": [0] * len(tokens),
        }
    }


def _message(text: str | None, status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    content = [] if text is None else [part]
    return {"type": "message", "id": "msg_fake", "role": "assistant", "status": status, "content": content}


def _response(
    body: dict[str, Any], status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": "resp_fake", "object": "response", "created_at": 1, "status": status,
        "model": body.get("model"), "output": output, "usage": usage, "error": None,
        "incomplete_details": None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        "instructions": body.get("instructions"), "metadata": {}, "temperature": 1.0, "top_p": 1.0,
        **_echo(body),
    }  # fmt: skip


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _named(name: str, body: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\n" + _data(body)
