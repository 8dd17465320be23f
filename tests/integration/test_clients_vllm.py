"""The official clients through the router before a real vLLM engine: what vLLM has, the router passes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import openai
import pytest

from contracts.traffic import Split, Upstream
from demo.world.cases import case
from serve.engine.config import EngineOptions
from serve.engine.process import VllmProcess
from serve.router.config import RouterConfig
from serve.router.openapi import ROUTED
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from tests.clients.node_rig import run_node
from tests.integration.router_rig import Server, get, openai_client, post, total, wait_until

pytestmark = pytest.mark.integration
TEACHER = Path(__file__).resolve().parents[2] / "demo" / "models" / "teacher"
ASKED = case("live", 7)
MESSAGES: list[Any] = [{"role": "user", "content": ASKED.text}]
EXACT: dict[str, Any] = {"model": "support", "temperature": 0}


NOT_ROUTED = {
    "/generative_scoring", "/inference/v1/generate", "/invocations", "/is_scaling_elastic_ep", "/ping",
    "/scale_elastic_ep", "/v1/chat/completions/batch", "/v1/chat/completions/derender",
    "/v1/chat/completions/render", "/v1/completions/derender", "/v1/completions/render",
    "/v1/messages/render", "/v1/responses/{response_id}/cancel",
}  # fmt: skip
"""Operators' doors, vLLM's parts apart, and what only the replica that holds a stored response can do."""


class Served(NamedTuple):
    """A real engine behind a real router."""

    router: Server
    engine: VllmProcess
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "log").glob("*.jsonl"))
        return [json.loads(line) for f in files for line in f.read_text().splitlines()]

    def row(self, request_id: str) -> dict[str, Any]:
        wait_until("the row is written", lambda: any(r["request_id"] == request_id for r in self.rows()))
        return next(r for r in self.rows() if r["request_id"] == request_id)

    def tokens(self) -> tuple[float, float]:
        """(prompt, completion) tokens that the router counted."""
        scrape = get(f"{self.router.url}/metrics")[1]
        prompt, completion = "stillhouse_prompt_tokens_total", "stillhouse_completion_tokens_total"
        return total(scrape, prompt), total(scrape, completion)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # vLLM would compile itself at every start
    options = EngineOptions(
        dtype="bfloat16", max_model_len=512, kv_cache_bytes=2**27, enforce_eager=True,
        extra_args=("--enable-prompt-tokens-details",),
    )  # fmt: skip
    engine = VllmProcess(str(TEACHER), "teacher", options, "127.0.0.1", folder / "engine.log")
    state = f"sqlite:///{folder}/state.db"
    router: Server | None = None
    try:
        engine.start()
        engine.wait_ready()
        stable = Upstream(name="teacher", model="teacher", url=engine.url)
        TrafficState(open_state(state)).put_split(Split(route="support", version=1, salt="s", stable=stable))
        config = RouterConfig.model_validate({"state_url": state, "log": {"dir": str(folder / "log")}})
        (folder / "router.json").write_text(config.model_dump_json())
        router = Server(
            "-m", "serve.router", "--config", str(folder / "router.json"), "--port", "0", "--workers", "1"
        )
        yield Served(router, engine, folder)
    finally:
        if router is not None:
            router.stop()
        engine.stop()


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai_client(served.router)


@pytest.fixture
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.router.url, api_key="none", max_retries=0, timeout=60)


def test_the_doors_of_vllm_are_known(served: Served) -> None:
    """What this vLLM serves by POST is routed or deliberately not: a new version's new door is noticed."""
    described = json.loads(get(f"{served.engine.url}/openapi.json")[1])["paths"]
    doors = {path for path, how in described.items() if "post" in how}
    assert sorted(doors - ROUTED) == sorted(NOT_ROUTED)


def test_chat_is_the_engines_own_answer(served: Served, client: openai.OpenAI) -> None:
    """Through the router, whole and streamed, comes what the engine says when it is asked itself."""
    direct = openai.OpenAI(base_url=f"{served.engine.url}/v1", api_key="none", max_retries=0)
    expected = direct.chat.completions.create(
        **EXACT | {"model": "teacher"}, messages=MESSAGES, max_tokens=96
    )
    before = served.tokens()
    whole = client.chat.completions.create(**EXACT, messages=MESSAGES, max_tokens=96)
    stream = client.chat.completions.create(
        **EXACT, messages=MESSAGES, max_tokens=96, stream=True, extra_headers={"x-request-id": "chat-stream"}
    )
    chunks = list(stream)
    text = expected.choices[0].message.content
    assert text
    assert whole.choices[0].message.content == text
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert all(c.usage is None for c in chunks)
    assert expected.usage is not None
    used = (expected.usage.prompt_tokens, expected.usage.completion_tokens)
    after = served.tokens()
    assert (after[0] - before[0], after[1] - before[1]) == (2 * used[0], 2 * used[1])
    row = served.row("chat-stream")
    assert (row["response_text"], row["prompt_tokens"], row["completion_tokens"]) == (text, *used)


