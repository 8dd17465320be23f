"""What clients and evidence see when upstreams fail: fallbacks, broken streams, timeouts, cancellations."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from contracts.traffic import Upstream
from tests.integration.router_rig import Fake, Server, World, get, openai_client, post, total, wait_until

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"


def body(text: str = "x", **more: Any) -> dict[str, Any]:
    return {"model": "support", "messages": [{"role": "user", "content": text}], **more}


def ask_all(router: Server, count: int) -> list[str]:
    """Half streamed, half whole, eight at a time; returns the texts. Any failure raises."""
    client = openai_client(router)

    def one(i: int) -> str:
        if i % 2:
            return client.chat.completions.create(**body(f"q{i}")).choices[0].message.content or ""
        stream = client.chat.completions.create(**body(f"q{i}"), stream=True)
        return "".join(c.choices[0].delta.content or "" for c in stream)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize(
    "broken",
    [{"status": 500}, {"status": 503}, {"status": 404}, {"status": 429}, {"error_after": 0}],
)
def test_a_failing_canary_costs_clients_nothing_and_is_charged(world: World, broken: dict[str, Any]) -> None:
    """However the canary fails before its first token, stable answers, and the canary is charged."""
    world.canary.control(**broken)
    world.split(1, weight=0.5)
    router = world.router(eject_failures=1000)  # its breaker stays closed: every request shall reach it
    texts = ask_all(router, 40)
    assert set(texts) <= {"tick " * 8, "tock " * 8}
    canary_was_asked = world.canary.status()["requests"]
    assert 5 < canary_was_asked < 35
    router.stop()
    counts = world.evidence()
    assert counts["stable"].n + counts["canary"].n == 40
    assert counts["stable"].errors == 0
    rows = world.rows()
    failed = [r for r in rows if r["outcome"] == "upstream_error"]
    assert counts["canary"].errors == len(failed) > 0
    if "error_after" not in broken:
        assert counts["canary"].errors == counts["canary"].n == canary_was_asked
    assert {(r["arm"], r["served_arm"], r["status"], r["upstream"]) for r in failed} == {
        ("canary", "stable", 200, "teacher")
    }
    assert sum(counts["canary"].e2e) == counts["canary"].n - counts["canary"].errors


def test_a_dead_canary_and_one_with_another_replica(world: World) -> None:
    """A refused connection goes to the arm's other replica first; with none left, to stable."""
    dead = Fake()
    dead.stop()
    app = Upstream(name="student", model="small", app="student-1")
    for name, url in (("a", dead.url), ("b", world.canary.url)):
        world.state.put_endpoint("student-1", name, url, 1)
    world.split(1, weight=1.0, canary=app)
    router = world.router(endpoint_max_age_s=600.0)
    assert ask_all(router, 20) == ["tock " * 8] * 20
    world.state.drop_endpoint("student-1", "b")
    time.sleep(0.6)
    assert ask_all(router, 10) == ["tick " * 8] * 10
    world.state.drop_endpoint("student-1")
    time.sleep(0.6)
    status, _, headers = post(f"{router.url}{CHAT}", body())
    assert (status, headers["x-stillhouse-arm"], headers["x-stillhouse-fallback"]) == (200, "canary", "true")
    scrape = get(f"{router.url}/metrics")[1]
    assert total(scrape, "stillhouse_fallbacks_total") == 11
    assert total(scrape, "stillhouse_requests_total", arm="canary", outcome="upstream_error") == 11


def test_without_fallback_the_client_sees_the_failure(world: World) -> None:
    """`fallback: false` passes the canary's own error on."""
    world.canary.control(status=500)
    world.split(1, weight=1.0)
    router = world.router(fallback=False)
    with pytest.raises(openai.InternalServerError, match="scripted 500"):
        openai_client(router).chat.completions.create(**body())


def test_a_slow_canary_times_out_and_stable_answers(world: World) -> None:
    """An upstream that never answers is given up after first_byte_s, and charged with a timeout."""
    world.canary.control(hang=True)
    world.split(1, weight=1.0)
    router = world.router(timeouts={"first_byte_s": 0.3})
    assert ask_all(router, 4) == ["tick " * 8] * 4
    wait_until("the hanging requests were cancelled", lambda: world.canary.status()["running"] == 0)
    router.stop()
    assert [r["outcome"] for r in world.rows()] == ["timeout"] * 4
    assert world.evidence()["canary"].errors == 4


