"""`down` leaves nothing, and `up` brings back what was promoted. The last to use the stack."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from serve.stack.record import read_record
from tests.integration.stack_rig import LiveStack, marked_processes, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(600)]


def test_down_leaves_nothing_and_up_brings_the_student_back(stack: LiveStack) -> None:
    """A restart keeps the split: the promoted student's application is deployed again. And after a SIGKILL of
    the supervisor `down` still finds every process of the stack."""
    stable = _stable(stack)
    first = stack.record
    assert len(marked_processes(first.stack_id)) > 8
    stack.down()
    assert marked_processes(first.stack_id) == []
    assert read_record(stack.config) is None
    assert first.ray_dir is not None
    assert not os.path.exists(first.ray_dir)

    stack.up()
    assert _stable(stack) == stable
    assert stack.ask("who is there")
    again = stack.record
    os.kill(again.pid, signal.SIGKILL)
    wait_until("the supervisor is gone", lambda: not again.supervised)
    assert "crashed" in stack.cli("status").stdout
    stack.down()
    assert marked_processes(again.stack_id) == []
    assert not [c for c in psutil.net_connections("tcp") if c.laddr.port == stack.config.http.port and c.pid]


def _stable(stack: LiveStack) -> str:
    split = stack.traffic.get_split("support")
    assert split is not None
    return split.stable.name
