"""`stillhouse up` and `down`: the terminal's side of the supervisor.

In the foreground the supervisor is this process; with --detach it is a background process of its own session
whose progress is read from `stack.json`. Knows nothing about how a stack is started.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status

from contracts import logs
from contracts.errors import EngineError, StillhouseError
from serve.config import ServeConfig, find_config, load_serve_config
from serve.stack.record import StackRecord, join, read_record
from serve.stack.supervisor import Supervisor, take_down

console = Console(highlight=False)
SUPERVISOR_LOG = "supervisor.log"


class Progress:
    """One live line on a terminal, a line per change elsewhere."""

    def __init__(self) -> None:
        self._started, self._last = time.monotonic(), ""
        self._status: Status | None = console.status("") if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def say(self, what: str) -> None:
        """Show what is being done and for how long."""
        line = f"{time.monotonic() - self._started:4.0f} s  {what}"
        if self._status:
            self._status.update(line)
        elif what != self._last:
            console.print(line, markup=False, soft_wrap=True)
        self._last = what

    def stop(self) -> None:
        """End the live line."""
        if self._status:
            self._status.stop()


def up(config_path: str | None, detach: bool, port: int | None, reset_routes: bool) -> None:
    """Start the stack; returns when it is ready (detached) or was ended (foreground)."""
    path = find_config(config_path)
    config = with_port(load_serve_config(path), port)
    if detach:
        _up_detached(config, path, port, reset_routes)
        return
    logs.start(config.logging, "supervisor", names=logs.OURS)
    with Progress() as progress:

        def ready(record: StackRecord) -> None:
            progress.stop()
            _print_ready(config, record)
            console.print("Ctrl-C ends it.")

        Supervisor(config, str(path), progress.say, reset_routes).run(ready)
    console.print("The stack is down.")


def down(config_path: str | None) -> None:
    """End the stack."""
    config = load_serve_config(config_path)
    with Progress() as progress:
        ended = take_down(config, progress.say)
    console.print("The stack is down." if ended else f"No stack runs in {config.run_dir}.")


def join_running_stack() -> None:
    """Point this process at the running stack's Ray; without a stack or configuration nothing changes."""
    try:
        record = read_record(load_serve_config(None))
    except StillhouseError:  # jobs also run without a stack; they say themselves what they miss
        return
    if record is not None and record.supervised:
        join(record)


def with_port(config: ServeConfig, port: int | None) -> ServeConfig:
    """The configuration with another port."""
    if port is None:
        return config
    return config.model_copy(update={"http": config.http.model_copy(update={"port": port})})


def _up_detached(config: ServeConfig, path: Path, port: int | None, reset_routes: bool) -> None:
    log = config.log_dir / SUPERVISOR_LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cli.main", "up", "--config", str(path.resolve())]
    command += ["--port", str(port)] if port is not None else []
    command += ["--reset-routes"] if reset_routes else []
    with log.open("wb") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": _python_path()},
            start_new_session=True,
        )
    with Progress() as progress:
        try:
            record = _wait_ready(config, child, progress)
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
    if record is None:
        raise EngineError(f"the stack did not start:\n{_tail(log)}\n(whole log: {log})")
    _print_ready(config, record)
    console.print(f"It runs in the background (log: {log}); 'stillhouse down' ends it.", soft_wrap=True)


def _wait_ready(
    config: ServeConfig, child: subprocess.Popen[bytes], progress: Progress
) -> StackRecord | None:
    while child.poll() is None:
        record = read_record(config)
        if record is not None and record.pid == child.pid:
            if record.phase == "ready":
                return record
            progress.say(record.detail or record.phase)
        time.sleep(0.1)
    return None


def _print_ready(config: ServeConfig, record: StackRecord) -> None:
    seconds = (record.ready_at or 0) - record.started_at
    route = next(iter(config.routes))
    key = "sk-sh-..." if config.router.keys else "-"
    names = ", ".join(config.routes)
    console.print(f"[green]ready[/] in {seconds:.0f} s: {record.url}/v1 (routes: {names})", soft_wrap=True)
    console.print(
        f"""
from openai import OpenAI
client = OpenAI(base_url="{record.url}/v1", api_key="{key}")
reply = client.chat.completions.create(
    model="{route}", messages=[{{"role": "user", "content": "Where is my order 1234?"}}]
)
print(reply.choices[0].message.content)
""",
        markup=False,
        soft_wrap=True,
    )
    if config.router.keys:
        console.print("Requests need a key: 'stillhouse keys create NAME' makes one.")
    if record.admin_url:
        console.print(
            f"Console: {record.admin_url}/console; 'stillhouse keys create NAME --admin' makes its key."
        )


def _python_path() -> str:
    root = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)


def _tail(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
