"""Processes of a benchmark: start one and learn its URL, weigh its whole tree, and end it whatever happens.

Knows nothing about what the processes are.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

ROOT = Path(__file__).resolve().parents[2]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failed(RuntimeError):
    """A process did not do what it was started for."""


def get(url: str) -> str:
    """The text at a URL that answers with 200."""
    with _OPENER.open(url, timeout=20) as reply:
        return str(reply.read().decode())


class Process:
    """A process and its children. Use as a context manager; leaving it leaves nothing behind."""

    def __init__(
        self, command: list[str], log: Path, env: Mapping[str, str] | None = None, start_s: float = 120.0
    ) -> None:
        """Start it; its output goes to `log`."""
        self._log = log
        self._start_s = start_s
        self._known: dict[int, psutil.Process] = {}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def printed_url(self) -> str:
        """The URL it says it listens on."""
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            found = re.search(r"listens on (http://\S+)", self._log.read_text(errors="replace"))
            if found:
                return found[1]
            self._must_live()
            time.sleep(0.05)
        raise Failed(f"no URL within {self._start_s:.0f} s; its log: {self._log}")

    def wait_ready(self, url: str) -> None:
        """Wait until a GET of `url` is answered with 200."""
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            self._must_live()
            with contextlib.suppress(OSError):  # urllib's errors are OSErrors
                get(url)
                return
            time.sleep(0.1)
        raise Failed(f"{url} was not ready within {self._start_s:.0f} s; its log: {self._log}")

    def cpu_s(self) -> float:
        """CPU seconds its whole tree has used so far, user and system."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def rss_mib(self) -> float:
        """Resident memory of its whole tree; pages that processes share count once for each."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def stop(self, grace_s: float = 20.0) -> None:
        """SIGTERM to it, time to leave, then SIGKILL to whatever of its tree is left."""
        tree = self._tree()
        with contextlib.suppress(psutil.Error):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait(10)

    def _tree(self) -> list[psutil.Process]:
        """It and its descendants, those included whose parent has ended since they were seen."""
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                self._known.setdefault(process.pid, process)
        self._known = {pid: p for pid, p in self._known.items() if p.is_running()}
        return list(self._known.values())

    def _must_live(self) -> None:
        code = self._process.poll()
        if code is not None:
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise Failed(f"exited with {code}; the end of its log ({self._log}):\n" + "\n".join(tail))
