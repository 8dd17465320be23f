"""Teachers behind a URL: what is asked, what is refused and how it says so, retries, budgets, bounds."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contracts.errors import ConfigError, EngineError
from distill_jobs.keys import key_config
from distill_jobs.teaching.ask import ApiVoice, Question, Sampling
from distill_jobs.teaching.config import EndpointConfig, TeachConfig, place_of
from distill_jobs.teaching.endpoint import retry_after
from distill_jobs.teaching.rows import Row
from distill_jobs.teaching.served import ServedScorer
from tests.unit.fake_openai import FakeOpenAI, serving


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    """A server that has not been asked yet."""
    with serving(FakeOpenAI()) as made:
        yield made


def endpoint(fake: FakeOpenAI, **fields: Any) -> EndpointConfig:
    """The configuration of a fake server; no waits between retries."""
    return EndpointConfig(url=fake.url, model="teacher", **{"backoff_s": 0.0, **fields})


def row(name: str, ids: list[int], prompt_len: int) -> Row:
    """A row whose teacher sees what the student sees."""
    array = np.array(ids, dtype=np.int32)
    return Row(name, array, prompt_len, array)


def scorer(fake: FakeOpenAI, tmp_path: Path, k: int = 2, **fields: Any) -> ServedScorer:
    """A scorer of a fake server."""
    return ServedScorer(endpoint(fake, **fields), TeachConfig(k=k), tmp_path / "spent.json")


def test_the_top_k_of_every_completion_position_comes_in_order(fake: FakeOpenAI, tmp_path: Path) -> None:
    """Position j is what the server says of the tokens before completion token j; the actual token's own
    entry counts only where it is one of the k.
    """
    fake.top = lambda prefix, k: {prefix[-1] + 1: -0.25, len(prefix): -2.0}
    (scored,) = scorer(fake, tmp_path).score([row("a", [7, 8, 9, 50, 51], 3)])
    assert scored["topk_ids"].tolist() == [[10, 3], [51, 4]]
    assert scored["topk_logprobs"].tolist() == [[-0.25, -2.0], [-0.25, -2.0]]
    asked = fake.asked[0]
    assert (asked["prompt"], asked["prompt_logprobs"], asked["max_tokens"]) == ([7, 8, 9, 50, 51], 2, 1)


def test_answers_stay_in_the_order_of_the_rows(fake: FakeOpenAI, tmp_path: Path) -> None:
    """Many in flight, over several chunks."""
    fake.top = lambda prefix, k: {prefix[0]: -0.1, 500: -5.0}
    rows = [row(str(n), [n, 1, 2], 2) for n in range(150)]
    scored = scorer(fake, tmp_path, concurrency=8).score(rows)
    assert [int(s["topk_ids"][0, 0]) for s in scored] == list(range(150))


def test_flight_is_bounded_by_requests_and_by_tokens(fake: FakeOpenAI, tmp_path: Path) -> None:
    """Scoring takes the engine's memory by the token: 3 requests of 10 tokens are more than 25."""
    fake.delay_s = 0.02
    rows = [row(str(n), list(range(10)), 5) for n in range(12)]
    list(scorer(fake, tmp_path, concurrency=3).score(rows))
    assert fake.most_in_flight == 3
    fake.most_in_flight = fake.most_tokens = 0
    list(scorer(fake, tmp_path, concurrency=3, tokens_in_flight=25).score(rows))
    assert (fake.most_in_flight, fake.most_tokens) == (2, 20)
    list(scorer(fake, tmp_path, tokens_in_flight=16).score([row("long", list(range(40)), 5)]))


def test_a_server_with_fewer_log_probabilities_says_what_to_set(fake: FakeOpenAI, tmp_path: Path) -> None:
    """vLLM refuses more than --max-logprobs; others return fewer without a word."""
    with pytest.raises(EngineError, match=r"at most 20 .*--max-logprobs 30"):
        list(scorer(fake, tmp_path, k=30).score([row("a", [1, 2, 3], 2)]))
    fake.top = lambda prefix, k: {1: -0.5, 2: -1.5}
    with pytest.raises(EngineError, match=r"returned 2 log-probabilities.*--max-logprobs 5"):
        list(scorer(fake, tmp_path, k=5).score([row("a", [1, 2, 3], 2)]))


