"""One vLLM server as a child process: start, wait until it answers, drain, stop.

Plain processes and HTTP, no Ray: the same class serves replicas, tests and benchmarks. Knows nothing about
the state store or about which application the engine belongs to.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from contracts.errors import EngineError
from serve.engine.config import EngineOptions, engine_command, engine_environment
from serve.engine.http import ask_chat, healthy, requests_in_engine

KEEPER = Path(__file__).with_name("keeper.py")
STOP_GRACE_S = 15.0
"""Seconds vLLM has to end after SIGTERM before it is killed."""


class VllmProcess:
    """A vLLM OpenAI server under a keeper (see keeper.py). Start and stop it from one long-lived thread:
    Linux sends the keeper its parent-death signal when the starting *thread* ends."""

    def __init__(self, model: str, served_name: str, options: EngineOptions, host: str, log: Path) -> None:
        self.model, self.served_name, self.options = model, served_name, options
        self.host, self.port, self.log = host, free_port(host), log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL, ending before /v1."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the keeper, which leads the engine's process group."""
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        """True while the engine's process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server in a session of its own; returns at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = engine_command(self.model, self.served_name, self.options, self.host, self.port)
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-S", str(KEEPER), str(STOP_GRACE_S), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=engine_environment(self.model, self.options),
                start_new_session=True,
            )

    def wait_ready(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait until /health answers and a chat completion was answered.

        Raises: EngineError when the process ends, the time is over or `cancelled()` is true.
        """
        deadline = time.monotonic() + self.options.start_timeout_s
        while not healthy(self.url):
            self._still_starting(deadline, cancelled)
            time.sleep(0.2)
        ask_chat(self.url, self.served_name, timeout_s=max(1.0, deadline - time.monotonic()))

    def _still_starting(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        if cancelled():
            raise EngineError(f"engine for {self.model!r} was stopped while it started.")
        if not self.running:
            raise EngineError(f"engine for {self.model!r} ended while it started:\n{self.why()}")
        if time.monotonic() > deadline:
            raise EngineError(
                f"engine for {self.model!r} was not ready after {self.options.start_timeout_s:.0f} s; "
                f"raise start_timeout_s.\n{self.why()}"
            )

    def why(self, lines: int = 12) -> str:
        """The log's last lines that say something went wrong, else its last lines, and its path."""
        try:
            said = self.log.read_text(errors="replace").splitlines()
        except OSError:
            said = []
        errors = [line for line in said if "Error" in line and "deprecat" not in line.lower()]
        return "\n".join([*(errors or said)[-lines:], f"(whole log: {self.log})"])

    def drain(self, settle_s: float = 1.0) -> bool:
        """Wait at least `settle_s` and until the engine has no request; False when the timeout came first."""
        time.sleep(settle_s)
        deadline = time.monotonic() + self.options.drain_timeout_s
        while self.running:
            try:
                if requests_in_engine(self.url) == 0:
                    return True
            except EngineError:  # busy or dying; the deadline decides
                pass
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def stop(self) -> None:
        """End it: SIGTERM to the keeper, which ends the whole family, by force after its grace time."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
