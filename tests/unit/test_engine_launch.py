"""What the launcher changes in vLLM, seen on vLLM's own class: the tests fail when vLLM changes it.

In a process of its own: vLLM's libraries complain at the end of a process that imported them, after pytest's
summary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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

import inspect, torch
from vllm.v1.sample import rejection_sampler
from serve.engine.launch import expand_for_drafts
both = (expand_for_drafts, rejection_sampler.expand_batch_to_tokens)
ours, theirs = (list(inspect.signature(f).parameters) for f in both)
seen["same_arguments"] = ours == theirs
rows, ends = torch.tensor([0.5, 0.0, 1.5]), torch.tensor([2, 2, 5], dtype=torch.int32)
seen["temperatures"] = expand_for_drafts(rows, ends, 5, 0, 1).tolist()
ends = torch.tensor([1, 3, 4], dtype=torch.int32)
seen["greedy_as_one"] = expand_for_drafts(rows, ends, 4, 0, 1).tolist()
seen["top_k"] = expand_for_drafts(torch.tensor([7, 9], dtype=torch.int32), ends[:2], 3).tolist()

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from serve.engine.launch import keep_base_plain
keep_base_plain([lora_ops, punica_cpu])
shrunk, ones = torch.full((3, 2), 9.0), torch.ones(3, 4)
adapters = torch.stack([torch.full((1, 2, 4), 1.0), torch.full((1, 2, 4), 10.0)])
punica_cpu.bgmv_shrink(ones, adapters, shrunk, torch.tensor([0, -1, 1]), 0.5)
seen["shrunk_in_decode"] = shrunk.tolist()
lengths, slots = torch.tensor([2, 1]), torch.tensor([-1, 1])
shrunk = torch.full((3, 2), 9.0)
punica_cpu.sgmv_shrink(ones, adapters, shrunk, None, lengths, slots, 2, 2, 3, 0.5)
seen["shrunk_in_prefill"] = shrunk.tolist()
print(json.dumps(seen), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """How long a reader of vLLM's queue waited, what that cost, and how drafted tokens are sampled."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_busy_reader_naps_instead_of_spinning(seen: dict[str, Any]) -> None:
    """While messages are expected, waiting takes next to no processor time."""
    assert seen["waits_in_0.3_s"] <= 300  # spinning would be tens of thousands
    assert seen["cpu_s"] < 0.15


def test_a_lost_ping_delays_a_busy_reader_by_one_nap_only(seen: dict[str, Any]) -> None:
    """Without any ping the reader looks again after a nap, although it was told it may wait five seconds."""
    assert seen["busy_wait_s"] < BUSY_S


def test_an_idle_reader_sleeps_until_the_ping(seen: dict[str, Any]) -> None:
    """After the busy second the wait is as long as vLLM asks for, and a ping ends it."""
    assert seen["idle_wait_s"] >= 0.19
    assert seen["pinged_wait_s"] < 30


def test_every_drafted_token_is_sampled_as_its_request_asked(seen: dict[str, Any]) -> None:
    """Temperatures keep their fractions and top-k its numbers, one for each drafted token, requests without a
    draft left out; and the function is called as vLLM calls its own."""
    assert seen["same_arguments"]
    assert seen["temperatures"] == [0.5, 0.5, 1.5, 1.5, 1.5]
    assert seen["greedy_as_one"] == [0.5, 1.0, 1.0, 1.5]
    assert seen["top_k"] == [7, 9, 9]


def test_beside_an_adapters_requests_the_base_stays_the_base(seen: dict[str, Any]) -> None:
    """Slot -1 is no adapter, in steps and in prompts: nothing of the last slot's adapter is added to it."""
    assert seen["shrunk_in_decode"] == [[2.0, 2.0], [0.0, 0.0], [20.0, 20.0]]
    assert seen["shrunk_in_prefill"] == [[0.0, 0.0], [0.0, 0.0], [20.0, 20.0]]
