"""The real Deployer: students as Ray Serve applications, asked over HTTP and the state store.

Every method may be called again at any time and returns within seconds. Runs inside the controller's replica,
which deploys and deletes other applications from there. Knows nothing about splits or statistics.
"""

from __future__ import annotations

import threading
from typing import Any

from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from contracts.errors import EngineError
from contracts.logs import LogConfig
from contracts.traffic import Upstream
from registry.adapter import is_adapter
from serve.engine.adapter_app import build_adapter_app
from serve.engine.config import EngineOptions
from serve.engine.folders import local_model
from serve.engine.http import answers, ask_chat, healthy, requests_in_engine
from serve.engine.vllm_server import build_engine_app
from serve.state.traffic import TrafficState

PROBES = 2
PROBE_TIMEOUT_S = 8.0
"""Below the controller's lease: a probe that hangs must not cost it the lead."""
FRESH_S = 10.0
"""Heartbeats older than this are of replicas that are gone."""


class ServeDeployer:
    """Deploys with the stack's student options; serve.rollout.deployer says what each method promises."""

    def __init__(
        self,
        traffic: TrafficState,
        options: EngineOptions,
        state_url: str,
        log_dir: str,
        logging: LogConfig = LogConfig(),
    ) -> None:
        self._traffic, self._options, self._logging = traffic, options, logging
        self._state_url, self._log_dir = state_url, log_dir
        self._lock = threading.Lock()

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """Start creating the application, or do nothing when it exists."""
        app = _app_of(upstream)
        with self._lock:  # deployed twice it would be a new version, which Ray Serve replaces the first by
            status = application_status(app)
            if status is not None and status[0] is ApplicationStatus.DELETING:
                raise EngineError(f"application {app!r} is still being deleted; try again in some seconds.")
            if status is None:
                deploy_application(app, self._application(app, artifact_uri, upstream.model))

    def running(self) -> dict[str, str]:
        """Every application of this cluster → its status, in Ray Serve's words."""
        return {app: found.status.value for app, found in ray_serve.status().applications.items()}

    def delete(self, app: str) -> None:
        """Start deleting an application, unless it is going or gone; its replicas take their URLs back."""
        status = application_status(app)
        if status is not None and status[0] is not ApplicationStatus.DELETING:
            ray_serve.delete(app, _blocking=False)

    def ready(self, upstream: Upstream) -> bool:
        """True when a replica is registered and answers; for a URL, when anything answers there."""
        if upstream.cascade is not None:
            return all(self.ready(part) for part in upstream.parts)
        if upstream.url is not None:
            return answers(upstream.url)
        app = _app_of(upstream)
        status = application_status(app)
        if status is not None and status[0] is ApplicationStatus.DEPLOY_FAILED:
            raise EngineError(f"application {app!r} could not be deployed: {status[1]}")
        return any(healthy(url) for url in self._urls(upstream))

    def probe(self, upstream: Upstream) -> None:
        """Ask every replica some real questions."""
        if upstream.cascade is not None:
            for part in upstream.parts:
                self.probe(part)
            return
        urls = self._urls(upstream)
        if not urls:
            raise EngineError(f"upstream {upstream.name!r} has no replica to probe.")
        for url in urls:
            for _ in range(PROBES):
                ask_chat(url, upstream.model, timeout_s=PROBE_TIMEOUT_S, api_key_env=upstream.api_key_env)

    def in_flight(self, upstream: Upstream) -> int:
        """Requests running and waiting in its engines; a replica that does not answer counts nothing.

        Nor does an adapter: its engine counts all as one, and finishes what it has when one is unloaded.
        """
        if upstream.app is None:
            return 0
        total = 0
        for url in self._urls(upstream, adapters=False):
            try:
                total += requests_in_engine(url)
            except EngineError:  # it is gone or going; the routers' own counts still protect the requests
                continue
        return total

    def retire(self, upstream: Upstream) -> None:
        """Delete the application; the URLs of replicas that were killed are taken back here."""
        app = _app_of(upstream)
        self.delete(app)
        self._traffic.drop_endpoint(app)

    def _application(self, app: str, artifact_uri: str, served_name: str) -> ray_serve.Application:
        """An engine, or for an adapter its place on the engines of its base."""
        url, folder = self._state_url, local_model(artifact_uri)
        if folder is not None and is_adapter(folder):
            wait_s = self._options.start_timeout_s  # as long as a student of its own
            return build_adapter_app(app, str(folder), served_name, url, wait_s, self._logging)
        return build_engine_app(
            app, artifact_uri, served_name, self._options, url, self._log_dir, self._logging
        )

    def _urls(self, upstream: Upstream, *, adapters: bool = True) -> list[str]:
        if upstream.url is not None:
            return [upstream.url]
        found = self._traffic.endpoints(FRESH_S).get(_app_of(upstream), [])
        return [e.url for e in found if adapters or not e.guest]


def deploy_application(app: str, target: ray_serve.Application, route_prefix: str | None = None) -> None:
    """Hand an application to Ray Serve and return at once. Raises: EngineError when Serve refuses it."""
    run = ray_serve.RunTarget(target=target, name=app, route_prefix=route_prefix)
    try:
        ray_serve.run_many(
            [run], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
    except (RayServeException, ValueError, TimeoutError, RuntimeError) as err:
        raise EngineError(f"Ray Serve did not take application {app!r}: {err}") from err


def application_status(app: str) -> tuple[ApplicationStatus, str] | None:
    """Status and message of an application, None when there is none."""
    found: Any = ray_serve.status().applications.get(app)
    return None if found is None else (found.status, _last_line(found.message))


def _last_line(message: str) -> str:
    """The cause at the end of a traceback that Serve hands on, else the message."""
    causes = [line.strip() for line in message.splitlines() if "Error" in line]
    return causes[-1] if causes else message.strip()[-500:]


def _app_of(upstream: Upstream) -> str:
    if upstream.app is None:
        raise EngineError(f"upstream {upstream.name!r} is a URL; it is not ours to deploy or delete.")
    return upstream.app
