"""An adapter's rollout on a real stack: no engine of its own, on both replicas of its base, gone again."""

from __future__ import annotations

import os
import signal

import pytest

from benchmarks.adapters.make import make_adapter
from serve.engine.adapters import served
from tests.integration.stack_rig import LiveStack, request_rows, wait_until
from tests.integration.test_stack_kills import load

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(600)]
BASE = "upstream-teacher"


def test_an_adapter_is_canaried_on_its_bases_engines_and_leaves_without_a_trace(stack: LiveStack) -> None:
    """Started like every student; each replica of the base has it, one that was killed has it again, clients
    see no error, and after the rollback neither registration nor adapter is left."""
    folder = make_adapter(stack.teacher, stack.folder / "adapter", seed=3)
    ref = stack.publish_student("adapter", folder)

    engines = _engines(stack)
    assert engines >= 2

    def urls(app: str) -> set[str]:
        return {e.url for e in stack.traffic.endpoints(5).get(app, [])}

    def hosts() -> bool:
        """Whether every replica of the base is the adapter's too."""
        return len(urls(BASE)) == 2 and urls("adapter-v1") == urls(BASE)

    with load(stack, model="adapted") as seen:
        stack.cli("rollout", "start", "adapted", ref)
        wait_until("the adapter is on both replicas", hosts, 120)
        wait_until("its canary is asked", lambda: _answers(stack) >= 5, 120)
        stack.cli("rollout", "pause", "adapted")
        assert _engines(stack) == engines
        before = urls(BASE)
        os.kill(stack.replica_pids(BASE)[0], signal.SIGKILL)
        wait_until("a new replica has it", lambda: hosts() and bool(urls("adapter-v1") - before), 240)
        stack.cli("rollout", "abort", "adapted", "--reason", "the test has seen enough")
        wait_until("it is thrown back", lambda: stack.last_rollout().status.phase.terminal, 60)
        wait_until("its registrations are gone", lambda: not urls("adapter-v1"), 60)
        wait_until("no engine has it", lambda: not any(served(u).adapters for u in urls(BASE)), 60)
    assert stack.last_rollout().status.decision == "aborted"
    assert seen.failed == []
    assert seen.answered > 20


def _answers(stack: LiveStack) -> int:
    """Requests that the adapter has answered."""
    rows = request_rows(stack.config)
    return sum(row["upstream"] == "adapter-v1" and row["outcome"] == "ok" for row in rows)


def _engines(stack: LiveStack) -> int:
    """vLLM servers of the stack."""
    return sum("serve.engine.launch" in title for title in stack.processes().values())
