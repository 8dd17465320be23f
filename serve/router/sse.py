"""Server-sent events at any chunk boundary: what has to be seen on the hot path, and nothing more.

Whole events pass through byte for byte; one event can be taken out (the usage chunk that the router asked
for and the client did not). Knows nothing about HTTP, arms or logs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_EMPTY_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_NULL_USAGE = b'"usage":null'
_DONE = re.compile(rb"^data:[ ]?\[DONE\]", re.MULTILINE)
_ERROR = re.compile(rb'^(?:data:[ ]?\{\s*"error"\s*:\s*[{"]|event:[ ]?error)', re.MULTILINE)


class StreamWatcher:
    """Sees usage, errors and the end of an OpenAI event stream while its bytes go by.

    Only whole events are released, so a stream that breaks can always be followed by an event of ours.
    """

    __slots__ = ("_pending", "_strip", "done", "error", "usage")

    def __init__(self, strip_usage: bool) -> None:
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
        found = [at for at in (data.find(b'"usage"'), data.find(b"[DONE]"), data.find(b"error")) if at >= 0]
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


def _last_boundary(data: bytes) -> int:
    cut = 0
    for mark in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        at = data.rfind(mark)
        if at >= 0:
            cut = max(cut, at + len(mark))
    return cut
