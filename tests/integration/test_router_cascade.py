"""Cascades through a real router process in front of fake engines: what clients, logs and metrics see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from contracts.traffic import Cascade, Upstream
from tests.integration.router_rig import Fake, World, get, openai_client, post, total, wait_until

pytestmark = pytest.mark.integration
SURE: dict[str, Any] = {
    "text": "tick ", "logprob": -0.01, "second": -6.0, "logprobs": True, "tokens": 8, "status": 200,
    "hang": False, "cut_after": -1, "error_after": -1, "unfinished": False, "tool_calls": 0, "tpot_s": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("router"))
    made.split(1, stable=smart(made), canary=None)
    made.router(graders={"ticks": {"kind": "regex", "pattern": "tick"}})
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _as_ever(world: World) -> None:
    """The student ('tick', the fake of arm stable) is sure; the teacher says 'tock'."""
    world.stable.control(**SURE)
    world.canary.control(**{**SURE, "text": "tock "})


def smart(world: World, **changes: Any) -> Upstream:
    student = Upstream(name="student", model="small", url=world.stable.url, digest="sha256:abc")
    teacher = Upstream(name="teacher", model="big", url=world.canary.url)
    fields: dict[str, Any] = {"first": student, "then": teacher, "threshold": -0.1, **changes}
    return Upstream(name="smart", model="smart", cascade=Cascade(**fields))


def put(world: World, **changes: Any) -> None:
    """A cascade with changes in force in the router."""
    before = world.state.get_split("support")
    assert before is not None
    version = before.version + 1
    world.split(version, stable=smart(world, **changes), canary=None)
    url = world.routers[0].url
    wait_until(
        "the split is in force",
        lambda: total(get(f"{url}/metrics")[1], "stillhouse_split_version") == version,
    )


def ask(world: World, **more: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], **more}
    return post(f"{world.routers[0].url}/v1/chat/completions", body)


def streamed(world: World, **more: Any) -> tuple[list[Any], Any]:
    """Chunks and response headers of a streamed answer."""
    client = openai_client(world.routers[0])
    raw = client.chat.completions.with_raw_response.create(
        model="support", messages=[{"role": "user", "content": "hi"}], stream=True, **more
    )
    return list(raw.parse()), raw.headers


def text_of(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def who(headers: Any) -> tuple[str, str, str]:
    return (
        headers["x-stillhouse-model"],
        headers["x-stillhouse-upstream"],
        headers["x-stillhouse-cascade"],
    )


def test_a_sure_student_answers_and_an_unsure_one_does_not(world: World) -> None:
    """One ordinary answer either way, with its own usage, and headers that name who gave it."""
    put(world)
    status, body, headers = ask(world)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "tick " * 8)
    assert who(headers) == ("small", "student", "first")
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 8
    world.stable.control(logprob=-0.5)
    status, body, headers = ask(world)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "tock " * 8)
    assert who(headers) == ("big", "teacher", "then; unsure")
    assert "logprobs" not in body["choices"][0]
    assert headers["x-stillhouse-arm"] == "stable"
    assert "x-stillhouse-fallback" not in headers
    assert "logprobs" not in world.canary.status()["last"]["body"]


def test_streams_are_as_clients_know_them(world: World) -> None:
    """Events whole, no log-probabilities, usage only for those who asked, whoever answered."""
    put(world)
    for logprob, text, by in ((-0.01, "tick ", "first"), (-0.5, "tock ", "then; unsure")):
        world.stable.control(logprob=logprob)
        chunks, headers = streamed(world)
        assert text_of(chunks) == text * 8
        assert headers["x-stillhouse-cascade"] == by
        assert all(c.choices and c.usage is None for c in chunks)
        assert all(c.choices[0].logprobs is None for c in chunks)
        chunks, _ = streamed(world, stream_options={"include_usage": True})
        assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_wants_logprobs_gets_those_it_wants(world: World, stream: bool) -> None:
    """The margin needs two of the most likely tokens; a client that asked for one sees one."""
    put(world, signal="margin", threshold=2.0)
    more = {"logprobs": True, "top_logprobs": 1}
    if stream:
        chunks, headers = streamed(world, **more)
        told = [
            t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content
        ]
        assert [(t.logprob, len(t.top_logprobs)) for t in told] == [(-0.01, 1)] * 8
        assert headers["x-stillhouse-cascade"] == "first"
    else:
        _, body, headers = ask(world, **more)
        told = body["choices"][0]["logprobs"]["content"]
        assert [(t["logprob"], len(t["top_logprobs"])) for t in told] == [(-0.01, 1)] * 8
    assert world.stable.status()["last"]["body"]["top_logprobs"] == 2
    world.stable.control(second=-0.5)
    assert ask(world, **more)[2]["x-stillhouse-cascade"] == "then; unsure"


def test_completions_have_their_own_shape(world: World) -> None:
    """Log-probabilities of the older API are lists side by side, and leave nothing behind either."""
    put(world, signal="margin", threshold=2.0)
    url = f"{world.routers[0].url}/v1/completions"
    _, body, headers = post(url, {"model": "support", "prompt": "hi"})
    assert who(headers) == ("small", "student", "first")
    assert body["choices"][0]["logprobs"] is None
    _, body, _ = post(url, {"model": "support", "prompt": "hi", "logprobs": 1})
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"tick ": -0.01}] * 8
    assert (
        post(url, {"model": "support", "prompt": ["a", "b"]})[2]["x-stillhouse-cascade"] == "then; not_judged"
    )


@pytest.mark.parametrize(
    ("trouble", "stream", "why"),
    [
        ({"status": 500}, False, "failed"),
        ({"status": 400}, False, "failed"),
        ({"cut_after": 3}, True, "failed"),
        ({"error_after": 3}, True, "failed"),
        ({"unfinished": True}, True, "failed"),
        ({"logprobs": False}, False, "no_signal"),
        ({"tokens": 30}, False, "long"),
        ({"tokens": 30}, True, "long"),
        ({"hang": True}, False, "timeout"),
    ],
)
def test_whatever_goes_wrong_with_the_first_the_second_answers(
    world: World, trouble: dict[str, Any], stream: bool, why: str
) -> None:
    """Refusals, broken streams, silence, missing signals and answers too long cost the client nothing."""
    put(world, hold_tokens=20, first_s=1.0 if why == "timeout" else 60.0)
    world.stable.control(**trouble)
    if stream:
        chunks, headers = streamed(world)
        assert text_of(chunks) == "tock " * 8
    else:
        status, body, headers = ask(world)
        assert (status, body["choices"][0]["message"]["content"]) == (200, "tock " * 8)
    assert headers["x-stillhouse-cascade"] == f"then; {why}"
    assert "x-stillhouse-fallback" not in headers


def test_a_long_answer_may_be_served_unjudged(world: World) -> None:
    """`long: first` says so, and the metrics tell it from an answer that was sure."""
    put(world, hold_tokens=20, long="first")
    world.stable.control(tokens=30, logprob=-0.5)
    assert ask(world)[2]["x-stillhouse-cascade"] == "first"
    assert text_of(streamed(world)[0]) == "tick " * 30
    metrics = get(f"{world.routers[0].url}/metrics")[1]
    assert total(metrics, "stillhouse_cascade_answers_total", by="student", reason="unjudged") == 2


def test_requests_that_cannot_be_judged_go_to_the_second_at_once(world: World) -> None:
    """Several choices, and APIs without log-probabilities: the first is not even asked."""
    put(world)
    before = world.stable.status()["requests"]
    _, body, headers = ask(world, n=2)
    assert (len(body["choices"]), headers["x-stillhouse-cascade"]) == (2, "then; not_judged")
    url = f"{world.routers[0].url}/v1/messages"
    request = {"model": "support", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    _, body, headers = post(url, request)
    assert body["content"][0]["text"] == "tock " * 8
    assert headers["x-stillhouse-cascade"] == "then; not_judged"
    assert world.stable.status()["requests"] == before


def test_tool_calls_pass_whole(world: World) -> None:
    """Calls are judged by their tokens and arrive as the student made them, streamed too."""
    put(world)
    world.stable.control(tool_calls=1)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    _, body, headers = ask(world, tools=tools)
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert headers["x-stillhouse-cascade"] == "first"
    chunks, _ = streamed(world, tools=tools)
    calls = [c.choices[0].delta.tool_calls for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert calls[0][0].function.name == "weather"


def test_a_grader_judges_any_api(world: World) -> None:
    """Signal 'grader': its score is the signal, and Anthropic's Messages can be judged as well."""
    put(world, signal="grader", grader="ticks", threshold=1.0)
    url = f"{world.routers[0].url}/v1/messages"
    request = {"model": "support", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    _, body, headers = post(url, request)
    assert (body["content"][0]["text"], headers["x-stillhouse-cascade"]) == ("tick " * 8, "first")
    world.stable.control(text="tack ")
    assert post(url, request)[1]["content"][0]["text"] == "tock " * 8
    assert ask(world)[2]["x-stillhouse-cascade"] == "then; unsure"
    assert text_of(streamed(world)[0]) == "tock " * 8


def test_samples_that_agree_let_the_student_answer(world: World) -> None:
    """Signal 'self_consistency': further samples, in one request, are compared with the held answer."""
    put(world, signal="self_consistency", samples=3, threshold=1.0)
    for answer in (ask(world)[2], streamed(world)[1]):
        assert answer["x-stillhouse-cascade"] == "first"
    metrics = get(f"{world.routers[0].url}/metrics")[1]
    before = total(metrics, "stillhouse_completion_tokens_total", upstream="student")
    ask(world, seed=3)
    metrics = get(f"{world.routers[0].url}/metrics")[1]
    assert total(metrics, "stillhouse_completion_tokens_total", upstream="student") == before + 2 * 8


def test_a_client_that_leaves_takes_the_held_generation_with_it(world: World) -> None:
    """Nothing is generated for nobody while an answer is held."""
    import http.client

    put(world)
    world.stable.control(tpot_s=1.0, tokens=60)
    before = world.stable.status()["cancelled"]
    host = world.routers[0].url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    body = '{"model": "support", "stream": true, "messages": [{"role": "user", "content": "hi"}]}'
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    wait_until("the student is asked", lambda: world.stable.status()["running"] == 1)
    connection.close()
    wait_until("the student stops", lambda: world.stable.status()["cancelled"] == before + 1)
    assert world.canary.status()["running"] == 0


def test_the_books_of_a_cascade(world: World) -> None:
    """One arm in evidence and log; tokens and reasons under the names of the two that have prices."""
    put(world)
    scrape = f"{world.routers[0].url}/metrics"
    before, rows = get(scrape)[1], len(world.rows())
    ids = []
    for logprob in (-0.01, -0.5):
        world.stable.control(logprob=logprob)
        ids.append(ask(world)[2]["x-request-id"])
    after = get(scrape)[1]

    def more(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert more("stillhouse_requests_total", upstream="smart", outcome="ok") == 2
    assert more("stillhouse_completion_tokens_total", upstream="student") == 16
    assert more("stillhouse_completion_tokens_total", upstream="teacher") == 8
    assert more("stillhouse_completion_tokens_total", upstream="smart") == 0
    assert more("stillhouse_cascade_answers_total", by="student", reason="sure") == 1
    assert more("stillhouse_cascade_answers_total", by="teacher", reason="unsure") == 1
    wait_until("both rows are written", lambda: len(world.rows()) >= rows + 2)
    first, then = (next(r for r in world.rows() if r["request_id"] == i) for i in ids)
    assert (first["upstream"], first["model"], first["digest"]) == ("smart", "small", "sha256:abc")
    assert (then["upstream"], then["model"], then["digest"]) == ("smart", "big", None)
    assert first["cascade"]["reason"] is None
    assert then["cascade"] == {
        "by": "teacher", "reason": "unsure", "signal": pytest.approx(-0.5), "first": "student",
        "first_prompt_tokens": 7, "first_completion_tokens": 8,
    }  # fmt: skip
    assert then["response_text"] == "tock " * 8


def test_when_the_second_fails_others_help_and_the_arm_is_charged(world: World) -> None:
    """An unsure student is no answer: the fallback answers, as for any arm that failed."""
    spare = Fake(text="spare ")
    world.others.append(spare)
    put(world)
    world.stable.control(logprob=-0.5)
    world.canary.control(status=500)
    status, body, headers = ask(world)
    assert status == 500
    assert headers["x-stillhouse-cascade"] == "then; unsure"
    world.split(
        world.state.get_split("support").version + 1,  # type: ignore[union-attr]
        stable=Upstream(name="spare", model="spare", url=spare.url),
        canary=smart(world),
        weight=1.0,
    )
    wait_until("the canary is in force", lambda: ask(world)[2]["x-stillhouse-arm"] == "canary")
    _, body, headers = ask(world)
    assert body["choices"][0]["message"]["content"] == "spare " * 8
    assert (headers["x-stillhouse-fallback"], headers["x-stillhouse-model"]) == ("true", "spare")
    assert "x-stillhouse-cascade" not in headers