@pytest.mark.parametrize(
    ("broken", "outcome"), [("cut_after", "broken_stream"), ("error_after", "broken_stream")]
)
def test_a_stream_that_breaks_ends_with_an_error_event(world: World, broken: str, outcome: str) -> None:
    """After the first token nothing can be taken back: the client gets what there was and then an error."""
    world.stable.control(**{broken: 4}, tpot_s=0.02)
    world.split(1)
    router = world.router()
    got: list[str] = []
    stream = openai_client(router).chat.completions.create(**body(), stream=True)
    with pytest.raises(openai.APIError):
        got.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(got) == "tick " * 4
    assert total(get(f"{router.url}/metrics")[1], "stillhouse_requests_total", outcome=outcome) == 1
    router.stop()
    (row,) = world.rows()
    assert (row["outcome"], row["response_text"], row["status"]) == (outcome, "tick " * 4, 200)


def test_a_stream_that_stalls_times_out_with_an_error_event(world: World) -> None:
    """A pause longer than between_chunks_s ends the stream, aloud, and frees the upstream."""
    world.stable.control(tpot_s=5.0)
    world.split(1)
    router = world.router(timeouts={"between_chunks_s": 0.3})
    with pytest.raises(openai.APIError, match="stopped sending"):
        list(openai_client(router).chat.completions.create(**body(), stream=True))
    wait_until("the upstream was told", lambda: world.stable.status()["running"] == 0)
    router.stop()
    assert [r["outcome"] for r in world.rows()] == ["timeout"]


def test_a_total_time_bounds_everything(world: World) -> None:
    """However the time was spent, a request ends after total_s with a 504."""
    world.stable.control(hang=True)
    world.split(1)
    router = world.router(timeouts={"total_s": 0.4})
    status, error, _ = post(f"{router.url}{CHAT}", body())
    assert (status, error["error"]["type"]) == (504, "upstream_error")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_the_upstream(world: World, stream: bool) -> None:
    """A closed connection stops generation at once; it is nobody's failure and no evidence."""
    world.stable.control(tpot_s=0.5, tokens=100)
    world.split(1, weight=0.0001)
    router = world.router()
    parts = urlsplit(router.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection.request("POST", CHAT, json.dumps(body(stream=stream)), {"content-type": "application/json"})
    if stream:
        connection.getresponse().read(50)
    wait_until("it is running", lambda: world.stable.status()["running"] == 1)
    if connection.sock is not None:
        connection.sock.close()
    connection.close()
    wait_until("it was cancelled", lambda: world.stable.status()["cancelled"] == 1)
    metrics = f"{router.url}/metrics"
    wait_until(
        "it was counted",
        lambda: total(get(metrics)[1], "stillhouse_requests_total", outcome="client_closed") == 1,
        5,
    )
    assert total(get(metrics)[1], "stillhouse_in_flight") == 0
    router.stop()
    assert [r["outcome"] for r in world.rows()] == ["client_closed"]
    assert world.evidence() == {}


def test_an_override_is_served_and_is_no_evidence(world: World) -> None:
    """A tester may pick an arm by header; the tests never count it."""
    world.split(1, weight=0.0001)
    router = world.router()
    status, answer, headers = post(f"{router.url}{CHAT}", body(), x_stillhouse_arm="canary")
    assert (status, answer["model"], headers["x-stillhouse-arm"]) == (200, "small", "canary")
    router.stop()
    (row,) = world.rows()
    assert (row["reason"], row["arm"], row["digest"]) == ("override", "canary", "sha256:abc")
    assert world.evidence() == {}


def test_an_engine_killed_under_load_fails_no_whole_answer(world: World) -> None:
    """With a second replica, a SIGKILL of one costs no client of a whole answer anything."""
    second = Fake(text="tock ")
    world.others.append(second)
    for name, fake in (("a", world.canary), ("b", second)):
        fake.control(tpot_s=0.002)
        world.state.put_endpoint("student-1", name, fake.url, fake.process.pid)
    world.split(1, weight=1.0, canary=Upstream(name="student", model="small", app="student-1"))
    router = world.router(endpoint_max_age_s=600.0)
    client = openai_client(router)
    threading.Timer(0.3, second.kill).start()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: client.chat.completions.create(**body(f"q{i}")), range(200)))
    assert {a.choices[0].message.content for a in answers} == {"tock " * 8}
    assert second.process.poll() is not None
