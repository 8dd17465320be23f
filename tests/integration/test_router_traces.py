"""OpenTelemetry traces: real exports of a real router process, received over HTTP and decoded."""

from __future__ import annotations

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anthropic
import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from contracts.routes import RouteLimits, RouteSettings
from serve.state.keys import KeyState, new_key
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from tests.integration.router_rig import Server, World, get, openai_client, post, wait_until

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
MESSAGES: list[Any] = [{"role": "user", "content": "a secret"}]


class Collector:
    """An OTLP/HTTP receiver that keeps everything."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        self.raw = b""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.raw += body
                outer.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        return [
            span
            for _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def traced(world: World, collector: Collector, **tracing: Any) -> Server:
    return world.router(log=None, tracing={"endpoint": collector.url, **tracing})


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes as Python values."""
    found: dict[str, Any] = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def by_endpoint(collector: Collector) -> dict[str, Span]:
    return {str(attributes(span)["url.path"]): span for span in collector.spans()}


def test_every_api_has_its_span(world: World, collector: Collector) -> None:
    """GenAI attributes, tokens and first token of each API; no word of what was said in it."""
    for version in (1, 2, 3):
        world.split(version)
    router = traced(world, collector)
    client = openai_client(router)
    begun = time.time_ns()
    list(
        client.chat.completions.create(
            model="support", messages=MESSAGES, stream=True, temperature=0.5, seed=2**63
        )
    )
    client.completions.create(model="support", prompt="a secret")
    list(client.responses.create(model="support", input="a secret", stream=True))
    client.embeddings.create(model="support", input="a secret")
    claude = anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0)
    claude.messages.create(model="support", messages=MESSAGES, max_tokens=9)
    router.stop()
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    spans = by_endpoint(collector)
    names = {path: (span.name, attributes(span)["gen_ai.operation.name"]) for path, span in spans.items()}
    assert names == {
        CHAT: ("chat support", "chat"),
        "/v1/completions": ("text_completion support", "text_completion"),
        "/v1/responses": ("chat support", "chat"),
        "/v1/embeddings": ("embeddings support", "embeddings"),
        "/v1/messages": ("chat support", "chat"),
    }
    chat = attributes(spans[CHAT])
    request_id = chat.pop("stillhouse.request_id")
    assert request_id.startswith("req-")
    assert chat == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "support",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "big",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 8,
        "http.response.status_code": 200,
        "url.path": CHAT,
        "stillhouse.route": "support",
        "stillhouse.arm": "stable",
        "stillhouse.served_arm": "stable",
        "stillhouse.upstream": "teacher",
        "stillhouse.split_version": 3,
    }
    for path in ("/v1/responses", "/v1/messages"):
        got = attributes(spans[path])
        assert (got["gen_ai.usage.input_tokens"], got["gen_ai.usage.output_tokens"]) == (7, 8)
        assert (got["gen_ai.response.finish_reasons"], got["gen_ai.response.model"]) == (["stop"], "big")
    span = spans[CHAT]
    assert begun <= span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano
    assert [e.name for e in span.events] == ["first token"]
    assert not spans["/v1/completions"].events
    assert b"secret" not in collector.raw
    assert b"tick" not in collector.raw
    resource = collector.requests[0][1].resource_spans[0].resource
    assert {a.key: a.value.string_value for a in resource.attributes}["service.name"] == "stillhouse-router"


