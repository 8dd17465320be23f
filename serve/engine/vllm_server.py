"""One Ray Serve application per model version; every replica hosts vLLM's own OpenAI HTTP server.

Clients and the router talk HTTP straight to vLLM: the same 4.5 M-parameter student answered 111-125 req/s
through plain vLLM, 0.30 of that through Ray Serve LLM's defaults and 0.70 with its direct streaming, because
every token then crosses Ray as well. So Ray Serve does what it is good at here (place, start, watch, replace,
scale down) and carries no token. `ray[llm]` is used only as the GPU extra's way of pinning the vLLM that Ray
tests.

A replica registers its URL in the state store once it answered a completion, repeats that every second, and
takes it back before it drains. Knows nothing about routes, splits or rollouts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from sqlalchemy.exc import SQLAlchemyError

from contracts import logs
from contracts.errors import EngineError, StateError
from contracts.logs import LogConfig
from serve.engine.config import EngineOptions
from serve.engine.process import STOP_GRACE_S, VllmProcess
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

log = logging.getLogger(__name__)

DEPLOYMENT = "engine"
HEARTBEAT_S = 1.0
STALE_S = 10.0
"""A registration this old belongs to a replica that was killed."""
SETTLE_S = 1.5
"""Routers need a poll to notice that a registration is gone; only then can the engine be idle for good."""


class EngineReplica:
    """One vLLM server with its registration.

    The process is started, watched and stopped by one thread that lives as long as the replica: Linux ties a
    child's parent-death signal to the thread that started it.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        app: str,
        model: str,
        served_name: str,
        options: dict[str, Any],
        state_url: str,
        log_dir: str,
        log: dict[str, Any],
    ) -> None:
        logs.start(LogConfig.model_validate(log), "engine", names=logs.OURS)
        context = ray_serve.get_replica_context()
        self._app, self._name = app, context.replica_id.unique_id
        self._traffic = TrafficState(open_state(state_url))
        parsed = EngineOptions.model_validate(options)
        log_file = Path(log_dir) / f"engine-{app}-{self._name}.log"
        self._engine = VllmProcess(model, served_name, parsed, parsed.host or _node_address(), log_file)
        self._stop = threading.Event()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()
        await asyncio.wrap_future(self._ready)

    def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        if not self._stop.is_set() and not (self._thread.is_alive() and self._engine.running):
            raise EngineError(f"the engine of {self._app} ended:\n{self._engine.why()}")

    async def __del__(self) -> None:
        """Called by Ray Serve before the replica goes: take the URL back, drain, stop."""
        if hasattr(self, "_thread"):
            self._stop.set()
            await asyncio.to_thread(self._thread.join)

    def _live(self) -> None:
        try:
            self._engine.start()
            self._engine.wait_ready(cancelled=self._stop.is_set)
            self._traffic.drop_stale_endpoints(STALE_S, self._app)
            self._traffic.put_endpoint(self._app, self._name, self._engine.url, self._engine.pid)
            self._ready.set_result(None)
            while not self._stop.wait(HEARTBEAT_S) and self._engine.running:
                self._beat()
        except (EngineError, StateError, SQLAlchemyError, OSError) as err:
            if not self._ready.done():
                self._ready.set_exception(err)
        finally:
            self._leave()

    def _beat(self) -> None:
        try:
            self._traffic.put_endpoint(self._app, self._name, self._engine.url, self._engine.pid)
        except SQLAlchemyError as err:  # a busy or absent store must not cost us a working engine
            log.warning("heartbeat of %s not stored: %s", self._app, err)

    def _leave(self) -> None:
        try:
            self._traffic.drop_endpoint(self._app, self._name)
            if self._ready.done() and self._ready.exception() is None and not self._engine.drain(SETTLE_S):
                log.warning("%s still had requests after its drain timeout; they are cut.", self._app)
        except SQLAlchemyError as err:  # stopping matters more than saying goodbye; the heartbeat goes stale
            log.warning("registration of %s not removed: %s", self._app, err)
        finally:
            self._engine.stop()


def build_engine_app(
    app: str,
    model: str,
    served_name: str,
    options: EngineOptions,
    state_url: str,
    log_dir: str,
    logging: LogConfig = LogConfig(),
) -> ray_serve.Application:
    """The application that serves one model.

    Args:
        app: name under which its replicas register and by which upstreams refer to it.
        model: folder or Hugging Face id.
        served_name: model name that requests must carry (`Upstream.model`).
    """
    deployment = ray_serve.deployment(
        name=DEPLOYMENT,
        num_replicas=options.num_replicas,
        max_constructor_retry_count=2,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=SETTLE_S + options.drain_timeout_s + STOP_GRACE_S + 15,
        max_replicas_per_node=options.max_replicas_per_node,
        ray_actor_options={**options.reserved(), "num_gpus": options.num_gpus},
    )(EngineReplica)
    return deployment.bind(
        app, model, served_name, options.model_dump(mode="json"), state_url, log_dir, logging.model_dump()
    )


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
