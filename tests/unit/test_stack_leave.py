"""The preStop of a Ray pod: drains its node, waits for the replicas to go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.stack import leave

SLEEPER = "import sys; sys.stdin.read()"


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ray` on PATH that notes its arguments; it fails where the file `refuse` lies beside it."""
    script = tmp_path / "ray"
    lines = ["#!/bin/sh", f'echo "$@" > {tmp_path}/asked', f"[ -e {tmp_path}/refuse ] || exit 0"]
    script.write_text("\n".join([*lines, "echo not now >&2", "exit 1\n"]))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_node_without_replicas_is_drained_and_left(ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is asked to drain with the deadline of the pod; nothing is waited for."""
    monkeypatch.setattr(leave, "replicas_here", list)
    assert leave.main(["--timeout-s", "120"]) == 0
    asked = (ray / "asked").read_text().split()
    assert asked[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert asked[-2:] == ["--deadline-remaining-seconds", "120"]


def test_it_waits_for_the_replicas_of_this_machine() -> None:
    """A replica is known by the title that Ray gives its process, and is waited for until it ended."""
    title = f"{leave.REPLICA}test-{os.getpid()}:engine#1"
    with subprocess.Popen(
        [title, "-c", SLEEPER], executable=sys.executable, stdin=subprocess.PIPE
    ) as process:
        assert any(one.startswith(title) for one in leave.replicas_here())

        def mine() -> list[str]:
            found = [one for one in leave.replicas_here() if one.startswith(title)]
            process.terminate()  # Serve ends it in its own time
            process.wait()
            return found

        assert leave.wait_gone(60, mine)
    assert not any(one.startswith(title) for one in leave.replicas_here())


def test_what_did_not_go_in_time_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Kubernetes ends the pod then; its log says whose requests were cut."""
    assert not leave.wait_gone(0, lambda: ["ray::ServeReplica:upstream-teacher:engine#1"])
    assert "upstream-teacher" in capsys.readouterr().err


def test_a_node_that_ray_does_not_drain_is_not_waited_for(
    ray: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that is gone must not hold its workers' pods for two minutes each."""
    (ray / "refuse").touch()
    assert leave.main(["--timeout-s", "600"]) == 1
    assert "not now" in capsys.readouterr().err