def test_the_clients_trace_goes_on_through_the_router(world: World, collector: Collector) -> None:
    """Client → our span → upstream: one trace, each the parent of the next; `tracestate` stays."""
    world.split(1)
    router = traced(world, collector)
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    post(f"{router.url}{CHAT}", {"model": "support", "messages": []}, **sent)
    seen = world.stable.status()["last"]["headers"]
    post(f"{router.url}{CHAT}", {"model": "support", "messages": []}, traceparent=f"00-{TRACE}-{PARENT}-00")
    unsampled = world.stable.status()["last"]["headers"]["traceparent"]
    router.stop()
    (span,) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert seen["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert seen["tracestate"] == "vendor=1"
    assert re.fullmatch(f"00-{TRACE}-(?!{PARENT})[0-9a-f]{{16}}-00", unsampled)


@pytest.mark.parametrize(
    "wrong",
    ["", "x", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"],
)
def test_a_malformed_parent_begins_a_new_trace(world: World, collector: Collector, wrong: str) -> None:
    """What is no traceparent is no parent, and is not passed on."""
    world.split(1)
    router = traced(world, collector)
    post(f"{router.url}{CHAT}", {"model": "support", "messages": []}, traceparent=wrong)
    seen = world.stable.status()["last"]["headers"]["traceparent"]
    router.stop()
    (span,) = collector.spans()
    assert span.parent_span_id == b""
    assert seen == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    assert span.trace_id.hex() != TRACE


def test_failures_are_errors_and_fallbacks_are_told(world: World, collector: Collector) -> None:
    """A saved request names the failing arm without being an error; one that broke is an error."""
    world.canary.control(status=500)
    world.split(1, weight=1.0)
    router = traced(world, collector)
    assert openai_client(router).chat.completions.create(model="support", messages=MESSAGES).choices
    world.stable.control(cut_after=2, tpot_s=0.02)
    with pytest.raises(openai.APIError):
        list(openai_client(router).chat.completions.create(model="support", messages=MESSAGES, stream=True))
    world.stable.control(status=400)
    with pytest.raises(openai.BadRequestError):
        openai_client(router).chat.completions.create(
            model="support", messages=MESSAGES, extra_headers={"x-stillhouse-arm": "stable"}
        )
    router.stop()
    saved, broken, bad = collector.spans()
    got = attributes(saved)
    assert (got["stillhouse.arm"], got["stillhouse.served_arm"]) == ("canary", "stable")
    assert (got["error.type"], saved.status.code) == ("upstream_error", Status.STATUS_CODE_UNSET)
    assert attributes(broken)["error.type"] in ("upstream_error", "broken_stream")
    assert (attributes(bad)["error.type"], attributes(bad)["http.response.status_code"]) == ("400", 400)
    assert bad.status.code == Status.STATUS_CODE_UNSET


def test_a_refused_request_has_a_span_too(world: World, collector: Collector) -> None:
    """Of the client's trace, with its status and our code for it; nothing of its body and no key."""
    world.split(1)
    router = world.router(log=None, keys=True, tracing={"endpoint": collector.url})
    wait_until("it knows the keys", lambda: get(f"{router.url}/ready")[0] == 200)
    key, secret = new_key("ci", requests_per_minute=2)
    KeyState(open_state(world.state_url)).create_key(key)
    bearer = {"Authorization": f"Bearer {secret}"}
    models = urllib.request.Request(f"{router.url}/v1/models", headers=bearer)
    wait_until("the key is known", lambda: _status(models) == 200)
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    post(f"{router.url}{CHAT}", {"model": "a secret"}, Authorization="Bearer sk-sh-wrong", **parent)
    post(f"{router.url}{CHAT}", {"model": "a secret"}, **bearer)
    post(f"{router.url}/v1/messages", {"model": 7, "messages": "a secret"}, x_request_id="mine", **bearer)
    post(f"{router.url}{CHAT}", {"model": "support"}, **bearer)
    router.stop()
    spans = collector.spans()
    got = [attributes(s) for s in spans]
    assert [(g["http.response.status_code"], g["error.type"]) for g in got] == [
        (401, "invalid_api_key"), (404, "model_not_found"), (400, "400"), (429, "rate_limit_exceeded"),
    ]  # fmt: skip
    assert [s.name for s in spans] == ["chat"] * 4
    assert [g["url.path"] for g in got] == [CHAT, CHAT, "/v1/messages", CHAT]
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (TRACE, PARENT)
    assert got[2]["stillhouse.request_id"] == "mine"
    assert {s.status.code for s in spans} == {Status.STATUS_CODE_UNSET}
    assert all(0 < s.start_time_unix_nano <= s.end_time_unix_nano for s in spans)
    assert b"secret" not in collector.raw
    assert b"sk-sh" not in collector.raw


def _status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as err:
        return err.code


def test_a_full_route_is_a_span_of_that_route(world: World, collector: Collector) -> None:
    """Waiting in vain is where a request's time went, so the span is as long as the wait."""
    world.split(1)
    limits = RouteLimits(max_in_flight=1, max_queued=1, queue_s=0.5)
    SettingsState(open_state(world.state_url)).put_settings(
        RouteSettings(route="support", version=1, limits=limits)
    )
    world.stable.control(ttft_s=2.0)
    router = traced(world, collector)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(post, f"{router.url}{CHAT}", {"model": "support", "messages": []}) for _ in "ab"]
        assert sorted(f.result()[0] for f in asked) == [200, 429]
    router.stop()
    refused = next(s for s in collector.spans() if attributes(s)["http.response.status_code"] == 429)
    assert attributes(refused)["stillhouse.route"] == "support"
    assert refused.end_time_unix_nano - refused.start_time_unix_nano >= 4e8


def test_nothing_is_traced_that_was_not_asked_for(world: World, collector: Collector) -> None:
    """With a sample of 0 nothing is exported; without tracing the client's header is passed on as it is."""
    world.split(1)
    router = traced(world, collector, sample=0.0)
    post(f"{router.url}{CHAT}", {"model": "support", "messages": []})
    assert world.stable.status()["last"]["headers"]["traceparent"].endswith("-00")
    router.stop()
    assert collector.spans() == []
    plain = world.router(log=None)
    post(f"{plain.url}{CHAT}", {"model": "support", "messages": []}, traceparent="as-it-is")
    assert world.stable.status()["last"]["headers"]["traceparent"] == "as-it-is"


def test_a_collector_that_is_away_costs_requests_nothing(world: World, collector: Collector) -> None:
    """Requests are answered as ever while nobody takes the spans, and the router still stops when told to."""
    collector.close()
    world.split(1)
    router = traced(world, collector)
    client = openai_client(router)
    for _ in range(20):
        assert client.chat.completions.create(model="support", messages=MESSAGES).usage is not None
    router.stop()
