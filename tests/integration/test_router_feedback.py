"""Feedback and log policies on real routers: any replica takes it, kills lose little, erasures are whole."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.feedback import Feedback
from serve.state.feedback import FeedbackState
from serve.state.tables import open_state
from tests.integration.router_rig import ROOT, Server, World, get, post, total, wait_until

pytestmark = pytest.mark.integration
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"


def ask(router: Server, text: str = "x", **headers: str) -> str:
    """One answered request; returns its id."""
    body = {"model": "support", "messages": [{"role": "user", "content": text}], "user": "ann"}
    status, _, answered = post(f"{router.url}{CHAT}", body, **headers)
    assert status == 200
    return answered["x-request-id"]


def judge(router: Server, request_id: str, **fields: Any) -> tuple[int, Any]:
    status, reply, _ = post(f"{router.url}{FEEDBACK}", {"request_id": request_id, **fields})
    return status, reply


def judgements(world: World, *request_ids: str) -> list[Feedback]:
    return FeedbackState(open_state(world.state_url)).feedback_on(request_ids)


def lines(world: World) -> list[dict[str, Any]]:
    files = sorted((world.folder / "log").glob("feedback-*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


def test_every_router_takes_feedback_on_every_request(world: World) -> None:
    """At once, before any id was stored, on the router that answered and on the other one; a retry on either
    is the same judgement; a request nobody answered is unknown.
    """
    world.split(1, weight=1.0)
    first, second = world.router(multiproc=True), world.router(multiproc=True)
    mine, other = ask(first), ask(first)
    created = {"object": "feedback", "id": mine, "request_id": mine, "status": "created"}
    assert judge(first, mine, good=True) == (200, created)
    assert judge(second, other, good=False, comment="wrong")[1]["status"] == "created"
    assert judge(second, mine, good=True) == (200, {**created, "status": "unchanged"})
    assert judge(second, mine, good=False)[1]["status"] == "updated"
    assert judge(first, other, id=mine, good=True)[0] == 409
    status, refused = judge(second, "req-nobody", good=True)
    assert (status, refused["error"]["code"], refused["error"]["param"]) == (
        404, "request_not_found", "request_id",
    )  # fmt: skip
    assert judge(first, mine)[0] == 400
    scrape = get(f"{second.url}/metrics")[1]
    canary = {"route": "support", "arm": "canary"}
    assert total(scrape, "stillhouse_feedback_total", **canary, verdict="good") == 1
    assert total(scrape, "stillhouse_feedback_total", **canary, verdict="bad") == 1
    assert total(scrape, "stillhouse_feedback_total") == 2
    assert total(scrape, "stillhouse_requests_total", endpoint=FEEDBACK, outcome="rejected") == 3
    for router in (first, second):
        router.stop()
    assert [(f.request_id, f.good) for f in judgements(world, mine, other)] == [(other, False), (mine, False)]
    assert [(r["request_id"], r["good"], r["arm"]) for r in sorted(lines(world), key=lambda r: r["ts"])] == [
        (mine, True, "canary"), (other, False, "canary"), (mine, False, "canary"),
    ]  # fmt: skip
    assert not list((world.folder / "log").glob("*.open.jsonl"))


def test_feedback_can_be_switched_off(world: World) -> None:
    """Without it there is no such path, and no id is stored."""
    world.split(1)
    router = world.router(feedback=False)
    assert judge(router, ask(router), good=True)[0] == 404
    assert get(f"{router.url}{FEEDBACK}")[0] == 404
    assert get(f"{world.router().url}{FEEDBACK}")[0] == 405


def test_killed_routers_lose_no_feedback_and_no_flushed_row(world: World) -> None:
    """SIGKILL under load: ids and rows older than a second are there, no line is torn, and what was accepted
    is in the store; the survivor takes feedback on the dead one's requests.
    """
    world.split(1)
    victim, survivor = world.router(flush_s=0.3), world.router(flush_s=0.3)
    answered: list[tuple[str, float]] = []
    accepted: list[str] = []

    def load() -> None:
        while True:
            try:
                request_id = ask(victim)
                answered.append((request_id, time.time()))
                if judge(victim, request_id, good=True)[0] == 200:
                    accepted.append(request_id)
            except OSError:  # it was killed
                return

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until("there are requests older than a second", lambda: _older(answered, time.time() - 1.5) > 20)
    killed_at = time.time()
    victim.kill()
    for thread in threads:
        thread.join()
    safe = [request_id for request_id, at in answered if at < killed_at - 1.0]
    world.router()  # closes what the dead one left
    rows = world.rows()  # reads every line: a torn one would raise
    assert {r["request_id"] for r in rows} >= set(safe)
    assert len({r["request_id"] for r in rows}) == len(rows)
    assert {f.request_id for f in judgements(world, *accepted)} == set(accepted)
    assert {r["request_id"] for r in lines(world)} >= set(safe) & set(accepted)
    assert judge(survivor, safe[-1], id="late", comment="late")[1]["status"] == "created"


def _older(answered: list[tuple[str, float]], than: float) -> int:
    return sum(at < than for _, at in answered)


def test_an_erased_user_is_gone_from_log_uploads_and_feedback(world: World, tmp_path: Path) -> None:
    """The command finds a user's rows wherever they are while routers run: final, uploaded and open segments,
    feedback and its store; everybody else's stay.
    """
    world.split(1)
    far = tmp_path / "far"
    log = {"dir": str(world.folder / "log"), "rotate_s": 0.5, "upload": f"file://{far}", "keep_local": False}
    router = world.router(log=log)
    by_ann = [ask(router), ask(router, x_stillhouse_conversation="c1")]
    body = {"model": "support", "messages": [{"role": "user", "content": "y"}], "user": "bob"}
    by_bob = post(f"{router.url}{CHAT}", body)[2]["x-request-id"]
    for request_id in (*by_ann, by_bob):
        assert judge(router, request_id, good=True, comment="mine")[0] == 200

    def uploaded() -> set[str]:
        return {r["request_id"] for r in _lines_of(far)}

    wait_until("all is uploaded", lambda: uploaded() == {*by_ann, by_bob} and len(_lines_of(far)) == 6)
    last = ask(router)
    said = _erase(world, log, "--user", "ann")
    assert "Feedback erased from the state store: 2." in said
    router.stop()
    assert {r["request_id"] for r in _lines_of(far)} == {by_bob}
    assert last not in uploaded()
    assert not list((world.folder / "log").glob("*.jsonl"))
    assert [f.request_id for f in judgements(world, *by_ann, by_bob)] == [by_bob]


def _lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for f in sorted(folder.glob("*.jsonl")) for line in f.read_text().splitlines()]


def _erase(world: World, log: dict[str, Any], *arguments: str) -> str:
    """Run `stillhouse log erase` against the world's state and log."""
    file = world.folder / "stack.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(world.folder / "run"),
                "state_url": world.state_url,
                "upstreams": {"teacher": {"url": "http://127.0.0.1:9", "model": "m"}},
                "routes": {"support": "teacher"},
                "router": {"log": log},
            }
        )
    )
    command = [sys.executable, "-m", "cli.main", "log", "erase", *arguments, "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exactly_one_target_is_asked_for(world: World) -> None:
    """Erasing is for good, so a command line that could mean two things is refused."""
    file = world.folder / "none.yaml"
    command = [sys.executable, "-m", "cli.main", "log", "erase", "--user", "a", "--request", "b"]
    done = subprocess.run(
        [*command, "--config", str(file)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=60
    )
    assert (done.returncode, "exactly one of" in done.stderr) == (1, True)