def test_values_that_are_no_log_probabilities_are_refused(fake: FakeOpenAI, tmp_path: Path) -> None:
    """--logprobs-mode raw_logits: above 0, or more than the whole mass."""
    for values in ({1: 3.0, 2: 1.0}, {1: -0.1, 2: -0.2}):
        fake.top = lambda prefix, k, values=values: values  # type: ignore[misc]
        with pytest.raises(EngineError, match="--logprobs-mode raw_logprobs"):
            list(scorer(fake, tmp_path).score([row("a", [1, 2, 3], 2)]))


def test_a_server_without_prompt_logprobs_is_named(tmp_path: Path) -> None:
    """Other servers ignore the field: an answer without it is no teacher's distribution."""

    class Plain(FakeOpenAI):
        def _scored(self, body: dict[str, Any]) -> Any:
            return self._said(body)

    with serving(Plain()) as fake, pytest.raises(EngineError, match="not a vLLM server"):
        list(scorer(fake, tmp_path).score([row("a", [1, 2, 3], 2)]))


def test_failures_are_retried_and_others_not(fake: FakeOpenAI, tmp_path: Path) -> None:
    """429 and 5xx come again; 401 is said at once, with the server's words."""
    fake.failures = [(503, {}), (429, {}), (500, {})]
    assert len(list(scorer(fake, tmp_path).score([row("a", [1, 2, 3], 2)]))) == 1
    assert len(fake.keys) == 4
    fake.failures = [(401, {}), (401, {})]
    with pytest.raises(EngineError, match=r"401.*not now"):
        list(scorer(fake, tmp_path).score([row("a", [1, 2, 3], 2)]))
    assert len(fake.failures) == 1
    fake.failures = [(503, {})] * 3
    with pytest.raises(EngineError, match="503"):
        list(scorer(fake, tmp_path, retries=2).score([row("a", [1, 2, 3], 2)]))
    assert fake.failures == []


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Refused connections are retried, then told."""
    away = EndpointConfig(url="http://127.0.0.1:9", model="m", retries=1, backoff_s=0.0)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9.*model 'm'"):
        list(ServedScorer(away, TeachConfig(k=2), tmp_path / "s").score([row("a", [1, 2, 3], 2)]))


def test_retry_after_is_honoured(fake: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's wish counts where it is longer than our backoff; dates too; nonsense is 0."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("distill_jobs.teaching.endpoint.asyncio.sleep", sleep)
    fake.failures = [(429, {"Retry-After": "7"}), (429, {"Retry-After": "0"})]
    list(scorer(fake, tmp_path, backoff_s=2.0).score([row("a", [1, 2, 3], 2)]))
    waited = [s for s in slept if s > 0]
    assert waited[0] == 7.0
    assert 2.0 <= waited[1] <= 6.0  # the second retry: 2 x 2 x (0.5 to 1.5)
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 <= retry_after(soon) <= 30
    assert [retry_after(v) for v in (None, "soon", "-3", "nan", "1e9")] == [0.0, 0.0, 0.0, 0.0, 600.0]


def test_a_budget_holds_over_every_start_of_a_job(fake: FakeOpenAI, tmp_path: Path) -> None:
    """3 requests in all: the second start has one left, and says what to raise when it is gone."""
    list(scorer(fake, tmp_path, max_requests=3).score([row(str(n), [n, 2, 3], 2) for n in range(2)]))
    with pytest.raises(EngineError, match=r"teach\.endpoint\.max_requests = 3 is used up"):
        list(scorer(fake, tmp_path, max_requests=3).score([row(str(n), [n, 2, 3], 2) for n in range(9)]))
    assert len(fake.asked) == 3
    assert json.loads((tmp_path / "spent.json").read_text()) == {"requests": 3, "tokens": 12}
    with pytest.raises(EngineError, match=r"max_tokens = 12 is used up"):
        list(scorer(fake, tmp_path, max_tokens=12).score([row("a", [1, 2, 3], 2)]))


def test_the_key_comes_from_the_environment(
    fake: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name; one that is not set is said before anything is asked."""
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    list(scorer(fake, tmp_path, api_key_env="TEACHER_KEY").score([row("a", [1, 2, 3], 2)]))
    assert fake.keys == ["Bearer s3cret"]
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY is not set"):
        list(scorer(fake, tmp_path, api_key_env="TEACHER_KEY").score([row("a", [1, 2, 3], 2)]))


