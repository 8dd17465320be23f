"""The router as a real Ray Serve application with HAProxy in front."""

from __future__ import annotations

import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.router.config import RouterConfig
from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state
from tests.integration.router_rig import Server, World, get, openai_client, total, wait_until

pytestmark = pytest.mark.integration


def test_two_replicas_on_ray_scrape_exactly_stream_and_drain(tmp_path: Path) -> None:
    """Both replicas serve, one scrape is all of it, tokens come as they are made, a stop loses nothing."""
    world = World(tmp_path)
    world.split(1, weight=0.5)
    config = RouterConfig.model_validate(
        {"state_url": world.state_url, "log": {"dir": str(tmp_path / "log")}, "keys": True}
    )
    keys = KeyState(open_state(world.state_url))
    key, secret = new_key("ray")
    keys.create_key(key)
    path = tmp_path / "router.json"
    path.write_text(config.model_dump_json())
    try:
        router = Server("-m", "tests.integration.router_on_ray", str(path), str(tmp_path / "metrics"), "2")
    except BaseException:
        world.close()
        raise
    try:
        wait_until("ready", lambda: get(f"{router.url}/ready")[0] == 200)
        wait_until("both report", lambda: len(world.state.routers(10)) == 2)
        time.sleep(1.0)  # HAProxy hears of the second one a moment later
        with urllib.request.urlopen(f"{router.url}/ready", timeout=20) as reply:
            # Ray's own server says 'uvicorn'; this one says nothing. See serve/router/ray_ingress.py.
            assert reply.headers.get("server") is None
        client = openai_client(router).with_options(api_key=secret)

        def one(i: int) -> str:
            messages = [{"role": "user", "content": f"q{i}"}]
            if i % 2:
                answer = client.chat.completions.create(model="support", messages=messages)
                return answer.choices[0].message.content or ""
            stream = client.chat.completions.create(model="support", messages=messages, stream=True)
            return "".join(c.choices[0].delta.content or "" for c in stream)

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(one, range(200)))
        assert set(texts) == {"tick " * 8, "tock " * 8}
        scrape = get(f"{router.url}/metrics")[1]
        assert total(scrape, "stillhouse_requests_total") == 200
        assert total(scrape, "stillhouse_requests_total", arm="canary") == texts.count("tock " * 8)
        assert len({r.replica for r in world.state.routers(10)}) == 2
        assert get(f"{router.url}/v1/models")[0] == 401

        world.stable.control(tpot_s=0.15)
        world.canary.control(tpot_s=0.15)
        began, arrivals = time.monotonic(), []
        for chunk in client.chat.completions.create(
            model="support", messages=[{"role": "user", "content": "slow"}], stream=True
        ):
            if chunk.choices[0].delta.content:
                arrivals.append(time.monotonic() - began)
        assert len(arrivals) == 8
        assert arrivals[0] < 0.6
        assert arrivals[-1] - arrivals[0] > 0.7
    finally:
        router.stop(90)
        world.close()
    assert len(world.rows()) == 201
    assert len({f.name for f in (tmp_path / "log").glob("requests-*.jsonl")}) == 2
    assert not list((tmp_path / "log").glob("*.open.jsonl"))
    assert sum(c.n for c in world.evidence().values()) == 201
    assert world.state.routers(60) == []
    assert sum(u.requests for u in keys.usage(key.id)) == 201