def test_sampling_fields_work(client: openai.OpenAI) -> None:
    """Choices, seeds, logprobs, stop and vLLM's own fields do what they do without a router."""
    asked: dict[str, Any] = {"model": "support", "messages": MESSAGES, "max_tokens": 6, "seed": 5}
    two = client.chat.completions.create(**asked, n=2, temperature=1.0, logprobs=True, top_logprobs=3)
    again = client.chat.completions.create(**asked, n=2, temperature=1.0)
    assert [c.message.content for c in two.choices] == [c.message.content for c in again.choices]
    assert two.choices[0].logprobs is not None
    assert {len(t.top_logprobs) for t in two.choices[0].logprobs.content or []} == {3}
    whole = client.chat.completions.create(**EXACT, messages=MESSAGES, max_tokens=96)
    text = whole.choices[0].message.content or ""
    stop = text[4:8]
    cut = client.chat.completions.create(**EXACT, messages=MESSAGES, max_tokens=96, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    exact = client.chat.completions.create(
        **EXACT, messages=MESSAGES, max_tokens=9, extra_body={"min_tokens": 9, "ignore_eos": True}
    )
    assert exact.usage is not None
    assert exact.usage.completion_tokens == 9


def test_structured_outputs_are_enforced(client: openai.OpenAI) -> None:
    """A JSON schema reaches the engine's grammar: a model that never wrote such JSON writes it."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {"enum": ["yes", "no"]}}}
    answer = client.chat.completions.create(**EXACT, messages=MESSAGES, max_tokens=40, response_format=form)
    assert json.loads(answer.choices[0].message.content or "") in ("yes", "no")


def test_completions_and_tokenize(served: Served, client: openai.OpenAI) -> None:
    """The plain completion and the tokenizer's endpoints."""
    prompt = f"<|user|>{ASKED.text}<|assistant|>"
    done = client.completions.create(**EXACT, prompt=prompt, max_tokens=5)
    streamed = client.completions.create(**EXACT, prompt=prompt, max_tokens=5, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == done.choices[0].text != ""
    url = served.router.url
    status, tokens, _ = post(f"{url}/tokenize", {"model": "support", "prompt": "hello"})
    assert (status, tokens["count"]) == (200, len(tokens["tokens"]))
    status, back, _ = post(f"{url}/detokenize", {"model": "support", "tokens": tokens["tokens"]})
    assert (status, back["prompt"]) == (200, "hello")


def test_responses_whole_and_streamed(served: Served, client: openai.OpenAI) -> None:
    """vLLM's Responses API: the same text both ways, accounted and logged."""
    before = served.tokens()
    asked: dict[str, Any] = {**EXACT, "input": MESSAGES, "max_output_tokens": 96}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True, extra_headers={"x-request-id": "resp"}))
    assert whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.completed"
    assert whole.usage is not None
    used = (whole.usage.input_tokens, whole.usage.output_tokens)
    after = served.tokens()
    assert (after[0] - before[0], after[1] - before[1]) == (2 * used[0], 2 * used[1])
    row = served.row("resp")
    assert (row["response_text"], row["outcome"], row["finish_reason"]) == (whole.output_text, "ok", "stop")
    assert (row["prompt_tokens"], row["completion_tokens"]) == used


def test_messages_whole_and_streamed(served: Served, claude: anthropic.Anthropic) -> None:
    """vLLM's Messages API: the same text both ways; cached prompt tokens are prompt tokens to us."""
    said: dict[str, Any] = {"model": "support", "messages": MESSAGES, "max_tokens": 96}
    said["extra_body"] = {"temperature": 0}
    chat = openai_client(served.router).chat.completions.create(**EXACT, messages=MESSAGES, max_tokens=96)
    assert chat.usage is not None
    before = served.tokens()
    whole = claude.messages.create(**said)
    with claude.messages.stream(**said, extra_headers={"x-request-id": "msg"}) as stream:
        final = stream.get_final_message()
    text = chat.choices[0].message.content
    assert whole.content[0].text == final.content[0].text == text
    assert whole.stop_reason == final.stop_reason == "end_turn"
    used = (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    after = served.tokens()
    assert (after[0] - before[0], after[1] - before[1]) == (2 * used[0], 2 * used[1])
    row = served.row("msg")
    assert (row["response_text"], row["finish_reason"], row["outcome"]) == (text, "stop", "ok")
    assert (row["prompt_tokens"], row["completion_tokens"]) == used
    counted = claude.messages.count_tokens(model="support", messages=MESSAGES)
    assert counted.input_tokens == used[0]


def test_the_engines_refusals_raise_the_right_class(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    """vLLM's own errors, in each API's shape, with its words."""
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**EXACT, messages=MESSAGES, max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.responses.create(model="support", input="x", temperature=-3)
    wrong: Any = [{"role": "nobody", "content": "x"}]
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(model="support", messages=wrong, max_tokens=9)
    body: Any = raised.value.body
    assert body["type"] == "error"
    assert "role" in body["error"]["message"]


def test_the_node_client(served: Served) -> None:
    """The client for Node sees the same engine."""
    names = "chat_stream,completion,responses,responses_stream,models,errors"
    got = run_node("openai.cjs", BASE_URL=f"{served.router.url}/v1", SCENARIOS=names)
    assert got["chat_stream"]["usage"]["completion_tokens"] > 0
    assert got["responses"]["text"] == got["responses_stream"]["text"] != ""
    assert got["responses_stream"]["last"] == "response.completed"
    assert got["models"] == {"names": ["support"], "one": "support"}
    assert got["errors"]["unknown"]["kind"] == "NotFoundError"
