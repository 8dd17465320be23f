"""SIGKILL under load: an engine replica, a router, HAProxys, the controller in mid-ramp. Nobody notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from openai import APIError

from contracts.rollout import Phase
from serve.app import CONTROLLER_APP, ROUTER_APP
from tests.integration.stack_rig import LiveStack, family, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(900)]


@dataclass
class Load:
    """What background clients saw."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    streamed: int = 0
    broken: list[str] = field(default_factory=list)
    """Streams that ended with an error event."""
    silent: list[str] = field(default_factory=list)
    """Streams that ended any other way than whole or with an error event."""


def conversation(model: str = "support") -> dict[str, Any]:
    return {
        "model": model,
        "max_tokens": 24,
        "messages": [{"role": "user", "content": f"conversation {time.monotonic_ns()}"}],
        "extra_body": {"ignore_eos": True},
    }


def ask_whole(client: Any, seen: Load, model: str) -> None:
    try:
        client.chat.completions.create(**conversation(model))
        seen.answered += 1
    except Exception as err:  # noqa: BLE001 reason: every failure counts, whatever it is
        seen.failed.append(repr(err)[:300])


def ask_streaming(client: Any, seen: Load, model: str) -> None:
    finished = False
    try:
        for chunk in client.chat.completions.create(**conversation(model), stream=True):
            finished = finished or bool(chunk.choices and chunk.choices[0].finish_reason)
    except APIError as err:
        event = type(err) is APIError or err.code in ("broken_stream", "timeout")
        (seen.broken if event else seen.silent).append(repr(err)[:300])
        return
    except Exception as err:  # noqa: BLE001 reason: whatever else ends a stream is a silent end to its user
        seen.silent.append(repr(err)[:300])
        return
    seen.streamed += 1
    if not finished:
        seen.silent.append("no finish_reason")


@contextmanager
def load(
    stack: LiveStack, per_second: float = 8.0, streams: bool = False, model: str = "support", **client: Any
) -> Iterator[Load]:
    """Conversations that keep coming, four at a time, each a new one, until the block ends."""
    seen, stop = Load(), threading.Event()

    def run(number: int) -> None:
        mine = stack.client(**client)
        while not stop.wait(4 / per_second):
            (ask_streaming if streams and number % 2 else ask_whole)(mine, seen, model)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_killed_engine_replica_costs_no_request_and_comes_back_without_orphans(stack: LiveStack) -> None:
    """SIGKILL of one of two replicas under load: its vLLM goes with it, requests go to the other one, streams
    that were in it end with an error event, and Ray Serve starts it again."""
    app = "upstream-teacher"
    before = {e.url for e in stack.traffic.endpoints()[app]}
    replica = stack.replica_pids(app)[0]
    vllm = family(replica)[1:]
    assert len(vllm) >= 3
    with load(stack, 12, streams=True) as seen:
        wait_until("requests are answered", lambda: seen.answered > 10 and seen.streamed > 10)
        os.kill(replica, signal.SIGKILL)
        _, alive = psutil.wait_procs(vllm, timeout=30)
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

        def back() -> bool:
            fresh = {e.url for e in stack.traffic.endpoints(5).get(app, [])}
            return len(fresh) == 2 and bool(fresh - before)

        wait_until("a new replica is registered", back, 240)
        answered = seen.answered
        wait_until("requests go on", lambda: seen.answered > answered + 10)
    assert seen.failed == []
    assert seen.silent == []
    assert len(seen.broken) <= 2  # no more than were running in it


def test_a_killed_router_replica_costs_no_request(stack: LiveStack) -> None:
    """SIGKILL of one of two routers: the unchanged client (it retries by itself) sees no failure."""
    replica = stack.replica_pids(ROUTER_APP)[0]
    with load(stack, 12, max_retries=2) as seen:
        wait_until("requests are answered", lambda: seen.answered > 10)
        os.kill(replica, signal.SIGKILL)
        wait_until("it is back", lambda: len(set(stack.replica_pids(ROUTER_APP)) - {replica}) == 2, 120)
        answered = seen.answered
        wait_until("requests go on", lambda: seen.answered > answered + 20)
    assert seen.failed == []


