"""Event streams: nothing lost, nothing torn, usage seen and hidden, whatever the chunk boundaries."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.router.answer import answer_of, answer_of_stream, usage_tokens
from serve.router.sse import StreamWatcher, error_event, event_json, split_events

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def event(body: object, end: bytes = b"\n\n") -> bytes:
    return b"data: " + orjson.dumps(body) + end


def chunk(text: str, finish: str | None = None, **extra: object) -> dict[str, object]:
    return {
        "id": "1",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}],
        **extra,
    }


def stream(texts: list[str], end: bytes, usage: bool, null_usage: bool = False) -> tuple[bytes, bytes]:
    """(whole stream, the same without its usage chunk)."""
    extra = {"usage": None} if null_usage else {}
    parts = [event(chunk(t, **extra), end) for t in texts] + [event(chunk("", "stop", **extra), end)]
    tail = b"data: [DONE]" + end
    usage_event = [event({"id": "1", "choices": [], "usage": USAGE}, end)] if usage else []
    return b"".join([*parts, *usage_event, tail]), b"".join([*parts, tail])


def feed(watcher: StreamWatcher, data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    out = [watcher.feed(data[a:b]) for a, b in pairwise(edges) if b > a]
    return [*out, watcher.rest()]


TEXTS = st.lists(st.text(), max_size=6)
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])
CUTS = st.lists(st.integers(0, 5000), max_size=40)


@given(TEXTS, ENDS, CUTS, st.booleans())
def test_the_usage_chunk_is_taken_out_at_any_boundary(
    texts: list[str], end: bytes, cuts: list[int], null_usage: bool
) -> None:
    """The client that did not ask for usage sees every byte but that chunk; the router knows the counts."""
    whole, without = stream(texts, end, usage=True, null_usage=null_usage)
    watcher = StreamWatcher(strip_usage=True)
    assert b"".join(feed(watcher, whole, cuts)) == without
    assert watcher.usage == USAGE
    assert watcher.done
    assert not watcher.error


@given(TEXTS, ENDS, CUTS)
def test_nothing_is_changed_for_a_client_that_asked(texts: list[str], end: bytes, cuts: list[int]) -> None:
    """With include_usage of the client's own the stream passes byte for byte, and is still accounted."""
    whole, _ = stream(texts, end, usage=True)
    watcher = StreamWatcher(strip_usage=False)
    assert b"".join(feed(watcher, whole, cuts)) == whole
    assert watcher.usage == USAGE


@given(TEXTS, CUTS)
def test_only_whole_events_are_released(texts: list[str], cuts: list[int]) -> None:
    """Every piece that goes out ends at an event's end, so an error event can follow at any time."""
    whole, _ = stream(texts, b"\n\n", usage=False)
    pieces = feed(StreamWatcher(strip_usage=True), whole, cuts)
    assert all(p.endswith(b"\n\n") for p in pieces if p)


@given(TEXTS, ENDS)
def test_the_text_of_a_stream_is_assembled(texts: list[str], end: bytes) -> None:
    """The log has the assistant's text and finish reason, in any script."""
    whole, _ = stream(texts, end, usage=True)
    assert answer_of_stream(whole) == ("".join(texts), "stop")


def test_a_usage_word_in_the_text_is_text() -> None:
    """An answer about "usage" or "[DONE]" or "error" is not mistaken for the protocol."""
    talk = 'the "usage" field: {"choices": [], "usage": {}} then data: [DONE] or {"error": {}}'
    whole = event(chunk(talk))
    watcher = StreamWatcher(strip_usage=True)
    assert watcher.feed(whole) == whole
    assert (watcher.usage, watcher.done, watcher.error) == (None, False, False)


def test_usage_that_comes_with_choices_stays() -> None:
    """Servers that repeat usage in every chunk keep their chunks; the last count wins."""
    whole = event(chunk("a", usage={"prompt_tokens": 5, "completion_tokens": 1})) + event(
        chunk("b", usage=USAGE)
    )
    watcher = StreamWatcher(strip_usage=True)
    assert watcher.feed(whole) == whole
    assert watcher.usage == USAGE


@pytest.mark.parametrize(
    "data",
    [b'data: {"error": {"message": "x"}}\n\n', b'data:{"error":"x"}\n\n', b"event: error\ndata: {}\n\n"],
)
def test_an_error_event_is_seen(data: bytes) -> None:
    """A stream that turns into an error is known as one, whoever wrote it."""
    watcher = StreamWatcher(strip_usage=True)
    assert watcher.feed(data) == data
    assert watcher.error


def test_our_own_error_event_parses() -> None:
    """The event that ends a broken stream is one event of valid JSON."""
    events = list(split_events(error_event({"error": {"message": "line\nbreak"}})))
    assert [event_json(e) for e in events] == [{"error": {"message": "line\nbreak"}}]


def test_odd_answers_are_none_not_errors() -> None:
    """Answers of an unknown shape are logged without a text instead of breaking the log."""
    assert answer_of({"choices": "x"}) == (None, None)
    assert answer_of({"choices": [{"message": None}]}) == (None, None)
    assert answer_of({"choices": [{"text": "t", "finish_reason": "length"}]}) == ("t", "length")
    assert usage_tokens({"prompt_tokens": True, "completion_tokens": -1}) == (None, None)
    assert usage_tokens({"input_tokens": 2, "output_tokens": 3}) == (2, 3)
