"""The command line: quick help, one-line errors, the right things when nothing runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from contracts.errors import ConfigError
from serve.config import load_serve_config
from serve.stack.processes import MARKER, check_port_free, end_processes, stack_processes
from serve.stack.record import StackRecord, ray_environment, read_record, write_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A minimal configuration whose run folder is the test's own."""
    file = tmp_path / "stack.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(tmp_path / "run"),
                "upstreams": {"teacher": {"url": "http://127.0.0.1:9", "model": "m"}},
                "routes": {"support": "teacher"},
            }
        )
    )
    return file


def stillhouse(*arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("STILLHOUSE_")}
    env["PYTHONPATH"] = str(ROOT)
    if config is not None:
        env["STILLHOUSE_CONFIG"] = str(config)
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False, timeout=60)


def test_help_lists_every_verb_and_loads_nothing_heavy() -> None:
    """--help answers in a blink because no command's package is imported for it."""
    code = (
        "import sys\nfrom cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'ray', 'vllm', 'torch', 'sqlalchemy', 'mlflow', 'psutil'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout.rstrip().endswith("set()")
    for verb in ("up", "down", "status", "distill", "rollout", "version"):
        assert verb in said.stdout


def test_mounted_commands_are_the_real_ones() -> None:
    """`rollout` and `distill` live in other packages; the placeholder must never be what runs."""
    rollout = stillhouse("rollout", "--help")
    assert "promote" in rollout.stdout
    assert "watch" in rollout.stdout
    distill = stillhouse("distill", "--help")
    assert "--workdir" in distill.stdout
    assert "CONFIG" in distill.stdout


def test_our_errors_are_one_line_and_exit_1(tmp_path: Path) -> None:
    """No traceback for a mistake of the user; STILLHOUSE_DEBUG=1 shows it."""
    done = stillhouse("status", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: ")
    assert "Traceback" not in done.stderr
    env = {**os.environ, "STILLHOUSE_DEBUG": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli.main", "status", "--config", str(tmp_path / "none.yaml")]
    debug = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)
    assert "Traceback" in debug.stderr


def test_down_and_status_without_a_stack(config_file: Path) -> None:
    """Both are safe to call at any time."""
    down = stillhouse("down", config=config_file)
    assert (down.returncode, "No stack runs" in down.stdout) == (0, True)
    status = stillhouse("status", config=config_file)
    assert status.returncode == 0
    assert status.stdout.startswith("down")


def test_a_taken_port_is_named_with_its_holder() -> None:
    """The error says who listens there and how to choose another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port} is taken by pid {os.getpid()} .*--port"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)


def test_processes_are_found_by_marker_with_their_children() -> None:
    """`down` ends what carries the stack's marker and what such a process started; never anything else."""
    nap = "import time; time.sleep(600)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {nap!r}], env={{}}).wait()"
    mine = subprocess.Popen([sys.executable, "-c", child], env={**os.environ, MARKER: "test-mine"})
    other = subprocess.Popen([sys.executable, "-c", nap], env={**os.environ, MARKER: "test-other"})
    try:
        deadline = time.monotonic() + 20
        while len(stack_processes("test-mine")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(stack_processes("test-mine")) == 2
        assert end_processes("test-mine", grace_s=2) == 2
        mine.wait(10)
        assert stack_processes("test-mine") == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_record_knows_whether_its_supervisor_lives(config_file: Path) -> None:
    """A pid that was used again by another process is not our supervisor."""
    config = load_serve_config(config_file)
    assert read_record(config) is None
    me = psutil.Process()
    record = StackRecord(
        stack_id="s", pid=me.pid, pid_started=me.create_time(), url="u", config="c", started_at=0.0
    )
    write_record(config, record)
    found = read_record(config)
    assert found is not None
    assert found.supervised
    assert not found.model_copy(update={"pid_started": me.create_time() - 100}).supervised


def test_other_commands_join_by_address_and_token() -> None:
    """What `distill` needs to run on the stack's own Ray, whose token is not the user's default one."""
    record = StackRecord(
        stack_id="s",
        pid=1,
        pid_started=0.0,
        url="u",
        config="c",
        started_at=0.0,
        ray_address="10.0.0.1:5",
        token_file="/t",
    )
    assert ray_environment(record) == {
        "RAY_ADDRESS": "10.0.0.1:5",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/t",
    }
