"""Settings of a route in force: names, defaults, limits, places, helpers and shadows, changed live."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from contracts.routes import Affinity, RouteLimits, RouteSettings, RouteTimeouts, Shadow
from contracts.traffic import Upstream
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from tests.integration.router_rig import Fake, Server, World, get, post, total, wait_until

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"


def put(world: World, version: int, **fields: Any) -> None:
    SettingsState(open_state(world.state_url)).put_settings(
        RouteSettings(route="support", version=version, **fields)
    )


def ask(router: Server, text: str = "x", **body: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    return post(
        f"{router.url}{CHAT}", {"model": "support", "messages": [{"role": "user", "content": text}], **body}
    )


def upstream(name: str, fake: Fake, **more: Any) -> Upstream:
    return Upstream(name=name, model=f"{name}-model", url=fake.url, **more)


def test_aliases_and_the_default_route_come_and_go_live(world: World) -> None:
    """Further names mean the route without a restart, unknown names only while it is the default."""
    world.split(1)
    router = world.router()
    assert ask(router, model="gpt-4o")[0] == 404
    put(world, 1, aliases=("gpt-4o",))
    wait_until("the alias answers", lambda: ask(router, model="gpt-4o")[0] == 200)
    models = [m["id"] for m in json.loads(get(f"{router.url}/v1/models")[1])["data"]]
    assert models == ["gpt-4o", "support"]
    assert ask(router, model="whatever")[0] == 404
    put(world, 2, aliases=(), default=True)
    wait_until("any name answers", lambda: ask(router, model="whatever")[0] == 200)
    scrape = get(f"{router.url}/metrics")[1]
    assert "whatever" not in scrape  # a client's word is never a label
    assert total(scrape, "stillhouse_requests_total", route="support", outcome="ok") == 2


def test_defaults_fill_gaps_and_limits_refuse_by_name(world: World) -> None:
    """The upstream sees the route's parameters where the client said nothing, and never more tokens."""
    world.split(1)
    put(world, 1, parameters={"temperature": 0.3, "top_p": 0.9}, limits=RouteLimits(max_tokens=50))
    router = world.router()
    assert ask(router, top_p=0.5)[0] == 200
    seen = world.stable.status()["last"]["body"]
    assert (seen["temperature"], seen["top_p"], seen["max_completion_tokens"]) == (0.3, 0.5, 50)
    status, body, _ = ask(router, max_tokens=51)
    assert (status, body["error"]["param"]) == (400, "max_tokens")
    assert "at most 50" in body["error"]["message"]
    wait_until("the row is written", lambda: len(world.rows()) == 1)
    row = world.rows()
    assert row[0]["request"]["top_p"] == 0.5
    assert "temperature" not in row[0]["request"]  # what the client sent, not what we added


def test_a_full_route_queues_then_refuses_with_retry_after(world: World) -> None:
    """Two run, two wait, the rest is told when to come back; nobody gets a wrong answer."""
    world.split(1)
    put(world, 1, limits=RouteLimits(max_in_flight=2, max_queued=2, queue_s=20))
    world.stable.control(ttft_s=0.5)
    router = world.router()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(router, f"q{i}"), range(8)))
    assert Counter(status for status, _, _ in answers) == {200: 4, 429: 4}
    refused = next(a for a in answers if a[0] == 429)
    assert int({k.lower(): v for k, v in refused[2].items()}["retry-after"]) >= 1
    assert refused[1]["error"]["code"] == "route_overloaded"
    assert refused[1]["error"]["type"] == "rate_limit_error"
    scrape = get(f"{router.url}/metrics")[1]
    assert total(scrape, "stillhouse_requests_total", route="support", outcome="rejected") == 4
    assert ask(router)[0] == 200  # every place came back