@pytest.mark.parametrize(
    ("url", "never"),
    [
        ("http://127.0.0.1:8100", "http://localhost:8100/v1/"),
        ("http://LOCALHOST:8100/v1", "127.0.0.1:8100"),
        ("https://api.example.com", "https://API.example.com:443/v1"),
        ("http://gpu-1/teacher", "http://gpu-1:80"),
    ],
)
def test_production_is_never_asked(url: str, never: str) -> None:
    """The same host and port, however it is spelled; only said aloud is it allowed."""
    with pytest.raises(ValueError, match="is production"):
        EndpointConfig(url=url, model="m", never=("http://elsewhere:1", never))
    assert EndpointConfig(url=url, model="m", never=(never,), allow_production=True).model == "m"


def test_another_port_or_host_is_not_production() -> None:
    """A teacher's own server on the same machine is what should be asked."""
    assert EndpointConfig(
        url="http://127.0.0.1:8101/v1/", model="m", never=("http://127.0.0.1:8100",)
    ).url == ("http://127.0.0.1:8101")
    assert place_of("http://[::1]:7") == ("localhost", 7)


def test_where_a_teacher_is_asked_is_no_part_of_the_key() -> None:
    """Another port or fewer in flight repeats no work; another model does."""
    config = TeachConfig(source="vllm", endpoint=EndpointConfig(url="http://a:1", model="m"))
    moved = config.model_copy(
        update={"endpoint": EndpointConfig(url="http://b:2", model="m", concurrency=1, max_tokens=5)}
    )
    other = config.model_copy(update={"endpoint": EndpointConfig(url="http://a:1", model="n")})
    assert key_config(config) == key_config(moved) != key_config(other)


def question(name: str) -> Question:
    """One user message."""
    messages = [{"role": "user", "content": name}]
    body = {"model": "support", "messages": messages, "tools": [{"type": "function"}], "stream": True}
    return Question(name, messages, body)


def test_an_api_answers_and_an_interrupted_run_asks_for_the_rest(fake: FakeOpenAI, tmp_path: Path) -> None:
    """Texts by question; what was answered before a budget ended is kept, a torn line is asked again."""
    fake.chat = lambda body: [f"to {body['messages'][0]['content']}"]
    limited = ApiVoice(
        endpoint(fake, max_requests=2, concurrency=1), "teach.endpoint", tmp_path / "spent.json"
    )
    with pytest.raises(EngineError, match="max_requests = 2"):
        limited.ask([question(n) for n in "abc"], Sampling(16), tmp_path / "answers")
    lines = (tmp_path / "answers" / "answers.jsonl").read_text()
    (tmp_path / "answers" / "answers.jsonl").write_text(lines + '{"id": "c", "cho')
    voice = ApiVoice(endpoint(fake), "teach.endpoint", tmp_path / "spent.json")
    answers = voice.ask([question(n) for n in "abc"], Sampling(16, 0.7, 0.9, 2), tmp_path / "answers")
    assert answers == {"a": ["to a"], "b": ["to b"], "c": ["to c"]}
    assert [b["messages"][0]["content"] for b in fake.asked] == ["a", "b", "c"]
    last = fake.asked[-1]
    assert (last["model"], last["max_tokens"], last["temperature"], last["n"]) == ("teacher", 16, 0.7, 2)
    assert last["tools"] == [{"type": "function"}]
    assert "stream" not in last
    assert "seed" not in fake.asked[0]


def test_a_servers_own_fields_are_added_and_taken_out(fake: FakeOpenAI, tmp_path: Path) -> None:
    """Hosted APIs differ in small ways: max_completion_tokens in place of max_tokens."""
    extra = {"max_tokens": None, "max_completion_tokens": 9, "reasoning_effort": "low"}
    voice = ApiVoice(endpoint(fake, extra=extra), "teach.endpoint", tmp_path / "spent.json")
    voice.ask([question("a")], Sampling(16), tmp_path / "one")
    asked = fake.asked[0]
    assert "max_tokens" not in asked
    assert (asked["max_completion_tokens"], asked["reasoning_effort"]) == (9, "low")


def test_unfinished_answers_are_no_answers(fake: FakeOpenAI, tmp_path: Path) -> None:
    """Cut by max_tokens, or empty."""
    voice = ApiVoice(endpoint(fake), "teach.endpoint", tmp_path / "spent.json")
    fake.chat = lambda body: ["", "whole"]
    assert voice.ask([question("a")], Sampling(16), tmp_path / "one") == {"a": ["whole"]}
    fake.finish_reason = "length"
    assert voice.ask([question("a")], Sampling(16), tmp_path / "two") == {"a": []}
