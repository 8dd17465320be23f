"""Server-sent events at any chunk boundary: what has to be seen on the hot path, and nothing more.

Whole events pass through byte for byte; one event can be taken out (the usage chunk that the router asked
for and the client did not). One watcher for each of the three streaming APIs: OpenAI's completions, OpenAI's
Responses, Anthropic's Messages. Knows nothing about HTTP, arms or logs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import orjson

# Two line ends of any of the three kinds; each is taken whole, so that CR LF is never two of them.
_END_OF_EVENT = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_EMPTY_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_NULL_USAGE = b'"usage":null'
_DONE = re.compile(rb"^data:[ ]?\[DONE\]", re.MULTILINE)
_ERROR = re.compile(rb'^(?:data:[ ]?\{\s*"error"\s*:\s*[{"]|event:[ ]?error)', re.MULTILINE)


class StreamWatcher:
    """Sees usage, errors and the end of an OpenAI completion stream while its bytes go by.

    Only whole events are released, so a stream that breaks can always be followed by an event of ours.
    """

    __slots__ = ("_pending", "_strip", "done", "error", "usage")

    ending: ClassVar[str | None] = "[DONE]"
    """What the last event is called; a stream without it was cut off. None: anything may be the last."""
    _sign: ClassVar[bytes] = b"[DONE]"
    """Bytes without which no event can be the last one."""

    def __init__(self, strip_usage: bool = False) -> None:
        """With `strip_usage` the usage-only chunk (no choices) is kept from the client."""
        self._strip = strip_usage
        self._pending = b""
        self.usage: dict[str, Any] | None = None
        self.done = False
        self.error = False

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return those that go to the client now."""
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if not data.endswith(b"\n\n"):
            # A chunk that ends in '\r\n\r\n' also ends in an event; find the last boundary whatever it is.
            cut = _last_boundary(data)
            self._pending = data[cut:]
            data = data[:cut]
        marks = (data.find(b'"usage"'), data.find(self._sign), data.find(b"error"))
        found = [at for at in marks if at >= 0]
        if not found:
            return data
        # Most events need no look: only those from the first one that may hold something are cut apart.
        start = data.rfind(b"\n\n", 0, min(found)) + 2
        if start < 2:
            return self._inspect(data)
        tail = data[start:]
        seen = self._inspect(tail)
        return data if seen is tail else data[:start] + seen

    def rest(self) -> bytes:
        """Bytes of an event that never ended; only for a stream that ended as its upstream wanted."""
        pending, self._pending = self._pending, b""
        if not pending:
            return b""
        return self._inspect(pending)

    def failure(self, message: str, code: str) -> bytes:
        """The event that ends this stream when its upstream cannot."""
        return error_event(
            {"error": {"message": message, "type": "upstream_error", "param": None, "code": code}}
        )

    def _inspect(self, data: bytes) -> bytes:
        kept: list[bytes] = []
        dropped = False
        for event in split_events(data):
            if b'"usage"' in event and self._is_usage_chunk(event) and self._strip:
                dropped = True
                continue
            if b"[DONE]" in event and _DONE.search(event):
                self.done = True
            elif b"error" in event and _ERROR.search(event):
                self.error = True
            kept.append(event)
        return b"".join(kept) if dropped else data

    def _is_usage_chunk(self, event: bytes) -> bool:
        """Remember the usage of this event; True when the event carries nothing else."""
        if _NULL_USAGE in event and event.count(b'"usage"') == 1:
            return False  # OpenAI says so in every chunk but the last
        chunk = event_json(event)
        if not isinstance(chunk, dict) or not isinstance(chunk.get("usage"), dict):
            return False
        self.usage = chunk["usage"]
        return chunk.get("choices") == [] and _EMPTY_CHOICES.search(event) is not None


class OpenStream(StreamWatcher):
    """A stream of an endpoint that says nothing about how its streams end."""

    __slots__ = ()
    ending = None


class _TypedEvents(StreamWatcher):
    """A stream whose events name their type in their JSON. Nothing is ever taken out of it."""

    __slots__ = ()

    def _inspect(self, data: bytes) -> bytes:
        for event in split_events(data):
            body = event_json(event)
            if isinstance(body, dict):
                self._see(body)
        return data

    def _see(self, body: dict[str, Any]) -> None:
        raise NotImplementedError


