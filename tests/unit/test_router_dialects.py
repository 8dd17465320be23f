"""The streaming APIs: whatever the chunk boundaries and line ends, nothing is changed, torn or missed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.fake_apis import APIS, Behaviour
from serve.router.answer import answer_of, answer_of_stream, model_of, model_of_stream, usage_tokens
from serve.router.errors import error_for
from serve.router.relay import error_bytes
from serve.router.sse import event_json, split_events, watcher_of

ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
CUTS = st.lists(st.integers(0, 20_000), max_size=60)
NAMED = st.sampled_from(["/v1/responses", "/v1/messages"])
ALL = st.sampled_from(list(APIS))
KEYS = st.text() | st.sampled_from(
    [
        "type",
        "delta",
        "choices",
        "message",
        "response",
        "usage",
        "content",
        "output",
        "model",
        "error",
        "index",
    ]
)


def spoken(endpoint: str, b: Behaviour, usage: bool = True) -> bytes:
    """A whole stream of the fake engine."""
    speech = APIS[endpoint].stream({"model": "m", "stream_options": {"include_usage": usage}}, b)
    return b"".join([*speech.opening, *(speech.token(i) for i in range(b.tokens)), *speech.closing()])


def feed(watcher: Any, data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    return [*(watcher.feed(data[a:b]) for a, b in pairwise(edges) if b > a), watcher.rest()]


@given(ALL, st.text(min_size=1), st.integers(1, 5), ENDS, CUTS)
def test_streams_pass_whole_and_are_understood(
    endpoint: str, text: str, tokens: int, end: bytes, cuts: list[int]
) -> None:
    """Any text, any chunk boundary, any line end: the client's bytes are the upstream's without the usage
    chunk it did not ask for; tokens, text, reason and end are known."""
    b = Behaviour(text=text, tokens=tokens)
    sent = spoken(endpoint, b).replace(b"\n", end)
    expected = spoken(endpoint, b, usage=False).replace(b"\n", end)
    watcher = watcher_of(endpoint, strip_usage=True)
    pieces = feed(watcher, sent, cuts)
    assert b"".join(pieces) == expected
    assert usage_tokens(watcher.usage) == (7, tokens)
    assert (watcher.done, watcher.error) == (True, False)
    assert answer_of_stream(expected) == (text * tokens, "stop")
    assert model_of_stream(expected) == "m"


@given(NAMED, st.integers(0, 5), CUTS)
def test_a_stream_that_was_cut_off_is_not_done(endpoint: str, tokens: int, cuts: list[int]) -> None:
    """Without its last event no stream counts as finished, however politely it ended."""
    watcher = watcher_of(endpoint, strip_usage=False)
    feed(watcher, spoken(endpoint, Behaviour(tokens=tokens, unfinished=True)), cuts)
    assert (watcher.done, watcher.error) == (False, False)


@given(NAMED, st.text(), CUTS)
def test_words_of_the_protocol_in_a_text_are_text(endpoint: str, text: str, cuts: list[int]) -> None:
    """An answer that talks about the protocol is not mistaken for it."""
    talk = f'{text} event: error message_stop "usage" "response" data: [DONE] {{"type": "message_stop"}}'
    data = spoken(endpoint, Behaviour(text=talk, tokens=2, unfinished=True))
    watcher = watcher_of(endpoint, strip_usage=True)
    assert b"".join(feed(watcher, data, cuts)) == data
    assert (watcher.done, watcher.error) == (False, False)


@pytest.mark.parametrize("endpoint", list(APIS))
def test_an_upstreams_error_event_is_seen(endpoint: str) -> None:
    """Each API's own error event marks the stream as failed."""
    watcher = watcher_of(endpoint, strip_usage=True)
    event = APIS[endpoint].error_event("no", 500)
    assert watcher.feed(event) == event
    assert watcher.error


