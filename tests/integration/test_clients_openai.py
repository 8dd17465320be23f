"""What the official OpenAI client for Python can ask for, through a real router before a fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.integration.router_rig import Fake, Server, World, get, openai_client, total, wait_until

pytestmark = pytest.mark.integration
TEXT = "tick " * 8
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}}
    for n in ("weather", "time")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("openai"))
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
def client(world: World) -> openai.OpenAI:
    return openai_client(world.routers[0])


def sent(fake: Fake) -> dict[str, Any]:
    """The body that the engine got last."""
    return dict(fake.status()["last"]["body"])


def tokens(router: Server) -> tuple[float, float]:
    scrape = get(f"{router.url}/metrics")[1]
    return total(scrape, "stillhouse_prompt_tokens_total"), total(
        scrape, "stillhouse_completion_tokens_total"
    )


def row(world: World, request_id: str) -> dict[str, Any]:
    """The log row of a request."""
    wait_until("the row is written", lambda: any(r["request_id"] == request_id for r in world.rows()))
    return next(r for r in world.rows() if r["request_id"] == request_id)


def test_parallel_tool_calls(fake: Fake, client: openai.OpenAI) -> None:
    """Tools go in whole, and all calls come out, from a whole answer and from a stream."""
    fake.control(tool_calls=2)
    choice: Any = {"type": "function", "function": {"name": "time"}}
    asked: dict[str, Any] = {"model": "support", "messages": MESSAGES, "tools": TOOLS}
    whole = client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=True)
    calls = whole.choices[0].message.tool_calls or []
    assert [(c.id, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("call_0", "weather", {"city": "Zürich"}),
        ("call_1", "time", {"city": "Zürich"}),
    ]
    assert whole.choices[0].finish_reason == "tool_calls"
    body = sent(fake)
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == (TOOLS, choice, True)
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    found = [(c.id, c.function.name, c.function.arguments) for c in streamed.message.tool_calls or []]
    assert found == [(c.id, c.function.name, c.function.arguments) for c in calls]


def test_structured_outputs(fake: Fake, client: openai.OpenAI) -> None:
    """A schema reaches the engine as the client wrote it; the answer parses, streamed too."""

    class Weather(BaseModel):
        city: str
        sky: str

    asked: dict[str, Any] = {"model": "support", "messages": MESSAGES, "response_format": Weather}
    whole = client.chat.completions.parse(**asked)
    assert whole.choices[0].message.parsed == Weather(city="tick ", sky="tick ")
    wanted = sent(fake)["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["schema"]["required"] == ["city", "sky"]
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Weather(city="tick ", sky="tick ")


def test_sampling_fields_and_every_choice(fake: Fake, client: openai.OpenAI) -> None:
    """logprobs, n, seed and stop work as the engine has them, whole and streamed."""
    asked: dict[str, Any] = {
        "model": "support", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "n": 3, "seed": 11,
        "stop": ["a", "b"], "logit_bias": {"7": -100}, "temperature": 0.25, "max_completion_tokens": 5,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    assert [c.message.content for c in whole.choices] == [TEXT] * 3
    assert whole.system_fingerprint == "seed-11"
    assert whole.choices[0].logprobs is not None
    assert [len(t.top_logprobs) for t in whole.choices[0].logprobs.content or []] == [2] * 8
    assert {k: v for k, v in sent(fake).items() if k != "model"} == {
        k: v for k, v in asked.items() if k != "model"
    }
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT] * 3


def test_vision_parts_and_unknown_fields_pass_whole(fake: Fake, client: openai.OpenAI) -> None:
    """What the router does not understand is the engine's business, to the last field."""
    picture = "data:image/png;base64," + "iVBORw0KGgo=" * 500
    messages: list[Any] = [
        {"role": "system", "content": "see"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is it? 這是什麼 🖼"},
                {"type": "image_url", "image_url": {"url": picture, "detail": "low"}, "extra": [None, {}]},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            ],
        },
    ]
    extra = {"guided_regex": "a+", "chat_template_kwargs": {"thinking": False}, "x": [1.5, None, {"y": []}]}
    client.chat.completions.create(model="support", messages=messages, extra_body=extra)
    body = sent(fake)
    assert body["messages"] == messages
    assert {name: body[name] for name in extra} == extra


