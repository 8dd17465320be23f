"""What the launcher changes in vLLM, seen on vLLM's own class: the test fails when vLLM changes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from serve.engine.launch import BUSY_S, nap_while_busy


@pytest.fixture
def ends() -> Iterator[tuple[Any, Any]]:
    """Writer and reader of one queue, of a class of the test's own so that the patch does not leak."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    class Condition(SpinCondition):
        """vLLM's, patched below."""

    nap_while_busy(Condition)
    context = zmq.Context()
    address = f"inproc://stillhouse-{time.monotonic_ns()}"
    writer = Condition(is_reader=False, context=context, notify_address=address)
    reader = Condition(is_reader=True, context=context, notify_address=address)
    time.sleep(0.05)  # the reader's subscription arrives
    yield writer, reader
    context.destroy(linger=0)


def test_a_busy_reader_naps_instead_of_spinning(ends: tuple[Any, Any]) -> None:
    """While messages are expected a wait takes processor time of almost nothing."""
    _, reader = ends
    reader.record_read()
    used, waits = time.process_time(), 0
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        reader.wait(timeout_ms=5000)
        waits += 1
    assert waits <= 300  # spinning would be tens of thousands
    assert time.process_time() - used < 0.15


def test_a_lost_ping_delays_a_busy_reader_by_one_nap_only(ends: tuple[Any, Any]) -> None:
    """Without any ping the reader looks again after a nap, although it was told it may wait five seconds."""
    _, reader = ends
    reader.record_read()
    reader.wait(timeout_ms=5000)
    assert time.monotonic() < reader.last_read + BUSY_S


def test_an_idle_reader_sleeps_until_the_ping(ends: tuple[Any, Any]) -> None:
    """After the busy second the wait is as long as vLLM asks for, and a ping ends it."""
    writer, reader = ends
    reader.last_read = time.monotonic() - 10 * BUSY_S
    began = time.monotonic()
    reader.wait(timeout_ms=200)
    assert time.monotonic() - began >= 0.19
    writer.notify()
    reader.wait(timeout_ms=60_000)
    assert time.monotonic() - began < 30
