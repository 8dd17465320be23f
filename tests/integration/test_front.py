"""The stack's own two HAProxy processes, real ones, in front of routers' stand-ins: no Ray, no vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from serve.config import ServeConfig
from serve.router.names import host_name
from serve.stack.processes import check_port_free
from serve.state.traffic import RouterReport
from tests.integration.front_rig import ROOT, STACK, FrontWorld, front_config
from tests.integration.router_rig import get, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def front(tmp_path: Path) -> Iterator[FrontWorld]:
    """Both load balancers running, two routers known to them."""
    world = FrontWorld(tmp_path)
    yield world
    world.close()
    assert world.pids() == {}
    check_port_free("127.0.0.1", world.config.http.port)
    shutil.rmtree(world.config.ray_dir)


def kill(front: FrontWorld, *names: str) -> None:
    """SIGKILL them at once and wait until each has a successor."""
    before = front.pids()
    for name in names:
        os.kill(before[name], signal.SIGKILL)
    wait_until("both are back", lambda: sorted(front.pids()) == ["a", "b"] and _changed(front, before, names))


def _changed(front: FrontWorld, before: dict[str, int], names: tuple[str, ...]) -> bool:
    return not any(front.pids()[n] == before[n] for n in names)


def test_either_or_both_killed_under_load_cost_no_request(front: FrontWorld) -> None:
    """SIGKILL of each load balancer in turn, then of both at once, while clients ask without pause: the
    official client with its own two retries sees no failure and no 404, and both routers go on answering."""
    stop, names, failed = threading.Event(), Counter[str](), []

    def ask() -> None:
        client = front.client(max_retries=2)
        while not stop.wait(0.02):
            try:
                names[front.ask(client)] += 1
            except Exception as err:  # noqa: BLE001 reason: every failure counts, whatever it is
                failed.append(repr(err))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for victims in (("a",), ("b",), ("a", "b")):
            answered = names.total()
            wait_until("requests are answered", lambda n=answered: names.total() > n + 40)
            kill(front, *victims)
        answered = names.total()
        wait_until("requests go on", lambda: names.total() > answered + 40)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failed == []
    assert set(names) == {"one", "two"}
    assert front.known("a") == front.known("b") == ["one", "two"]


def test_who_connects_while_both_are_dead_is_answered(front: FrontWorld) -> None:
    """The listening socket outlives both, so that a connection waits for the next one: without any retry no
    request that was sent after the kill fails."""
    for _ in range(5):
        for pid in front.pids().values():
            os.kill(pid, signal.SIGKILL)
        assert front.ask(front.client(max_retries=0)) in ("one", "two")
        wait_until("both are back", lambda: sorted(front.pids()) == ["a", "b"])


def test_a_draining_router_finishes_its_stream_and_gets_nothing_new(front: FrontWorld) -> None:
    """A router that says it drains is asked no more; its stream goes on past the moment it leaves the list,
    and only then is it deleted. A new router is asked."""
    client = front.client(max_retries=0)
    messages = [{"role": "user", "content": "hello"}]
    chunks = client.chat.completions.create(model="support", messages=messages, stream=True)
    # The first chunk is here while the router holds back the second: nothing in between gathers a stream.
    name = next(chunks).choices[0].delta.content
    leaving = next(r for r in front.routers if r.name == name)
    other = next(r for r in front.routers if r is not leaving)
    leaving.tell("/status/503")
    wait_until("only the other is asked", lambda: {front.ask(client) for _ in range(8)} == {other.name})
    front.leave(leaving)
    wait_until("one of them still has it", lambda: name in front.leaving("a") + front.leaving("b"))
    assert {front.ask(client) for _ in range(8)} == {other.name}
    leaving.tell("/go")
    assert [c.choices[0].delta.content for c in chunks] == ["the end"]
    wait_until("it is deleted", lambda: [front.known("a"), front.known("b")] == [[other.name]] * 2)
    front.routers.append(leaving)
    leaving.tell("/status/200")
    wait_until("it is asked again", lambda: {front.ask(client) for _ in range(8)} == {"one", "two"})


def test_a_killed_router_is_forgotten_at_once(front: FrontWorld) -> None:
    """Its process is gone, so it leaves the list although its last report is fresh; without retries by the
    client no request sent after that fails."""
    victim = front.routers.pop()
    victim.kill()
    wait_until("both forgot it", lambda: [front.known("a"), front.known("b")] == [["one"]] * 2)
    client = front.client(max_retries=0)
    assert {front.ask(client) for _ in range(20)} == {"one"}


def test_a_router_of_another_machine_is_not_asked(front: FrontWorld) -> None:
    """Machines may share a state store: the address in a report is good on the machine it was written on, and
    the process id as well."""
    victim = front.routers[1]
    there = {"address": "127.0.0.1:1", "pid": os.getpid(), "stack": STACK}
    front.state.report_router(RouterReport(replica=f"elsewhere-{os.getpid()}-x", **there))
    front.leave(victim)
    wait_until("both were told", lambda: [front.known("a"), front.known("b")] == [["one"]] * 2)


def test_a_router_of_another_stack_is_not_asked(front: FrontWorld) -> None:
    """Two clusters of one state store, as while traffic moves from one to the other: each front has its own
    routers, on one machine as well."""
    here = {"address": "127.0.0.1:1", "pid": os.getpid(), "stack": "another"}
    front.state.report_router(RouterReport(replica=f"{host_name()}-{os.getpid()}-x", **here))
    front.leave(front.routers[1])
    wait_until("both were told", lambda: [front.known("a"), front.known("b")] == [["one"]] * 2, 30)


def test_a_router_killed_with_requests_in_it_costs_none_of_them(front: FrontWorld) -> None:
    """SIGKILL of a router that has begun no answer: the other one is given its requests, and a client that
    retries nothing never hears of it. Feedback, which it may have stored, is not given twice."""
    one, two = front.routers
    one.tell("/go")  # answers at once what the other one holds
    client = front.client(max_retries=0)

    def note(_: int) -> int:
        return httpx.post(f"{front.url}/v1/feedback", json={"wait": True}, timeout=60).status_code

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(front.ask, client, extra_body={"wait": True}) for _ in range(8)]
        noted = [pool.submit(note, i) for i in range(8)]
        # Each goes to the one with fewer requests, so that the second, which answers none, has some of both.
        waiting = [*asked, *noted]
        wait_until("the rest is answered", lambda: sum(not f.done() for f in waiting) == len(two.held()) > 0)
        held = Counter(two.held())
        two.kill()
        assert [a.result(60) for a in asked] == ["one"] * 8
        lost = held["/v1/feedback"]
        assert [n.result(60) for n in noted].count(502) == lost
    assert held["/v1/chat/completions"] > 0


def test_rays_own_haproxy_stands_in_and_its_404_is_never_seen(front: FrontWorld) -> None:
    """Where no router reported itself the requests go through Ray's HAProxy; what that answers before it
    knows its routes comes to the client as a 503 in OpenAI's shape, which its own retries survive."""
    for router in list(front.routers):
        front.leave(router)
    wait_until("no router is known", lambda: front.known("a") == front.known("b") == [])
    reply = httpx.get(f"{front.url}/v1/models", timeout=20)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_router")
    assert reply.headers["retry-after"] == "1"
    front.ray.tell("/status/200")
    wait_until("Ray's answers pass", lambda: get(f"{front.url}/health") == (200, "ray"))


