"""What the launcher changes in vLLM, seen on vLLM's own class: the tests fail when vLLM changes it.

In a process of its own: vLLM's libraries complain at the end of a process that imported them, after pytest's
summary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.engine.launch import BUSY_S

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, sys, time, zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from serve.engine.launch import nap_while_busy

nap_while_busy(SpinCondition)
context, address = zmq.Context(), "inproc://stillhouse"
writer = SpinCondition(is_reader=False, context=context, notify_address=address)
reader = SpinCondition(is_reader=True, context=context, notify_address=address)
time.sleep(0.05)  # the reader's subscription arrives
seen = {}

reader.record_read()
used, until, waits = time.process_time(), time.monotonic() + 0.3, 0
while time.monotonic() < until:
    reader.wait(timeout_ms=5000)
    waits += 1
seen["waits_in_0.3_s"], seen["cpu_s"] = waits, time.process_time() - used

reader.record_read()
began = time.monotonic()
reader.wait(timeout_ms=5000)
seen["busy_wait_s"] = time.monotonic() - began

reader.last_read = time.monotonic() - 10
began = time.monotonic()
reader.wait(timeout_ms=200)
seen["idle_wait_s"] = time.monotonic() - began
writer.notify()
began = time.monotonic()
reader.wait(timeout_ms=60_000)
seen["pinged_wait_s"] = time.monotonic() - began
print(json.dumps(seen), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, float]:
    """How long a reader of vLLM's queue waited, and what that cost."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_busy_reader_naps_instead_of_spinning(seen: dict[str, float]) -> None:
    """While messages are expected, waiting takes next to no processor time."""
    assert seen["waits_in_0.3_s"] <= 300  # spinning would be tens of thousands
    assert seen["cpu_s"] < 0.15


def test_a_lost_ping_delays_a_busy_reader_by_one_nap_only(seen: dict[str, float]) -> None:
    """Without any ping the reader looks again after a nap, although it was told it may wait five seconds."""
    assert seen["busy_wait_s"] < BUSY_S


def test_an_idle_reader_sleeps_until_the_ping(seen: dict[str, float]) -> None:
    """After the busy second the wait is as long as vLLM asks for, and a ping ends it."""
    assert seen["idle_wait_s"] >= 0.19
    assert seen["pinged_wait_s"] < 30