class ResponsesWatcher(_TypedEvents):
    """OpenAI's Responses API: the last event carries the whole response, usage included."""

    __slots__ = ("_last",)
    ending = "response.completed"
    _sign = b'"response"'

    def __init__(self, strip_usage: bool = False) -> None:
        super().__init__(strip_usage)
        self._last = b""

    def feed(self, data: bytes) -> bytes:
        """As always, and remember what went out last: an error event continues its numbering."""
        events = super().feed(data)
        if events:
            self._last = events
        return events

    def failure(self, message: str, code: str) -> bytes:
        """The API's own error event, with the next sequence number.

        Its fields stand at the top, as documented, and below `error`, as OpenAI's clients look for them.
        """
        error = {"code": code, "message": message, "param": None}
        body = {"type": "error", **error, "sequence_number": self._next_number()}
        return _named_event("error", {**body, "error": {"type": "upstream_error", **error}})

    def _see(self, body: dict[str, Any]) -> None:
        kind = body.get("type")
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            response = body.get("response")
            if isinstance(response, dict) and isinstance(response.get("usage"), dict):
                self.usage = response["usage"]
            self.done = kind != "response.failed"
        self.error = self.error or kind in ("error", "response.failed")

    def _next_number(self) -> int:
        *_, last = split_events(self._last) if self._last else [b""]
        body = event_json(last)
        number = body.get("sequence_number") if isinstance(body, dict) else None
        return number + 1 if isinstance(number, int) else 0


class MessagesWatcher(_TypedEvents):
    """Anthropic's Messages API: usage comes in two parts, at the start and before the end."""

    __slots__ = ()
    ending = "message_stop"
    _sign = b"message_stop"

    def failure(self, message: str, code: str) -> bytes:
        """The API's own error event; it has no place for `code`."""
        return _named_event("error", {"type": "error", "error": {"type": "api_error", "message": message}})

    def _see(self, body: dict[str, Any]) -> None:
        kind = body.get("type")
        if kind == "message_start":
            message = body.get("message")
            self._add_usage(message.get("usage") if isinstance(message, dict) else None)
        elif kind == "message_delta":
            self._add_usage(body.get("usage"))
        self.done = self.done or kind == "message_stop"
        self.error = self.error or kind == "error"

    def _add_usage(self, usage: object) -> None:
        if isinstance(usage, dict):
            told = {name: count for name, count in usage.items() if count is not None}
            self.usage = {**(self.usage or {}), **told}


_WATCHERS: dict[str, type[StreamWatcher]] = {
    "/v1/chat/completions": StreamWatcher,
    "/v1/completions": StreamWatcher,
    "/v1/responses": ResponsesWatcher,
    "/v1/messages": MessagesWatcher,
}


def watcher_of(endpoint: str, strip_usage: bool) -> StreamWatcher:
    """The watcher of an endpoint's streams."""
    return _WATCHERS.get(endpoint, OpenStream)(strip_usage)


def split_events(data: bytes) -> Iterator[bytes]:
    """Cut bytes after every blank line; the last piece may be an event that has not ended."""
    if b"\r" not in data:
        pieces = data.split(b"\n\n")
        last = pieces.pop()
        yield from (piece + b"\n\n" for piece in pieces)
        if last:
            yield last
        return
    start = 0
    for boundary in _END_OF_EVENT.finditer(data):
        yield data[start : boundary.end()]
        start = boundary.end()
    if start < len(data):
        yield data[start:]


def event_json(event: bytes) -> Any | None:
    """The JSON of an event's data lines; None for comments, `[DONE]` and anything that is not JSON."""
    if event.startswith(b"data: {") and event.find(b"\n") >= len(event) - 2 and b"\r" not in event:
        try:
            return orjson.loads(event[6:])  # one line, as every server of ours writes it
        except orjson.JSONDecodeError:
            return None
    lines = [line[5:].lstrip(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    try:
        return orjson.loads(b"\n".join(lines))
    except orjson.JSONDecodeError:
        return None


def error_event(body: dict[str, Any]) -> bytes:
    """An error as an event, for a stream that has already begun."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _named_event(name: str, body: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\n" + error_event(body)


def _last_boundary(data: bytes) -> int:
    cut = 0
    for mark in (b"\n\n", b"\n\r\n", b"\r\r"):
        at = data.rfind(mark)
        if at >= 0:
            cut = max(cut, at + len(mark))
    return cut
