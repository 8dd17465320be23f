"""One Ray Serve application per adapter student: no engine of its own, a thread that keeps it on its base's.

It has the life of every other student (deployed, watched, deleted under its own name), so rollouts, canaries
and the look after lost students need not know what an adapter is. It carries no token and takes no CPU slot.
Knows nothing about routes, splits or rollouts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from sqlalchemy.exc import SQLAlchemyError

from contracts import logs
from contracts.errors import EngineError, StillhouseError
from contracts.logs import LogConfig
from serve.engine.adapters import Guest
from serve.engine.vllm_server import SETTLE_S
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

log = logging.getLogger(__name__)

VISIT_S = 0.5


class AdapterReplica:
    """Keeps one adapter loaded and registered on all engines of its base."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, app: str, folder: str, served_name: str, state_url: str, wait_s: float, log: dict[str, Any]
    ) -> None:
        logs.start(LogConfig.model_validate(log), "adapter", names=logs.OURS)
        self._guest = Guest(TrafficState(open_state(state_url)), app, served_name, Path(folder))
        self._app, self._wait_s = app, wait_s
        self._stop = threading.Event()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, name="adapter", daemon=True)
        self._thread.start()
        await asyncio.wrap_future(self._ready)

    def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        if not self._stop.is_set() and not self._thread.is_alive():
            raise EngineError(f"nobody looks after adapter {self._app} any more.")

    async def __del__(self) -> None:
        """Called by Ray Serve before the replica goes: take the registrations back, then unload."""
        if hasattr(self, "_thread"):
            self._stop.set()
            await asyncio.to_thread(self._thread.join)

    def _live(self) -> None:
        try:
            self._arrive()
            while not self._stop.wait(VISIT_S):
                self._visit()
        except (StillhouseError, SQLAlchemyError, OSError) as err:
            if not self._ready.done():
                self._ready.set_exception(err)
        finally:
            self._leave()

    def _arrive(self) -> None:
        deadline, said = time.monotonic() + self._wait_s, ""
        while self._guest.visit() == 0:
            why = self._guest.why()
            if self._stop.wait(VISIT_S) or time.monotonic() > deadline:
                raise EngineError(why)
            if why != said:
                log.info("adapter %s waits: %s", self._app, why)
            said = why
        self._ready.set_result(None)

    def _visit(self) -> None:
        try:
            self._guest.visit()
        except SQLAlchemyError as err:  # a busy or absent store must not cost us a working adapter
            log.warning("adapter %s not looked after this time: %s", self._app, err)

    def _leave(self) -> None:
        try:
            self._guest.leave()
            time.sleep(SETTLE_S)
            self._guest.unload()
        except SQLAlchemyError as err:  # the heartbeat goes stale; the adapter takes some memory until then
            log.warning("adapter %s not unloaded: %s", self._app, err)


def build_adapter_app(
    app: str,
    folder: str,
    served_name: str,
    state_url: str,
    wait_s: float,
    logging: LogConfig = LogConfig(),
) -> ray_serve.Application:
    """The application that keeps one adapter on the engines of its base.

    Args:
        app: name under which it is registered and by which upstreams refer to it.
        folder: the adapter's files, which the engines must be able to read.
        served_name: model name that requests must carry (`Upstream.model`).
        wait_s: for an engine of the base, which may be on its way; then the application has failed.
    """
    deployment = ray_serve.deployment(
        name="adapter",
        num_replicas=1,
        max_constructor_retry_count=1,
        health_check_period_s=1.0,
        health_check_timeout_s=90.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=SETTLE_S + 60,
        ray_actor_options={"num_cpus": 0},
    )(AdapterReplica)
    return deployment.bind(app, folder, served_name, state_url, wait_s, logging.model_dump())
