"""The official OpenAI client through a real router process in front of fake engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from contracts.traffic import Upstream
from tests.integration.router_rig import World, get, openai_client, post, total, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("router"))
    made.split(1)
    made.router(graders={"grade": {"kind": "function", "function": "tests.integration.graders:says_tick"}})
    yield made
    made.close()


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_whole_and_streamed_answers_are_the_same(world: World) -> None:
    """A client changes its base URL and nothing else; unknown fields reach the engine untouched."""
    client = openai_client(world.routers[0])
    whole = client.chat.completions.with_raw_response.create(
        model="support", messages=ask("hi"), seed=3, extra_body={"guided_regex": "a+", "tools": []}
    )
    stream = client.chat.completions.create(model="support", messages=ask("hi"), stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert whole.parse().choices[0].message.content == text == "tick " * 8
    assert whole.headers["x-stillhouse-arm"] == "stable"
    assert whole.headers["x-stillhouse-model"] == "big"
    assert whole.headers["x-stillhouse-split"] == "1"
    assert whole.headers["x-request-id"].startswith("req-")
    seen = world.stable.status()["last"]["body"]
    assert seen["model"] == "big"
    client.completions.create(model="support", prompt="hi", seed=3, extra_body={"guided_regex": "a+"})
    seen = world.stable.status()["last"]
    assert (seen["path"], seen["body"]["guided_regex"], seen["body"]["seed"]) == ("/v1/completions", "a+", 3)
    assert "authorization" not in seen["headers"]


def test_usage_is_only_seen_by_those_who_asked(world: World) -> None:
    """The router accounts every stream and hides the chunk it asked for itself."""
    client = openai_client(world.routers[0])
    quiet = list(client.chat.completions.create(model="support", messages=ask("a"), stream=True))
    assert all(c.usage is None and c.choices for c in quiet)
    asked = list(
        client.chat.completions.create(
            model="support", messages=ask("a"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert asked[-1].usage is not None
    assert asked[-1].usage.completion_tokens == 8


def test_rows_metrics_and_grades_tell_the_same(world: World) -> None:
    """Each request is one row with right token counts, one counted request and one verdict."""
    client = openai_client(world.routers[0])
    url = world.routers[0].url
    before = get(f"{url}/metrics")[1]
    texts = {f"{kind}{i}" for kind in "sw" for i in range(5)}

    def mine() -> list[dict[str, Any]]:
        return [r for r in world.rows() if r["request"].get("messages", [{}])[0].get("content") in texts]

    for i in range(5):
        list(client.chat.completions.create(model="support", messages=ask(f"s{i}"), stream=True))
        client.chat.completions.create(
            model="support", messages=ask(f"w{i}"), extra_headers={"x-request-id": f"mine-{i}"}
        )
    after = get(f"{url}/metrics")[1]

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert grown("stillhouse_requests_total", outcome="ok", arm="stable") == 10
    assert grown("stillhouse_completion_tokens_total") == 80
    assert grown("stillhouse_prompt_tokens_total") == 70
    assert grown("stillhouse_ttft_seconds_count") == 5
    assert grown("stillhouse_tpot_seconds_count") == 5
    assert grown("stillhouse_e2e_seconds_count") == 10
    assert total(after, "stillhouse_in_flight") == 0
    # Earlier tests' rows may still be on their way to the disk: wait for ours.
    wait_until("the rows are written", lambda: len(mine()) >= 10)
    rows = mine()
    assert len(rows) == 10
    for row in rows:
        assert (row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) == (7, 8, "stop")
        assert (row["response_text"], row["scores"], row["outcome"]) == ("tick " * 8, {"grade": 1.0}, "ok")
        assert row["request"]["model"] == "support"
        assert (row["response"] is None) == row["stream"] == (row["ttft_s"] is not None)
        assert 0 <= row["overhead_s"] < row["e2e_s"]
    assert {f"mine-{i}" for i in range(5)} <= {r["request_id"] for r in rows}


def test_errors_of_the_upstream_reach_the_client_as_openai_errors(world: World) -> None:
    """A bad request is the client's own error, with the engine's words, and is nobody's evidence."""
    client = openai_client(world.routers[0])
    world.stable.control(status=400)
    try:
        with pytest.raises(openai.BadRequestError, match="scripted 400"):
            client.chat.completions.create(model="support", messages=ask("x"))
        with pytest.raises(openai.BadRequestError, match="scripted 400"):
            client.chat.completions.create(model="support", messages=ask("x"), stream=True)
    finally:
        world.stable.control(status=200)
    with pytest.raises(openai.NotFoundError, match="Routes: support"):
        client.chat.completions.create(model="other", messages=ask("x"))


def test_other_endpoints_pass_through(world: World) -> None:
    """Embeddings and tokenize reach the engine whole; the list of models is the list of routes."""
    client = openai_client(world.routers[0])
    assert client.embeddings.create(model="support", input="x", encoding_format="float").data[
        0
    ].embedding == [0, 1]
    status, body, _ = post(f"{world.routers[0].url}/tokenize", {"model": "support", "prompt": "x"})
    assert (status, body["count"]) == (200, 3)
    assert [m.id for m in client.models.list()] == ["support"]


def test_an_upstream_with_a_key_and_a_path(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hosted API gets its own key from the environment; the client's key goes nowhere."""
    monkeypatch.setenv("HOSTED_KEY", "sk-hosted")
    hosted = Upstream(name="hosted", model="gpt", url=f"{world.stable.url}/v1/", api_key_env="HOSTED_KEY")
    world.split(1, route="hosted", stable=hosted, canary=None, rollout_id=None)
    router = world.router(log=None)
    client = openai_client(router)
    assert client.chat.completions.create(model="hosted", messages=ask("x")).model == "gpt"
    assert world.stable.status()["last"]["headers"]["authorization"] == "Bearer sk-hosted"
    world.state.delete_split("hosted")
    wait_until(
        "the route is gone", lambda: "hosted" not in json.dumps(json.loads(get(f"{router.url}/v1/models")[1]))
    )