def test_fallbacks_are_asked_in_order_and_the_assigned_arm_is_charged(world: World) -> None:
    """Canary, stable and the first fallback fail: the second answers, the canary carries the failure."""
    dead, alive = Fake(status=500), Fake(text="spare ")
    world.others += [dead, alive]
    world.split(1, weight=1.0)
    put(world, 1, fallbacks=(upstream("spare-1", dead), upstream("spare-2", alive)))
    world.stable.control(status=503)
    world.canary.control(status=500)
    router = world.router()
    status, body, headers = ask(router)
    lines = {k.lower(): v for k, v in headers.items()}
    assert (status, body["choices"][0]["message"]["content"][:6]) == (200, "spare ")
    assert lines["x-stillhouse-arm"] == "canary"
    assert lines["x-stillhouse-model"] == "spare-2-model"
    assert lines["x-stillhouse-fallback"] == "true"
    assert world.stable.status()["requests"] == dead.status()["requests"] == 1
    wait_until("the row is written", lambda: len(world.rows()) == 1)
    row = world.rows()[0]
    assert (row["arm"], row["served_arm"], row["outcome"]) == ("canary", "fallback", "upstream_error")
    assert row["upstream"] == "spare-2"


def test_an_open_breaker_spares_the_failing_arm_and_closes_again(world: World) -> None:
    """After five failures in a row the canary is not asked for a while; it recovers, and is asked again."""
    world.split(1, weight=1.0)
    world.canary.control(status=500)
    router = world.router(eject_s=3, retry_ratio=0)
    assert {ask(router, f"q{i}")[0] for i in range(12)} == {200}
    assert world.canary.status()["requests"] == 5
    assert total(get(f"{router.url}/metrics")[1], "stillhouse_ejections_total", upstream="student") == 1
    world.canary.control(status=200)
    wait_until("the canary answers again", lambda: ask(router)[1]["model"] == "small")


def test_a_conversation_stays_on_its_replica(world: World) -> None:
    """Affinity over the replicas of one application, the same on every router."""
    fakes = [Fake(text=f"r{i} ") for i in range(3)]
    world.others += fakes
    for i, fake in enumerate(fakes):
        world.state.put_endpoint("app-1", f"r{i}", fake.url, 1)
    world.split(1, stable=Upstream(name="teacher", model="big", app="app-1"), canary=None)
    put(world, 1, affinity=Affinity.CONVERSATION)
    routers = [world.router(), world.router()]

    def home(router: Server, conversation: str) -> str:
        body = {"model": "support", "messages": [{"role": "user", "content": "x"}]}
        answer = post(f"{router.url}{CHAT}", body, x_stillhouse_conversation=conversation)[1]
        return str(answer["choices"][0]["message"]["content"][:2])

    homes = {c: home(routers[0], c) for c in map(str, range(30))}
    assert all(home(routers[i % 2], c) == homes[c] for i, c in enumerate(homes))
    assert set(homes.values()) == {"r0", "r1", "r2"}


def test_a_shadow_sees_a_sample_and_touches_nobody(world: World) -> None:
    """Same body and streaming mode, joined by pair id, off the client's path even when it hangs or fails."""
    twin = Fake(text="twin ", ttft_s=1.0)
    world.others.append(twin)
    world.split(1, weight=1e-9)
    put(world, 1, shadow=Shadow(upstream=upstream("twin", twin), share=0.5))
    router = world.router()
    running = 0
    for i in range(20):
        assert ask(router, f"q{i}", stream=False)[0] == 200
        running = max(running, twin.status()["running"])
    assert running > 0  # the client has its answer while the shadow still waits for its own

    def logged() -> list[dict[str, Any]]:
        return [r for r in world.rows() if r["arm"] == "shadow"]

    wait_until("the shadows are logged", lambda: 0 < len(logged()) == twin.status()["requests"])
    rows = world.rows()
    shadows = logged()
    first = {r["request_id"]: r for r in rows if r["arm"] == "stable"}
    assert len(first) == 20
    assert 3 <= len(shadows) <= 17
    for shadow in shadows:
        pair = first[shadow["pair_id"]]
        assert shadow["request"] == pair["request"]
        assert (shadow["upstream"], shadow["model"], shadow["outcome"]) == ("twin", "twin-model", "ok")
        assert shadow["response_text"].startswith("twin ")
        assert shadow["reason"] == "shadow"
    wait_until(
        "evidence is stored", lambda: "stable" in world.evidence() and world.evidence()["stable"].n == 20
    )
    assert set(world.evidence()) == {"stable"}
    scrape = get(f"{router.url}/metrics")[1]
    assert total(scrape, "stillhouse_requests_total", arm="shadow", outcome="ok") == len(shadows)
    assert total(scrape, "stillhouse_responses_total", route="support") == 20
    twin.control(status=500)
    before = len(shadows)
    for i in range(20):
        assert ask(router, f"q{i}")[0] == 200
    wait_until(
        "failed shadows are logged, and only that",
        lambda: (
            sum(r["arm"] == "shadow" and r["outcome"] == "upstream_error" for r in world.rows()) == before
        ),
    )


