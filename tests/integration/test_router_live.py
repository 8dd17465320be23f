"""Several routers, live changes, leaving: exact scrapes, splits within a second, drains that lose nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from contracts.traffic import Upstream
from tests.integration.router_rig import Server, World, get, openai_client, post, total, wait_until

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"


def model_of(router: Server, text: str = "x") -> str:
    status, answer, _ = post(
        f"{router.url}{CHAT}", {"model": "support", "messages": [{"role": "user", "content": text}]}
    )
    assert status == 200
    return str(answer["model"])


def stream_text(client: OpenAI, text: str) -> str:
    stream = client.chat.completions.create(
        model="support", messages=[{"role": "user", "content": text}], stream=True
    )
    return "".join(c.choices[0].delta.content or "" for c in stream)


def test_two_routers_scrape_as_one_exactly(world: World) -> None:
    """Whichever replica answers, a scrape is the requests sent: every arm, refusals and the dead included."""
    world.split(1, weight=0.5)
    routers = [world.router(multiproc=True) for _ in range(2)]
    clients = [openai_client(r) for r in routers]
    sent: Counter[str] = Counter()

    def one(i: int) -> str:
        messages = [{"role": "user", "content": f"q{i}"}]
        create = clients[i % 2].chat.completions.with_raw_response.create
        if i % 3 == 0:
            raw = create(model="support", messages=messages, stream=True)
            list(raw.parse())
        else:
            raw = create(model="support", messages=messages)
        return str(raw.headers["x-stillhouse-arm"])

    with ThreadPoolExecutor(8) as pool:
        sent.update(pool.map(one, range(120)))
    scrapes = [get(f"{r.url}/metrics")[1] for r in routers]
    for scrape in scrapes:
        for arm in ("stable", "canary"):
            assert total(scrape, "stillhouse_requests_total", arm=arm, outcome="ok") == sent[arm] > 0
        assert total(scrape, "stillhouse_requests_total") == 120
        assert total(scrape, "stillhouse_responses_total", code="200") == 120
        assert total(scrape, "stillhouse_e2e_seconds_count") == 120
        assert total(scrape, "stillhouse_ttft_seconds_count") == 40
        assert total(scrape, "stillhouse_completion_tokens_total") == 120 * 8
        assert total(scrape, "stillhouse_split_weight", route="support") == 0.5
    assert post(f"{routers[0].url}{CHAT}", {"model": "nobody"})[0] == 404
    routers[0].kill()
    scrape = get(f"{routers[1].url}/metrics")[1]
    assert total(scrape, "stillhouse_requests_total") == 121
    assert total(scrape, "stillhouse_requests_total", route="other", outcome="rejected") == 1
    assert total(scrape, "stillhouse_in_flight") == 0


def test_a_fresh_arm_has_series_at_zero(world: World) -> None:
    """A rate over an arm that has just begun starts at zero instead of missing its first requests."""
    world.split(1, weight=0.01)
    scrape = get(f"{world.router().url}/metrics")[1]
    assert 'stillhouse_requests_total{arm="canary",endpoint="/v1/chat/completions",outcome="ok"' in scrape
    assert total(scrape, "stillhouse_requests_total") == 0


def test_a_split_is_live_on_all_routers(world: World) -> None:
    """Both routers act on a new split and report its version; not one request fails meanwhile."""
    world.split(1)
    routers = [world.router() for _ in range(2)]
    assert [model_of(r) for r in routers] == ["big", "big"]
    for version, weight, model in ((2, 1.0, "small"), (3, 0.0, "big"), (4, 1.0, "small")):
        world.split(version, weight=weight)
        for router in routers:
            wait_until("the split is live", lambda r=router, m=model: model_of(r) == m)

        def reported(v: int = version) -> bool:
            return [r.versions["support"] for r in world.state.routers(5)] == [v, v]

        wait_until("both routers reported it", reported)


def test_a_store_that_goes_away_changes_nothing(world: World) -> None:
    """With the state store gone requests go on under the last split, and evidence waits for its return."""
    world.split(1, weight=1.0)
    router = world.router(flush_s=0.2)
    database = world.folder / "state.db"
    hidden = world.folder / "hidden"
    wait_until("the router reported", lambda: bool(world.state.routers(5)))
    with world.state._engine.connect() as db:
        db.exec_driver_sql("ALTER TABLE splits RENAME TO splits_gone")
        db.exec_driver_sql("ALTER TABLE ledger RENAME TO ledger_gone")
        db.commit()
    time.sleep(0.6)
    assert [model_of(router, str(i)) for i in range(5)] == ["small"] * 5
    time.sleep(0.6)
    with world.state._engine.connect() as db:
        db.exec_driver_sql("ALTER TABLE splits_gone RENAME TO splits")
        db.exec_driver_sql("ALTER TABLE ledger_gone RENAME TO ledger")
        db.commit()
    wait_until("the evidence arrived", lambda: bool(world.evidence()))
    assert world.evidence()["canary"].n == 5
    assert total(get(f"{router.url}/metrics")[1], "stillhouse_state_errors_total") > 0
    assert database.exists()
    assert not hidden.exists()


def test_a_router_that_leaves_finishes_its_streams(world: World) -> None:
    """SIGTERM under load: every stream ends whole, every row and count is stored, the router signs off."""
    engines = (world.stable, world.canary)
    for engine in engines:
        engine.control(tpot_s=0.2)
    world.split(1, weight=0.5)
    router = world.router()
    client = openai_client(router)
    with ThreadPoolExecutor(12) as pool:
        texts = [pool.submit(stream_text, client, f"q{i}") for i in range(12)]
        wait_until("all streams began", lambda: sum(e.status()["requests"] for e in engines) == 12)
        os.kill(router.process.pid, signal.SIGTERM)
        assert {f.result() for f in texts} <= {"tick " * 8, "tock " * 8}
    router.process.wait(20)
    assert len(world.rows()) == 12
    assert not list((world.folder / "log").glob("*.open.jsonl"))
    assert sum(c.n for c in world.evidence().values()) == 12
    assert world.state.routers(60) == []


def test_a_drained_upstream_is_reported_idle_only_when_it_is(world: World) -> None:
    """After a promotion the old stable is reported until its last request ended: a drain can trust it."""
    world.stable.control(tpot_s=0.2)
    world.split(1, canary=None)
    router = world.router(flush_s=0.2)
    holder = threading.Thread(target=stream_text, args=(openai_client(router), "long"))
    holder.start()
    wait_until("it runs", lambda: world.stable.status()["running"] == 1)
    world.split(2, stable=Upstream(name="student", model="small", url=world.canary.url), canary=None)

    def report() -> tuple[int, int]:
        (r,) = world.state.routers(5)
        return r.versions["support"], r.in_flight.get("teacher", 0)

    wait_until("the new version is reported", lambda: report()[0] == 2)
    assert report() == (2, 1)
    holder.join()
    wait_until("the old stable is free", lambda: report() == (2, 0))
    assert world.stable.status()["running"] == 0


def test_a_killed_router_loses_no_row_it_had_flushed(world: World) -> None:
    """The next router closes the segment a killed one left; rows older than a second are all there."""
    world.split(1)
    router = world.router()
    for i in range(20):
        model_of(router, f"q{i}")
    time.sleep(1.2)
    router.kill()
    world.router()
    segments = [f.name for f in (world.folder / "log").glob("*.jsonl")]
    assert [s.endswith(".open.jsonl") for s in segments] == [False]
    assert len(world.rows()) == 20
