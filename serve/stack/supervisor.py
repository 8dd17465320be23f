"""The process that owns a stack: starts it, says when it answers, and takes everything down again.

`run` is the whole life of a stack on one screen. Knows the order of things; serve.app knows what they are.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from contracts.errors import ConflictError, EngineError, StillhouseError
from serve.config import ServeConfig
from serve.engine.http import answers, ask_chat
from serve.router.haproxy import free_ports
from serve.stack import ray_head
from serve.stack.admin import AdminProcess, stack_key
from serve.stack.front import Front
from serve.stack.nodes import Nodes
from serve.stack.processes import check_port_free, end_processes
from serve.stack.record import StackRecord, read_record, record_path, write_record

Say = Callable[[str], None]
PROBE_HEADERS = {"x-stillhouse-arm": "stable"}
"""Our own first question is not evidence for any rollout."""


class Supervisor:
    """One stack from start to end. `say` is told what happens, a few words at a time."""

    def __init__(self, config: ServeConfig, config_path: str, say: Say, reset_routes: bool = False) -> None:
        self._config, self._tell, self._reset_routes = config, say, reset_routes
        self._stop = threading.Event()
        self._head: list[psutil.Process] = []
        self._admin, self._nodes = AdminProcess(config), Nodes(config)
        self._rays_port = free_ports(1)[0] if config.own_front else None
        me = psutil.Process()
        self.record = StackRecord(
            stack_id=uuid.uuid4().hex,
            pid=me.pid,
            pid_started=me.create_time(),
            url=f"http://{config.http.host}:{config.http.port}",
            admin_url=f"http://{config.admin.host}:{config.admin.port}" if config.admin else None,
            config=str(Path(config_path).resolve()),
            started_at=time.time(),
            ray_dir=str(config.ray_dir) if config.ray.address is None else None,
        )
        port = self._rays_port
        self._front = Front(config, port, self.record.stack_id) if port is not None else None

    def run(self, on_ready: Callable[[StackRecord], None]) -> None:
        """Start, call `on_ready` once a completion was answered, stay until a signal, then end everything.

        Raises: StillhouseError when the stack does not start or dies; it is down when this returns or raises.
        """
        self._claim()
        self._listen()
        try:
            self._start()
            self._wait_answering()
            self._update(phase="ready", ready_at=time.time(), detail="")
            on_ready(self.record)
            self._stay()
        except _Stopped:
            pass
        except StillhouseError as err:
            self._update(phase="failed", detail=str(err))
            raise
        finally:
            self._end()

    def _listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stop.set())

    # starting -----------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Make the run folder ours; clean up after a stack whose supervisor was killed."""
        before = read_record(self._config)
        if before is not None and before.supervised and before.pid != os.getpid():
            raise ConflictError(
                f"a stack runs already in {self._config.run_dir}: {before.url} (pid {before.pid}). "
                "End it with 'stillhouse down', or set another run_dir."
            )
        if before is not None:
            sweep(before)
        check_port_free(self._config.http.host, self._config.http.port)
        if self._front is not None:
            self._front.bind()
        if (admin := self._config.admin) is not None:
            check_port_free(admin.host, admin.port, "admin.port")
        for folder in (self._config.run_dir, self._config.log_dir):
            folder.mkdir(parents=True, exist_ok=True)
        # Counters of a run that ended would be added to this one's.
        shutil.rmtree(self._config.metrics_dir, ignore_errors=True)
        self._config.metrics_dir.mkdir()
        write_record(self._config, self.record)

    def _start(self) -> None:
        self._say("starting Ray")
        token = ray_head.prepare(self._config, self.record.stack_id)
        address = ray_head.start_ray(self._config, self.record.stack_id)
        self._listen()  # again: Ray installs handlers of its own, which end the process at once
        self._head = ray_head.head_processes()
        self._update(ray_address=address, token_file=str(token) if token else None)
        self._check_stop()
        if self._config.ray.nodes:
            self._say(f"starting {', '.join(self._config.ray.nodes)}: further nodes of Ray")
        self._nodes.start(address, lambda: self._check_stop())
        self._update(nodes=self._nodes.records)
        self._say("starting Ray Serve")
        ray_head.start_serve(self._config, self._rays_port)
        if self._front is not None:
            self._front.start()
        self._check_stop()
        from serve.app import deploy_stack  # imports ray.serve, whose flags `prepare` has set

        self._say("deploying the engines, the router and the controller")
        self._apps = deploy_stack(self._config, self._reset_routes)
        self._admin.keep()

    def _wait_answering(self) -> None:
        """Until a real chat completion of every route came back through the public address."""
        from ray.serve.schema import ApplicationStatus

        from serve.engine.deployer import application_status

        deadline = time.monotonic() + self._config.start_timeout_s
        waiting = list(self._apps)
        while waiting:
            self._check_stop(deadline, ", ".join(waiting))
            for app in list(waiting):
                status, message = application_status(app) or (None, "")
                if status is ApplicationStatus.DEPLOY_FAILED:
                    raise EngineError(f"application {app!r} could not be deployed: {message}")
                if status is ApplicationStatus.RUNNING:
                    waiting.remove(app)
            self._say(f"waiting for {', '.join(waiting)}" if waiting else "asking the first question")
            self._stop.wait(0.3)
        while not answers(f"{self.record.url}"):
            self._check_stop(deadline, "the public address")
            self._stop.wait(0.1)
        with stack_key(self._config) as key:
            for route in self._config.routes:
                self._ask_until_answered(route, deadline, {**PROBE_HEADERS, **key})

    def _ask_until_answered(self, route: str, deadline: float, headers: dict[str, str]) -> None:
        while True:
            try:
                ask_chat(self.record.url, route, headers=headers)
                return
            except EngineError as err:
                self._check_stop(deadline, f"route {route!r} ({err})")
            self._stop.wait(0.3)

    def _check_stop(self, deadline: float | None = None, waiting_for: str = "") -> None:
        if self._stop.is_set():
            raise _Stopped
        self._check_head()
        if deadline is not None and time.monotonic() > deadline:
            raise EngineError(
                f"the stack was not ready after {self._config.start_timeout_s:.0f} s, "
                f"still waiting for {waiting_for}. "
                f"See {self._config.log_dir} or raise start_timeout_s."
            )

    # running ------------------------------------------------------------------------------------

    def _stay(self) -> None:
        while not self._stop.wait(1.0):
            self._check_head()
            if self._nodes.keep():
                self._update(nodes=self._nodes.records)
            self._admin.keep()
            if self._front is not None:
                self._front.check()

    def _check_head(self) -> None:
        for process in self._head:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                logs = self._config.ray_dir / "session_latest" / "logs"
                raise EngineError(f"Ray died (pid {process.pid}); see {logs}.")

    # ending -------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Applications first, so that requests end well; then Ray; then whatever is left of us."""
        failed = self.record.phase == "failed"
        if not failed:
            self._update(phase="stopping")
        self._admin.stop()
        self._say("ending the applications")
        self._end_applications()
        if self._front is not None:
            self._front.stop()
        self._say("ending Ray")
        self._nodes.stop()
        import ray

        ray.shutdown()
        end_processes(self.record.stack_id)
        if self.record.ray_dir and not failed:
            shutil.rmtree(self.record.ray_dir, ignore_errors=True)
        if not failed:
            record_path(self._config).unlink(missing_ok=True)

    def _end_applications(self) -> None:
        """Router before engines: no new request finds an engine that is leaving."""
        import ray

        if not ray.is_initialized() or any(not p.is_running() for p in self._head):
            return
        from ray import serve as ray_serve

        router_first = sorted(getattr(self, "_apps", []), key=lambda app: not app.startswith("stillhouse-"))
        try:
            for app in [a for a in router_first if a.startswith("stillhouse-")]:
                ray_serve.delete(app, _blocking=True)
            for app in list(ray_serve.status().applications):
                ray_serve.delete(app, _blocking=False)
            self._wait_no_application()
        except Exception as err:  # noqa: BLE001 - whatever Ray says at its end, everything is ended below
            self._say(f"Ray Serve did not end by itself: {err}")

    def _wait_no_application(self, timeout_s: float = 90.0) -> None:
        from ray import serve as ray_serve

        deadline = time.monotonic() + timeout_s
        while ray_serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.2)

    # telling ------------------------------------------------------------------------------------

    def _say(self, what: str) -> None:
        if what != self.record.detail:
            self._update(detail=what)
            self._tell(what)

    def _update(self, **changes: object) -> None:
        self.record = self.record.model_copy(update=changes)
        write_record(self._config, self.record)


class _Stopped(Exception):
    """A signal asked the stack to end while it started."""


def sweep(record: StackRecord) -> int:
    """End what is left of a stack whose supervisor is gone; returns how many processes there were."""
    ended = end_processes(record.stack_id)
    if record.ray_dir:
        shutil.rmtree(record.ray_dir, ignore_errors=True)
    return ended


def take_down(config: ServeConfig, say: Say, timeout_s: float = 180.0) -> bool:
    """End the stack of this configuration, supervised or crashed; False when there was none."""
    record = read_record(config)
    if record is None:
        return False
    if record.supervised:
        os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while record.supervised and time.monotonic() < deadline:
            now = read_record(config)
            say(now.detail if now else "ending Ray")
            time.sleep(0.2)
        if record.supervised:
            os.kill(record.pid, signal.SIGKILL)
    sweep(record)
    record_path(config).unlink(missing_ok=True)
    return True