def _kill_balancers(
    stack: LiveStack, seen: Load, which: Callable[[LiveStack], list[int]], streaming: int
) -> None:
    """SIGKILL them at once under load and wait until each has a successor that works.

    Streams that ran through one are cut off (a killed process writes no error event; the official client
    raises for a connection that ends in the middle of a body), and no other stream is.
    """
    wait_until("requests are answered", lambda: seen.answered > 10 and seen.streamed > 10 * bool(streaming))
    # Ray starts another whenever its replicas change, and lets the old one finish: that one is no victim.
    wait_until("there is one of Ray's", lambda: len(stack.rays_haproxy_pids()) == 1, 240)
    answered, streamed, cut = seen.answered, seen.streamed, len(seen.silent)
    victims = which(stack)
    for pid in victims:
        with suppress(
            ProcessLookupError
        ):  # Ray's may be replaced at this very moment: its successor is waited for
            os.kill(pid, signal.SIGKILL)
    wait_until("each has a successor", lambda: _replaced(stack, victims), 120)
    wait_until("requests go on", lambda: seen.answered > answered + 20, 120)
    wait_until("streams go on", lambda: seen.streamed > streamed + 10 * bool(streaming), 120)
    assert len(seen.silent) - cut <= streaming
    assert all("incomplete chunked read" in why or "Connection" in why for why in seen.silent), seen.silent


def _replaced(stack: LiveStack, victims: list[int]) -> bool:
    fronts, rays = stack.front_pids(), stack.rays_haproxy_pids()
    return len(fronts) == 2 and bool(rays) and not {*fronts, *rays} & set(victims)


VICTIMS: dict[str, Callable[[LiveStack], list[int]]] = {
    "first": lambda stack: stack.front_pids()[:1],
    "second": lambda stack: stack.front_pids()[1:],
    "both": lambda stack: stack.front_pids(),
    "both and Ray's": lambda stack: [*stack.front_pids(), *stack.rays_haproxy_pids()],
    "Ray's": lambda stack: stack.rays_haproxy_pids(),
}


@pytest.mark.parametrize("which", ["first", "second", "both", "both and Ray's"])
def test_a_killed_haproxy_costs_no_request(stack: LiveStack, which: str) -> None:
    """SIGKILL of either of the stack's two load balancers under load, of both at once, and of Ray Serve's own
    with them: the unchanged client (it retries by itself) sees no failure, least of all a 404."""
    with load(stack, 12, streams=True, max_retries=2) as seen:
        _kill_balancers(stack, seen, VICTIMS[which], streaming=2)
    assert seen.failed == []
    assert seen.broken == []


def test_nobody_notices_when_rays_haproxy_is_killed(stack: LiveStack) -> None:
    """No request goes through it, so its seconds of absence and of 404 cost nothing: no request and no stream
    fails although the client retries nothing."""
    with load(stack, 12, streams=True) as seen:
        _kill_balancers(stack, seen, VICTIMS["Ray's"], streaming=2)
    assert seen.failed == []
    assert seen.broken == []
    assert seen.silent == []


def test_a_killed_controller_resumes_the_ramp_and_promotes(stack: LiveStack) -> None:
    """The controller's memory is the store: killed in mid-ramp it is back in seconds, with the same rollout,
    and the student still takes the route over while no client sees an error."""
    ref = stack.publish_student()
    with load(stack) as seen:
        stack.cli("rollout", "start", "support", ref)
        started = stack.last_rollout().spec.id
        ramping = (Phase.RAMPING, Phase.HELD)
        wait_until("ramping", lambda: stack.last_rollout().status.phase in ramping, 300)
        killed_at = stack.last_rollout().status
        killed = stack.replica_pid(CONTROLLER_APP)
        os.kill(killed, signal.SIGKILL)
        wait_until("ticks go on", lambda: stack.last_rollout().status.ticks > killed_at.ticks + 1, 120)
        wait_until("a decision", lambda: stack.last_rollout().status.phase.terminal, 240)
    status = stack.last_rollout().status
    assert stack.last_rollout().spec.id == started
    assert status.decision == "promoted", status.reason
    assert stack.replica_pid(CONTROLLER_APP) != killed
    assert seen.failed == []
    assert seen.answered > 30
    split = stack.traffic.get_split("support")
    assert split is not None
    assert (split.stable.name, split.canary, split.weight) == ("tiny-v1", None, 0.0)
    steps = [e.body for e in stack.rollouts.audit(started)]
    assert len(steps) >= status.ticks - 1
    # The student's engine was deployed from the controller's process and must not count into its files.
    assert "vllm:" not in stack.metrics()
