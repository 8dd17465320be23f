"""SIGKILL where it hurts: an engine replica, the controller in mid-ramp. Nobody notices for long."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import pytest

from contracts.rollout import Phase
from serve.app import CONTROLLER_APP
from tests.integration.stack_rig import LiveStack, family, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@dataclass
class Load:
    """What a background client saw."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def load(stack: LiveStack, per_second: float = 8.0) -> Iterator[Load]:
    """Conversations that keep coming, each a new one, until the block ends."""
    seen, stop = Load(), threading.Event()

    def run() -> None:
        client = stack.client()
        while not stop.wait(1 / per_second):
            try:
                client.chat.completions.create(
                    model="support",
                    max_tokens=4,
                    messages=[{"role": "user", "content": f"conversation {time.monotonic_ns()}"}],
                )
                seen.answered += 1
            except Exception as err:  # noqa: BLE001 - every failure counts, whatever it is
                seen.failed.append(repr(err))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(60)


def test_a_killed_engine_replica_comes_back_without_orphans(stack: LiveStack) -> None:
    """SIGKILL of a replica takes its vLLM with it at once, and Ray Serve starts both again."""
    app = "upstream-teacher"
    replica = stack.replica_pid(app)
    vllm = family(replica)[1:]
    assert len(vllm) >= 3
    os.kill(replica, signal.SIGKILL)
    _, alive = psutil.wait_procs(vllm, timeout=30)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    pids = {p.pid for p in vllm}

    def back() -> bool:
        fresh = stack.traffic.endpoints(5).get(app, [])
        return len(fresh) == 1 and fresh[0].pid not in pids

    wait_until("a new replica is registered", back, 240)
    wait_until("a router has seen it", stack.ready, 10)
    time.sleep(0.5)  # so has the other one: they look every 0.2 s
    assert stack.ask("are you back")


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
        at = time.monotonic()
        wait_until("ticks go on", lambda: stack.last_rollout().status.ticks > killed_at.ticks + 1, 120)
        resumed_s = time.monotonic() - at
        wait_until("a decision", lambda: stack.last_rollout().status.phase.terminal, 240)
    status = stack.last_rollout().status
    assert stack.last_rollout().spec.id == started
    assert status.decision == "promoted", status.reason
    assert stack.replica_pid(CONTROLLER_APP) != killed
    assert resumed_s < 60
    assert seen.failed == []
    assert seen.answered > 30
    split = stack.traffic.get_split("support")
    assert split is not None
    assert (split.stable.name, split.canary, split.weight) == ("tiny-v1", None, 0.0)
    steps = [e.body for e in stack.rollouts.audit(started)]
    assert len(steps) >= status.ticks - 1