def test_a_shadow_streams_when_its_request_did_and_keeps_its_budget(world: World) -> None:
    """The hour's budget and the bound of running ones drop shadows, counted by reason."""
    twin = Fake(text="twin ", ttft_s=0.5)
    world.others.append(twin)
    world.split(1)
    put(world, 1, shadow=Shadow(upstream=upstream("twin", twin), share=1.0, per_hour=5, max_in_flight=3))
    router = world.router()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: stream(router, i), range(6)))
    wait_until("three ran", lambda: twin.status()["requests"] == 3)
    assert twin.status()["last"]["body"]["stream"] is True
    wait_until("they ended", lambda: twin.status()["running"] == 0)
    time.sleep(0.2)
    for i in range(4):
        stream(router, i)
        wait_until("it ended", lambda: twin.status()["running"] == 0)
        time.sleep(0.7)
    assert twin.status()["requests"] == 5
    scrape = get(f"{router.url}/metrics")[1]
    assert total(scrape, "stillhouse_shadows_dropped_total", reason="busy") == 3
    assert total(scrape, "stillhouse_shadows_dropped_total", reason="budget") == 2


def stream(router: Server, i: int) -> None:
    body = {"model": "support", "messages": [{"role": "user", "content": f"s{i}"}], "stream": True}
    request = urllib.request.Request(
        f"{router.url}{CHAT}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        assert reply.read().endswith(b"data: [DONE]\n\n")


def test_a_routes_own_timeouts_are_live_and_take_the_place_of_the_routers(world: World) -> None:
    """A slow model may take longer than the router allows elsewhere, an urgent route gives up sooner."""
    world.split(1)
    router = world.router(timeouts={"first_byte_s": 0.3})
    world.stable.control(ttft_s=0.8)
    assert ask(router)[0] == 504
    put(world, 1, timeouts=RouteTimeouts(first_byte_s=5.0))
    wait_until("the route waits longer", lambda: ask(router)[0] == 200)
    put(world, 2, timeouts=RouteTimeouts(first_byte_s=5.0, total_s=0.4))
    wait_until("the whole is bounded", lambda: ask(router)[0] == 504)
    world.stable.control(ttft_s=0.0, tpot_s=0.6)
    put(world, 3, timeouts=RouteTimeouts(between_chunks_s=0.2))
    wait_until("a pause ends the stream", lambda: '"timeout"' in _streamed(router))
    put(world, 4)
    wait_until("the defaults are back", lambda: _streamed(router).rstrip().endswith("[DONE]"))


def _streamed(router: Server) -> str:
    body = {"model": "support", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    request = urllib.request.Request(f"{router.url}{CHAT}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        return str(reply.read().decode())


def test_integers_of_any_size_reach_the_upstream_and_the_log(world: World) -> None:
    """A body with an integer beyond 64 bits is passed on with all its digits, and logged with them."""
    bodies: list[bytes] = []

    class Echo(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(b"{}")

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self._say(b'{"choices": [], "id": 98765432109876543210987}')

        def _say(self, answer: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        world.split(1, stable=Upstream(name="raw", model="big", url=f"http://127.0.0.1:{server.server_port}"))
        router = world.router()
        status, answer, _ = ask(router, seed=2**77, nested={"ids": [-(2**63) - 1, 10**30]})
        router.stop()
    finally:
        server.shutdown()
        server.server_close()
    assert (status, answer["id"]) == (200, 98765432109876543210987)
    seen = json.loads(bodies[0])
    assert (seen["seed"], seen["nested"]["ids"], seen["model"]) == (2**77, [-(2**63) - 1, 10**30], "big")
    (row,) = world.rows()
    assert (row["request"]["seed"], row["request"]["nested"]["ids"][1]) == (2**77, 10**30)