def test_a_failed_response_is_an_error_and_its_tokens_count() -> None:
    """`response.failed` ends a stream as a failure; an incomplete one is a proper end."""
    usage = {"input_tokens": 4, "output_tokens": 2}
    for kind, done, error in (("response.failed", False, True), ("response.incomplete", True, False)):
        watcher = watcher_of("/v1/responses", strip_usage=False)
        watcher.feed(b"data: " + orjson.dumps({"type": kind, "response": {"usage": usage}}) + b"\n\n")
        assert (watcher.done, watcher.error, watcher.usage) == (done, error, usage)


def test_our_error_events_have_the_shape_of_their_api() -> None:
    """What ends a broken stream is one event that the API's own client understands; numbering goes on."""
    said = {}
    for endpoint in APIS:
        watcher = watcher_of(endpoint, strip_usage=True)
        speech = APIS[endpoint].stream({"model": "m"}, Behaviour())
        watcher.feed(b"".join([*speech.opening, speech.token(0)]))
        (event,) = split_events(watcher.failure("it\nbroke", "broken_stream"))
        said[endpoint] = (event.startswith(b"event: error\n"), event_json(event))
    openai = {"message": "it\nbroke", "type": "upstream_error", "param": None, "code": "broken_stream"}
    assert said["/v1/chat/completions"] == said["/v1/completions"] == (False, {"error": openai})
    assert said["/v1/messages"] == (
        True,
        {"type": "error", "error": {"type": "api_error", "message": "it\nbroke"}},
    )
    named, body = said["/v1/responses"]
    assert named
    assert (body["type"], body["message"], body["code"]) == ("error", "it\nbroke", "broken_stream")
    assert body["sequence_number"] == 5
    assert body["error"] == openai


def test_whole_answers_of_every_api_are_understood() -> None:
    """Text, reason, model and tokens, prompt tokens from the cache included."""
    b = Behaviour(tokens=3)
    for endpoint, api in APIS.items():
        body = api.whole({"model": "m"}, b)
        assert answer_of(body) == ("tick " * 3, "stop"), endpoint
        assert usage_tokens(body["usage"]) == (7, 3), endpoint
        assert model_of(body) == "m", endpoint
    tools = {"tools": [{"type": "function", "name": "f", "function": {"name": "f"}}]}
    for endpoint in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        assert answer_of(APIS[endpoint].whole(tools, Behaviour(tool_calls=1))) == (None, "tool_calls"), (
            endpoint
        )
    incomplete = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": []}
    assert answer_of({"object": "response", **incomplete}) == (None, "length")


@given(
    st.recursive(st.none() | st.text() | st.integers(-9, 9), lambda c: st.lists(c) | st.dictionaries(KEYS, c))
)
def test_odd_answers_never_break_the_log(body: Any) -> None:
    """Whatever JSON an upstream answers with, reading it raises nothing."""
    event = b"data: " + orjson.dumps(body) + b"\n\n"
    answer_of_stream(event)
    model_of_stream(event)
    for kind in ({"type": "message"}, {"object": "response"}, {}):
        if isinstance(body, dict):
            answer_of(body | kind)
    for endpoint in APIS:
        assert watcher_of(endpoint, strip_usage=False).feed(event) == event


def test_errors_have_the_shape_of_the_api() -> None:
    """Anthropic's clients get Anthropic's errors, whoever wrote them; all others OpenAI's."""
    ours = {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": None, "code": None}
    }
    theirs = {"type": "error", "error": {"type": "not_found_error", "message": "no such model"}}
    assert error_for("/v1/messages", 404, ours) == theirs
    assert error_for("/v1/messages/count_tokens", 404, ours) == theirs
    assert error_for("/v1/messages", 404, theirs) is theirs
    assert error_for("/v1/responses", 404, ours) is ours
    assert error_for("/v1/messages", 502, ours)["error"]["type"] == "api_error"
    body = orjson.dumps(ours)
    assert error_bytes("/v1/chat/completions", 404, body) is body
    assert orjson.loads(error_bytes("/v1/messages", 404, body)) == theirs
    assert orjson.loads(error_bytes("/v1/messages", 400, b"not json"))["error"]["message"] == "not json"
