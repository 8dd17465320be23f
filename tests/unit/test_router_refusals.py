"""What the router itself turns away: always OpenAI's error shape, never a hang, never a 5xx of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import ConfigError
from contracts.traffic import Split, Upstream
from serve.router.app import RouterApp, create_app
from serve.router.config import RouterConfig
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

CHAT = "/v1/chat/completions"


async def call(
    app: RouterApp, body: bytes | list[bytes], path: str = CHAT, method: str = "POST", **headers: str
) -> tuple[int, Any]:
    """One request straight into the ASGI application."""
    parts = [body] if isinstance(body, bytes) else body
    messages = [
        {"type": "http.request", "body": part, "more_body": at + 1 < len(parts)}
        for at, part in enumerate(parts)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    lines = [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()]
    async with asyncio.timeout(20):
        await app({"type": "http", "path": path, "method": method, "headers": lines}, receive, send)
    data = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], orjson.loads(data)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[RouterApp]:
    url = f"sqlite:///{tmp_path}/state.db"
    stable = Upstream(name="teacher", model="big", url="http://127.0.0.1:9")
    TrafficState(open_state(url)).put_split(Split(route="support", version=1, salt="s", stable=stable))
    router = create_app(RouterConfig(state_url=url, max_body_bytes=10_000, timeouts={"body_s": 0.3}))
    await router.startup()
    yield router
    await router.shutdown()


def nested(depth: int) -> bytes:
    return b'{"model":"support","x":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"support"', 400),
        (b"\xff\xfe", 400),
        (b'{"model": "\\ud800"}', 400),
        (b"{}", 400),
        (b'{"model": 3}', 400),
        (b'{"model": ["support"]}', 400),
        (b'{"model": ""}', 400),
        (b'{"model": "nobody"}', 404),
        (b'{"model": "' + b"x" * 20_000 + b'"}', 413),
        (nested(300), 400),
        (nested(3000), 400),
        (nested(4900), 400),
    ],
)
async def test_malformed_bodies(app: RouterApp, body: bytes, status: int) -> None:
    """Every body that is no request for a route gets a 4xx in OpenAI's shape."""
    got, error = await call(app, body)
    assert got == status
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"]


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(orjson.dumps))
@settings(max_examples=200, deadline=None)
def test_any_bytes_get_an_answer(body: bytes) -> None:
    """Fuzz: whatever comes, the parser refuses it or finds a model; it raises nothing else."""
    from serve.router.errors import RequestRefused
    from serve.router.intake import _parse

    status, parsed = 200, None
    try:
        parsed = _parse(body, 128)
    except RequestRefused as refused:
        status = refused.status
    assert (status == 400) != isinstance(parsed, dict)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "resp_1"), ("DELETE", "resp_1"), ("POST", "resp_1/cancel"), ("GET", "")]
)
async def test_stored_responses_are_not_found_and_it_says_why(app: RouterApp, method: str, path: str) -> None:
    """No replica's memory is pretended to be everybody's; the answer says what to do instead."""
    status, error = await call(app, b"", f"/v1/responses/{path}", method)
    assert (status, error["error"]["code"]) == (404, "response_not_found")
    assert "previous_response_id" in error["error"]["message"]


async def test_the_404_names_the_routes(app: RouterApp) -> None:
    """A typo in the model's name is found from the message alone."""
    _, error = await call(app, b'{"model": "suport"}')
    assert error["error"]["code"] == "model_not_found"
    assert "Routes: support." in error["error"]["message"]


async def test_too_large_is_refused_without_reading_it(app: RouterApp) -> None:
    """A declared or an actual size above the limit is refused, chunked bodies included."""
    assert (await call(app, b"", content_length="999999"))[0] == 413
    assert (await call(app, [b"x" * 6000, b"x" * 6000, b"x" * 6000]))[0] == 413


async def test_a_body_that_never_comes_is_refused(app: RouterApp) -> None:
    """A client that stops in the middle of its body does not keep a request open for ever."""
    got, error = await call(app, [])
    assert got == 408
    assert "in time" in error["error"]["message"]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nothing", "POST", 404),
        ("/v1/../admin", "POST", 404),
        ("/v1/models/nobody", "GET", 404),
        (CHAT, "GET", 405),
        ("/metrics", "POST", 405),
    ],
)
async def test_paths_are_a_fixed_list(app: RouterApp, path: str, method: str, status: int) -> None:
    """No path of a client's making reaches an upstream."""
    got, error = await call(app, b"{}", path, method)
    assert got == status
    assert error["error"]["message"]


async def test_a_wish_for_an_arm_that_is_not_there(app: RouterApp) -> None:
    """An override that cannot be honoured is said, not silently served by another arm."""
    body = b'{"model": "support"}'
    assert (await call(app, body, x_stillhouse_arm="canary"))[0] == 400
    assert (await call(app, body, x_stillhouse_arm="shadow"))[0] == 400


async def test_an_upstream_that_is_not_there(app: RouterApp) -> None:
    """The one 5xx there is says whose fault it was, in OpenAI's shape, and hurries."""
    got, error = await call(app, b'{"model": "support"}')
    assert got == 502
    assert error["error"]["type"] == "upstream_error"


async def test_models_are_the_routes(app: RouterApp) -> None:
    """Clients list routes, never upstreams."""
    got, models = await call(app, b"", "/v1/models", "GET")
    assert (got, [m["id"] for m in models["data"]]) == (200, ["support"])
    assert (await call(app, b"", "/v1/models/support", "GET"))[1]["id"] == "support"


async def test_not_ready_says_what_is_missing(app: RouterApp) -> None:
    """Readiness is false, with its reason, while the stable upstream does not answer."""
    got, said = await call(app, b"", "/ready", "GET")
    assert (got, said["missing"]) == (503, ["route 'support': no replica of 'teacher' answers"])


async def test_a_store_that_is_down_does_not_stop_the_router(tmp_path: Path) -> None:
    """The router starts, lives and says it is not ready; it serves as soon as the store is back."""
    folder = tmp_path / "state"
    folder.write_text("in the way")
    router = create_app(RouterConfig(state_url=f"sqlite:///{folder}/s.db", poll_s=0.02))
    await router.startup()
    assert (await call(router, b"", "/ready", "GET"))[0] == 503
    folder.unlink()
    stable = Upstream(name="teacher", model="big", url="http://127.0.0.1:9")
    TrafficState(open_state(f"sqlite:///{folder}/s.db")).put_split(
        Split(route="support", version=1, salt="s", stable=stable)
    )
    async with asyncio.timeout(10):
        while (await call(router, b"", "/v1/models", "GET"))[1]["data"] == []:
            await asyncio.sleep(0.02)
    await router.shutdown()


@pytest.mark.parametrize("spec", ["nowhere:f", "json:nothing", "json:__name__"])
def test_a_grader_that_is_not_there_is_found_at_the_start(spec: str) -> None:
    """A misspelt grader stops the router before traffic, not at the first answer."""
    grader = {"kind": "function", "function": spec}
    config = {"state_url": "sqlite://", "log": {"dir": "log"}, "graders": {"right": grader}}
    with pytest.raises(ConfigError, match=r"graders\.right\.function"):
        RouterApp(RouterConfig.model_validate(config))