def test_stream_options_are_the_clients(fake: Fake, client: openai.OpenAI) -> None:
    """Whoever asks for usage gets it; whoever does not, or says no, never sees the router's own question."""
    asked: dict[str, Any] = {"model": "support", "messages": MESSAGES, "stream": True}
    for options, seen in (({"include_usage": True}, [8]), ({"include_usage": False}, []), (None, [])):
        more = {} if options is None else {"stream_options": options}
        chunks = list(client.chat.completions.create(**asked, **more))
        assert [c.usage.completion_tokens for c in chunks if c.usage] == seen
        assert sent(fake)["stream_options"] == {"include_usage": True}
    chunks = list(client.completions.create(model="support", prompt="hi", stream=True))
    assert "".join(c.choices[0].text for c in chunks) == TEXT
    assert all(c.usage is None for c in chunks)


def test_responses_are_accounted_and_logged(world: World, client: openai.OpenAI) -> None:
    """The Responses API, whole and streamed: right answer, right tokens in metrics, all of it in the log."""
    before = tokens(world.routers[0])
    headers = {"x-request-id": "resp-whole"}
    whole = client.responses.create(model="support", input="hi", instructions="be", extra_headers=headers)
    assert (whole.output_text, whole.usage and whole.usage.output_tokens) == (TEXT, 8)
    assert whole.instructions == "be"
    stream = client.responses.create(
        model="support", input="hi", stream=True, extra_headers={"x-request-id": "resp-stream"}
    )
    events = list(stream)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
    for request_id, streamed in (("resp-whole", False), ("resp-stream", True)):
        found = row(world, request_id)
        assert (found["prompt_tokens"], found["completion_tokens"], found["outcome"]) == (7, 8, "ok")
        assert (found["response_text"], found["finish_reason"]) == (TEXT, "stop")
        assert (found["ttft_s"] is not None) == streamed
        assert (found["response"] is None) == streamed
    after = tokens(world.routers[0])
    assert (after[0] - before[0], after[1] - before[1]) == (14, 16)


def test_responses_with_tools(fake: Fake, client: openai.OpenAI) -> None:
    """Function calls of the Responses API come through."""
    fake.control(tool_calls=1)
    tools: list[Any] = [
        {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
    ]
    (call,) = client.responses.create(model="support", input="weather?", tools=tools).output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Zürich"})
    assert sent(fake)["tools"] == tools


@pytest.mark.parametrize("broken", [{"cut_after": 3}, {"unfinished": True}, {"error_after": 3}])
def test_a_broken_response_stream_raises(
    world: World, fake: Fake, client: openai.OpenAI, broken: Any
) -> None:
    """A stream without its last event is an error to the client and a broken stream to the log."""
    fake.control(**broken, tpot_s=0.02)  # in one piece it would break before anything was sent
    request_id = f"resp-{next(iter(broken))}"
    headers = {"x-request-id": request_id}
    stream = client.responses.create(model="support", input="x", stream=True, extra_headers=headers)
    seen: list[Any] = []
    try:
        seen.extend(stream)
    except openai.APIError as err:
        seen.append(err)
    last = seen[-1]
    if "error_after" in broken:  # the upstream's own event, passed on as it is
        assert (last.type, last.message) == ("error", "scripted error")
    else:
        assert isinstance(last, openai.APIError)
        assert "broke off" in str(last)
    found = row(world, request_id)
    assert found["outcome"] == "broken_stream"
    assert found["response_text"] == "tick " * (8 if "unfinished" in broken else 3)


def test_models_and_embeddings(client: openai.OpenAI) -> None:
    """The list of models is the list of routes; embeddings work with the client's own default encoding."""
    assert [m.id for m in client.models.list()] == ["support"]
    assert client.models.retrieve("support").owned_by == "stillhouse"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    found = client.embeddings.create(model="support", input=["a", "b"])
    assert (found.data[0].embedding, found.usage.prompt_tokens) == ([0.0, 1.0], 7)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_errors_raise_the_right_class(
    fake: Fake, client: openai.OpenAI, status: int, kind: type[openai.APIStatusError]
) -> None:
    """An upstream's status and words become the exception that the client documents, on every endpoint."""
    fake.control(status=status)
    calls: list[Any] = [
        lambda: client.chat.completions.create(model="support", messages=MESSAGES),
        lambda: client.chat.completions.create(model="support", messages=MESSAGES, stream=True),
        lambda: client.completions.create(model="support", prompt="x"),
        lambda: client.responses.create(model="support", input="x", stream=True),
    ]
    for call in calls:
        with pytest.raises(kind, match=f"scripted {status}") as raised:
            call()
        assert raised.value.status_code == status
        assert raised.value.request_id is not None


async def test_the_asynchronous_client(world: World) -> None:
    """The asynchronous client streams the same."""
    client = openai.AsyncOpenAI(base_url=f"{world.routers[0].url}/v1", api_key="none", max_retries=0)
    stream = await client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == TEXT
    await client.close()
