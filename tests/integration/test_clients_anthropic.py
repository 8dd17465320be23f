"""The official Anthropic client through a real router process in front of a fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.integration.router_rig import Fake, Server, World, get, post, total, wait_until

pytestmark = pytest.mark.integration
TEXT = "tick " * 8
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("anthropic"))
    made.split(1)
    made.router()
    yield made
    made.close()


@pytest.fixture
def fake(world: World) -> Iterator[Fake]:
    """The engine behind the route; as it was after every test."""
    yield world.stable
    world.stable.control(tool_calls=0, tpot_s=0.0, status=200, cut_after=-1, error_after=-1, unfinished=False)


@pytest.fixture
def client(world: World) -> anthropic.Anthropic:
    return client_of(world.routers[0])


def client_of(router: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0, timeout=30)


def row(world: World, request_id: str) -> dict[str, Any]:
    """The log row of a request."""
    wait_until("the row is written", lambda: any(r["request_id"] == request_id for r in world.rows()))
    return next(r for r in world.rows() if r["request_id"] == request_id)


def test_whole_and_streamed_messages_are_accounted_and_logged(
    world: World, client: anthropic.Anthropic
) -> None:
    """The same answer both ways; tokens, those from the prompt cache included, in metrics and log."""
    scrape = f"{world.routers[0].url}/metrics"
    before = get(scrape)[1]
    asked: dict[str, Any] = {"model": "support", "max_tokens": 20, "messages": MESSAGES, "system": "be"}
    whole = client.messages.create(**asked, extra_headers={"x-request-id": "msg-whole"})
    with client.messages.stream(**asked, extra_headers={"x-request-id": "msg-stream"}) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert texts == ["tick "] * 8
    assert final.content[0].text == whole.content[0].text == TEXT
    assert final.stop_reason == whole.stop_reason == "end_turn"
    for answer in (whole, final):
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 8)
    seen = world.stable.status()["last"]
    assert (seen["path"], seen["body"]["system"], seen["body"]["model"]) == ("/v1/messages", "be", "big")
    assert seen["headers"]["anthropic-version"]
    assert "x-api-key" not in seen["headers"]
    for request_id in ("msg-whole", "msg-stream"):
        found = row(world, request_id)
        assert (found["prompt_tokens"], found["completion_tokens"], found["outcome"]) == (7, 8, "ok")
        assert (found["response_text"], found["finish_reason"]) == (TEXT, "stop")
    after = get(scrape)[1]
    assert (
        total(after, "stillhouse_prompt_tokens_total") - total(before, "stillhouse_prompt_tokens_total") == 14
    )
    counted = "stillhouse_requests_total"
    assert total(after, counted, endpoint="/v1/messages", outcome="ok") == 2


def test_tools_and_pictures_pass_whole(fake: Fake, client: anthropic.Anthropic) -> None:
    """Tool definitions and content blocks reach the engine as written; uses come back."""
    fake.control(tool_calls=2)
    tools: list[Any] = [{"name": n, "input_schema": {"type": "object", "properties": {}}} for n in ("a", "b")]
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}
    ]
    answer = client.messages.create(model="support", max_tokens=9, messages=messages, tools=tools)
    assert [(b.type, b.name, b.input) for b in answer.content if b.type == "tool_use"] == [
        ("tool_use", "a", {"city": "Zürich"}),
        ("tool_use", "b", {"city": "Zürich"}),
    ]
    body = fake.status()["last"]["body"]
    assert (body["messages"], body["tools"]) == (messages, tools)


def test_tokens_are_counted_without_generating(client: anthropic.Anthropic) -> None:
    """`count_tokens` is passed on too."""
    assert client.messages.count_tokens(model="support", messages=MESSAGES).input_tokens == 7


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
    ],
)
def test_errors_raise_the_right_class(
    fake: Fake, client: anthropic.Anthropic, status: int, kind: type[anthropic.APIStatusError]
) -> None:
    """An upstream's status and words become the exception that the client documents, whole and streamed."""
    fake.control(status=status)
    for stream in (False, True):
        with pytest.raises(kind, match=f"scripted {status}") as raised:
            client.messages.create(model="support", max_tokens=9, messages=MESSAGES, stream=stream)
        body: Any = raised.value.body
        assert (body["type"], set(body["error"])) == ("error", {"type", "message"})


def test_the_routers_own_errors_have_anthropics_shape(world: World, client: anthropic.Anthropic) -> None:
    """Unknown models, malformed requests and dead upstreams are told in the shape the client reads."""
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.messages.create(model="nobody", max_tokens=9, messages=MESSAGES)
    body: Any = raised.value.body
    assert body["error"]["type"] == "not_found_error"
    assert "Routes: support" in body["error"]["message"]
    url = world.routers[0].url
    assert post(f"{url}/v1/messages", {"model": 3})[:2] == (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "'model' is required and must be the name of a route.",
            },
        },
    )
    assert get(f"{url}/v1/messages")[0] == 405
    dead = Fake()
    dead.stop()
    upstream = {"name": "dead", "model": "m", "url": dead.url}
    world.split(1, route="dead", stable=upstream, canary=None, rollout_id=None)
    wait_until("the route is there", lambda: '"dead"' in get(f"{url}/v1/models")[1])
    status, error, _ = post(f"{url}/v1/messages", {"model": "dead", "messages": []})
    assert (status, error["type"], error["error"]["type"]) == (502, "error", "api_error")


@pytest.mark.parametrize("broken", [{"cut_after": 3}, {"unfinished": True}, {"error_after": 3}])
def test_a_broken_stream_raises(world: World, fake: Fake, client: anthropic.Anthropic, broken: Any) -> None:
    """A stream without message_stop raises in the client and is a broken stream to the log."""
    fake.control(**broken, tpot_s=0.02)  # in one piece it would break before anything was sent
    request_id = f"msg-{next(iter(broken))}"
    texts: list[str] = []
    with (
        pytest.raises(anthropic.APIStatusError, match=r"broke off|scripted error"),
        client.messages.stream(
            model="support", max_tokens=9, messages=MESSAGES, extra_headers={"x-request-id": request_id}
        ) as stream,
    ):
        texts.extend(stream.text_stream)
    got = 8 if "unfinished" in broken else 3
    assert texts == ["tick "] * got
    found = row(world, request_id)
    assert (found["outcome"], found["response_text"], found["prompt_tokens"]) == (
        "broken_stream",
        "tick " * got,
        7,
    )
