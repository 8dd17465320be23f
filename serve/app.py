"""The one wiring place: from a ServeConfig to Ray Serve applications (engines, router, controller).

Everything here runs in a process that is connected to Ray with Serve started. Knows how the parts fit; starts
no Ray and no process (serve.stack does).
"""

from __future__ import annotations

import logging
import threading
import uuid
from typing import Any

from ray import serve as ray_serve

from contracts.errors import EngineError, StateError
from contracts.traffic import Split, Upstream
from serve.config import ServeConfig
from serve.engine.config import EngineOptions
from serve.engine.deployer import ServeDeployer, deploy_application
from serve.engine.vllm_server import build_engine_app
from serve.state.rollouts import RolloutState
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

ROUTER_APP = "stillhouse-router"
CONTROLLER_APP = "stillhouse-controller"


class ControllerReplica:
    """Runs the rollout controller in a thread; Ray Serve starts it again when its process is killed."""

    def __init__(self, config: dict[str, Any]) -> None:
        from registry.mlflow_store import MlflowRegistry
        from serve.rollout.aliases import promoted_hook, restored_hook, rolled_back_hook
        from serve.rollout.controller import Controller
        from serve.rollout.metrics import ControllerMetrics
        from serve.rollout.queries import QueryReader

        logging.getLogger("serve.rollout").setLevel(logging.INFO)
        parsed = ServeConfig.model_validate(config)
        engine = open_state(parsed.state_url)
        registry = MlflowRegistry(parsed.registry_uri)
        self._stop = threading.Event()
        self._controller = Controller(
            engine,
            make_deployer(parsed, TrafficState(engine)),
            on_promoted=promoted_hook(registry),
            on_rolled_back=rolled_back_hook(registry),
            on_restored=restored_hook(registry),
            metrics=ControllerMetrics(),
            queries=None if parsed.prometheus is None else QueryReader(parsed.prometheus),
        )
        self._thread = threading.Thread(
            target=self._controller.run_forever, args=(self._stop,), name="controller", daemon=True
        )
        self._thread.start()

    def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        if not self._thread.is_alive() and not self._stop.is_set():
            raise EngineError("the controller's loop ended; see the log of its replica.")

    def __del__(self) -> None:
        """Called by Ray Serve before the replica goes: finish the tick and hand the lease back."""
        if hasattr(self, "_thread"):
            self._stop.set()
            self._thread.join(10)


def build_controller_app(config: ServeConfig) -> ray_serve.Application:
    """The rollout controller as an application of one replica."""
    deployment = ray_serve.deployment(
        name="controller",
        num_replicas=1,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=15.0,
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(config.metrics_dir)}},
        },
    )(ControllerReplica)
    return deployment.bind(config.model_dump(mode="json"))


def make_deployer(config: ServeConfig, traffic: TrafficState) -> ServeDeployer:
    """The Deployer of this stack's students."""
    return ServeDeployer(traffic, config.students.options(), config.state_url, str(config.log_dir))


def engine_applications(config: ServeConfig) -> dict[str, ray_serve.Application]:
    """Application name → application, for every declared upstream that is an engine of ours."""
    found = {}
    for name, section in config.upstreams.items():
        if section.engine is None:
            continue
        upstream = config.upstream(name)
        options = EngineOptions(**{f: getattr(section.engine, f) for f in EngineOptions.model_fields})
        app = str(upstream.app)
        found[app] = build_engine_app(
            app, section.engine.model, upstream.model, options, config.state_url, str(config.log_dir)
        )
    return found


def write_routes(config: ServeConfig, traffic: TrafficState, reset: bool = False) -> None:
    """Give every configured route a split; one that exists is kept, so a promoted student comes back.

    A declared upstream that was changed in the file is changed in the splits. `reset` throws promoted
    students and running canaries out and puts every route back on its configured upstream.
    """
    declared = {u.name: u for u in config.upstream_nouns()}
    for route, section in config.routes.items():
        upstream = section.upstream
        before = traffic.get_split(route)
        if before is None:
            traffic.put_split(Split(route=route, version=1, salt=uuid.uuid4().hex, stable=declared[upstream]))
            continue
        after = before.model_copy(update=_changed(before, declared))
        if reset:
            kept = {"route": route, "version": before.version, "salt": before.salt}
            after = Split(**kept, stable=declared[upstream])
        if after != before:
            traffic.put_split(after.model_copy(update={"version": before.version + 1}))


def write_settings(config: ServeConfig, state: SettingsState) -> None:
    """Store the settings the file gives its routes; a route without any keeps what it has."""
    for route in config.routes:
        wanted, before = config.route_settings(route), state.get_settings(route)
        if wanted is None:
            continue
        version = before.version if before is not None else 0
        if before is None or wanted.model_copy(update={"version": version}) != before:
            state.put_settings(wanted.model_copy(update={"version": version + 1}))


def _changed(split: Split, declared: dict[str, Upstream]) -> dict[str, Upstream]:
    found = {}
    for part in ("stable", "canary"):
        now: Upstream | None = getattr(split, part)
        if now is not None and now.digest is None and now.name in declared:
            found[part] = declared[now.name]
    return found


def students_in_use(
    config: ServeConfig, traffic: TrafficState, rollouts: RolloutState
) -> dict[str, tuple[Upstream, str]]:
    """Application → (upstream, artifact) of the students that splits refer to.

    Raises: StateError when a split needs an application that neither the file nor a rollout knows.
    """
    declared = {u.app for u in config.upstream_nouns()}
    deployed = {r.spec.candidate.app: r.spec.artifact_uri for r in rollouts.history() if r.spec.artifact_uri}
    found: dict[str, tuple[Upstream, str]] = {}
    for split in traffic.splits().values():
        for upstream in split.upstreams:
            if upstream.app is None or upstream.app in declared:
                continue
            if upstream.app not in deployed:
                raise StateError(
                    f"route {split.route!r} points to application {upstream.app!r}, which neither the "
                    "configuration nor any rollout knows. 'stillhouse up --reset-routes' puts all routes "
                    "back on their configured upstreams."
                )
            found[upstream.app] = (upstream, deployed[upstream.app])
    return found


def deploy_stack(config: ServeConfig, reset_routes: bool = False) -> list[str]:
    """Write the routes and hand every application to Ray Serve; returns their names, the engines' first."""
    from serve.router.deployment import build_router_app

    engine = open_state(config.state_url)
    traffic, rollouts = TrafficState(engine), RolloutState(engine)
    for app in traffic.endpoints():  # of a stack that was killed; nothing of it runs any more
        traffic.drop_endpoint(app)
    write_routes(config, traffic, reset_routes)
    write_settings(config, SettingsState(engine))
    students = students_in_use(config, traffic, rollouts)
    applications = engine_applications(config)
    deployer = make_deployer(config, traffic)
    for app, (upstream, artifact) in students.items():
        applications[app] = deployer.application(upstream, artifact)
    for app, target in applications.items():
        deploy_application(app, target)
    router = build_router_app(
        config.router_config(),
        config.router.replicas,
        str(config.metrics_dir),
        num_cpus=config.router.num_cpus,
    )
    deploy_application(ROUTER_APP, router, route_prefix="/")
    deploy_application(CONTROLLER_APP, build_controller_app(config))
    return [*applications, ROUTER_APP, CONTROLLER_APP]
