"""The processes of one stack, found by the marker in their environment: never by a name.

Every process that the supervisor starts inherits STILLHOUSE_STACK_ID, so all of them are found whatever
became of their parents, and nobody else's ever are. Knows nothing about what they do.
"""

from __future__ import annotations

import socket
import subprocess
import time

import psutil

from contracts.errors import ConfigError
from serve.router.names import STACK_ENV as MARKER


def stack_processes(stack_id: str) -> list[psutil.Process]:
    """All living processes that carry the marker, and their children; this one left out.

    Children are asked for too because a process that renames itself can overwrite its environment.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == stack_id:
                for one in (process, *process.children(recursive=True)):
                    found[one.pid] = one
        except (psutil.Error, OSError):  # it ended while we looked, or is not ours to look at
            continue
    found.pop(psutil.Process().pid, None)
    return [p for p in found.values() if _alive(p)]


def end_processes(stack_id: str, grace_s: float = 5.0) -> int:
    """SIGTERM all of them, SIGKILL those that stay; returns how many there were."""
    seen: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline + 10:
        now = {p.pid: p for p in stack_processes(stack_id)}
        left = now | {pid: p for pid, p in seen.items() if _alive(p)}
        if not left:
            break
        for pid, process in left.items():
            late = time.monotonic() > deadline
            if late or pid not in seen:
                _signal(process, kill=late)
        seen |= left
        time.sleep(0.1)
    return len(seen)


def _alive(process: psutil.Process) -> bool:
    """False for zombies, which only their parent can remove, and for a pid that was used again."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        pass


def end_child(process: subprocess.Popen[bytes] | None, patience_s: float) -> None:
    """End a process of our own, if it runs: SIGTERM, then SIGKILL."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check_port_free(host: str, port: int, field: str = "http.port") -> None:
    """Raises ConfigError naming who listens there and what to do."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except OSError as err:
            reason = str(err)
    who = _listener(port)
    option = "--port or " if field == "http.port" else ""
    raise ConfigError(
        f"{field}: {host}:{port} is taken{who} ({reason}). "
        f"Stop that process, or choose another port with {option}{field} in the configuration."
    )


def _listener(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            here = getattr(connection.laddr, "port", None) == port
            if here and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:  # not allowed to look at other users' sockets
        pass
    return ""
