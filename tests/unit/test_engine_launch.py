"""What the launcher changes in vLLM, seen on vLLM's own class: the test fails when vLLM changes it."""

from __future__ import annotations

import time

import zmq

from serve.engine.launch import BUSY_S, sleep_between_steps


def test_waiting_processes_sleep_and_wake_on_a_ping() -> None:
    """A reader past its busy time blocks in poll (no spinning) and returns as soon as the writer pings."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    class Condition(SpinCondition):
        """vLLM's, so that the patch does not leak into other tests."""

    sleep_between_steps(Condition)
    context = zmq.Context()
    address = f"inproc://stillhouse-{time.monotonic_ns()}"
    writer = Condition(is_reader=False, context=context, notify_address=address)
    reader = Condition(is_reader=True, context=context, notify_address=address)

    assert reader.busy_loop_s == BUSY_S
    assert reader.last_read > time.monotonic()  # the first second still spins
    reader.last_read = time.monotonic() - 1.0
    began = time.process_time()
    reader.wait(timeout_ms=200)
    assert time.process_time() - began < 0.1
    time.sleep(0.05)
    writer.notify()
    reader.wait(timeout_ms=5000)
    assert reader.poller.poll(timeout=0) == []
