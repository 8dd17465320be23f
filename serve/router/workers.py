"""Several router processes behind one port, on one host, without Ray: started, watched and drained together.

Each has a listening socket of its own on the shared port (SO_REUSEPORT), made and kept by the parent, so that
the kernel spreads connections and a process that dies loses none that were waiting: its successor gets the
same socket. They share nothing but the state store and the metrics folder, as router processes on several
hosts do. Knows nothing about what a router does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import FrameType
from typing import Final

_log = logging.getLogger("stillhouse.router")

MOST_BY_DEFAULT: Final = 4
_PR_SET_PDEATHSIG: Final = 1
_LOOK_S: Final = 0.1
_CALM_S: Final = 5.0
"""A process that lived this long is started again at once; one that did not is waited for."""


def default_workers() -> int:
    """One a core that this process may use, a few at most: a router needs little."""
    return max(1, min(MOST_BY_DEFAULT, len(os.sched_getaffinity(0))))


def listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """That many sockets on one port; `port` 0 takes a free one. Raises OSError when it is taken.

    The first one is bound without sharing for a moment, so that two routers started by mistake on one port
    are an error, as people expect, and not half the requests each.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        port = int(probe.getsockname()[1])
    return [
        socket.create_server((host, port), family=family, backlog=2048, reuse_port=True) for _ in range(count)
    ]


class Workers:
    """The processes of one port. `run` returns when all have ended."""

    def __init__(self, arguments: list[str], sockets: list[socket.socket], multiproc_dir: str | None) -> None:
        """`arguments`: of `python -m serve.router`, for every process alike."""
        self._sockets = sockets
        self._own_dir = None if multiproc_dir else tempfile.mkdtemp(prefix="sh-router-metrics-")
        self._arguments = [*arguments, "--multiproc-dir", multiproc_dir or str(self._own_dir)]
        self._running: list[subprocess.Popen[bytes]] = []
        self._started: list[float] = []
        self._stopping = 0

    def run(self) -> int:
        """Until SIGTERM or SIGINT, then until every process has drained; a second signal cuts them off."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            for listener in self._sockets:
                if self._stopping:
                    break
                self._started.append(time.monotonic())
                self._running.append(self._start(listener))
                if self._stopping:  # the signal may have come before this one was in the list
                    self._running[-1].send_signal(signal.SIGTERM)
            while not self._stopping or any(p.poll() is None for p in self._running):
                self._revive()
                time.sleep(_LOOK_S)
            return max((self._code(p) for p in self._running), default=0)
        finally:
            for process in self._running:
                if process.poll() is None:
                    process.kill()
            if self._own_dir is not None:
                shutil.rmtree(self._own_dir, ignore_errors=True)

    def _code(self, process: subprocess.Popen[bytes]) -> int:
        """How a process ended; one that was asked to stop before it could hear of it has stopped as asked."""
        as_asked = self._stopping > 0 and process.returncode == -signal.SIGTERM
        return 0 if as_asked else abs(int(process.returncode))

    def _revive(self) -> None:
        """Start again what died, on the socket it had; not at once if it dies as soon as it starts."""
        for at, process in enumerate(self._running):
            if self._stopping or process.poll() is None:
                continue
            if time.monotonic() - self._started[at] < _CALM_S:
                continue
            _log.error("router process %d ended with %d; starting another", process.pid, process.returncode)
            self._started[at] = time.monotonic()
            self._running[at] = self._start(self._sockets[at])

    def _start(self, listener: socket.socket) -> subprocess.Popen[bytes]:
        libc = ctypes.CDLL(None)
        command = [sys.executable, "-m", "serve.router", *self._arguments, "--fd", str(listener.fileno())]
        return subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then drains them
        )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping += 1
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