def test_requests_pass_unchanged_whatever_their_size(front: FrontWorld) -> None:
    """A body of three megabytes arrives whole, and the router sees the client's headers and no other."""
    headers = {
        "x-stillhouse-arm": "stable",
        "user-agent": "me",
        "accept": "*/*",
        "accept-encoding": "identity",
    }
    body = {"model": "support", "text": "ü" * 1_500_000}
    reply = httpx.post(f"{front.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    seen = reply.json()["seen"]
    assert seen["bytes"] == len(json.dumps(body))
    assert set(seen["headers"]) == {*headers, "host", "content-length", "content-type"}


_ALONE = """
import json, sys, time
from serve.config import ServeConfig
from serve.stack.front import Front
front = Front(ServeConfig.model_validate(json.loads(sys.argv[1])), 1, "it")
front.bind()
front.start()
print("started", flush=True)
time.sleep(60)
"""


def test_both_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    """SIGKILL of the process that owns them leaves no process and a free port."""
    data = front_config(tmp_path)
    config = ServeConfig.model_validate(data)
    config.log_dir.mkdir(parents=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _ALONE, json.dumps(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "started\n"
        pair = psutil.Process(owner.pid).children()
        assert len(pair) == 2
        assert get(f"http://127.0.0.1:{config.http.port}/v1/models")[0] == 503
        owner.kill()
        _, alive = psutil.wait_procs(pair, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    check_port_free("127.0.0.1", config.http.port)
    shutil.rmtree(config.ray_dir)
