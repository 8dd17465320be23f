"""The official OpenAI client for Node through a real router process in front of a fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.node_rig import run_node
from tests.integration.router_rig import World

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("node"))
    made.split(1)
    made.router(log=None)
    yield made
    made.close()


def seen(world: World, *scenarios: str) -> dict[str, Any]:
    url = f"{world.routers[0].url}/v1"
    return run_node("openai.cjs", BASE_URL=url, SCENARIOS=",".join(scenarios))


def test_everything_a_node_program_asks_for(world: World) -> None:
    """Chat, completions, responses, embeddings and models, whole and streamed, as from OpenAI."""
    names = ("chat", "chat_stream", "completion", "responses", "responses_stream", "embeddings", "models")
    got = seen(world, *names)
    text, usage = "tick " * 8, {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}
    assert got["chat"]["texts"] == [text, text]
    assert got["chat"]["usage"] == usage
    assert got["chat"]["arm"] == "stable"
    assert got["chat"]["id"].startswith("req-")
    assert got["chat_stream"] == {"text": text, "usage": usage}
    assert got["completion"] == {"text": text}
    assert (got["responses"]["text"], got["responses"]["usage"]["output_tokens"]) == (text, 8)
    assert got["responses_stream"] == {
        "text": text,
        "first": "response.created",
        "last": "response.completed",
    }
    assert got["embeddings"] == {"vector": [0, 1]}
    assert got["models"] == {"names": ["support"], "one": "support"}


def test_parallel_tool_calls_are_assembled_from_a_stream(world: World) -> None:
    """Deltas of several calls arrive in order and whole."""
    world.stable.control(tool_calls=2)
    try:
        got = seen(world, "tool_stream")["tool_stream"]
    finally:
        world.stable.control(tool_calls=0)
    assert got["calls"] == [["weather", '{"city": "Zürich"}'], ["time", '{"city": "Zürich"}']]


def test_errors_are_the_clients_own_classes(world: World) -> None:
    """Refusals and broken streams raise what the client documents; never a short answer."""
    got = seen(world, "errors")["errors"]
    assert (got["unknown"]["kind"], got["unknown"]["status"]) == ("NotFoundError", 404)
    assert "Routes: support" in got["unknown"]["message"]
    assert (got["bad"]["kind"], got["bad"]["status"]) == ("BadRequestError", 400)
    for broken in ({"cut_after": 3}, {"unfinished": True}):
        world.stable.control(**broken, tpot_s=0.02)
        try:
            got = seen(world, "broken")["broken"]
        finally:
            world.stable.control(cut_after=-1, unfinished=False, tpot_s=0.0)
        for api in ("chat", "responses"):
            assert got[api]["kind"] == "APIError", (api, broken)
            assert "broke off" in got[api]["message"]
