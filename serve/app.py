"""The one wiring place: from a ServeConfig to Ray Serve applications (engines, router, controller).

What Ray Serve is told is `serve_config`, for `stillhouse up` as for a KubeRay RayService (`serveConfigV2`);
Ray then calls `build` for each application, in a process of its own. Everything else here runs in a process
that is connected to Ray with Serve started. Knows how the parts fit; starts no Ray and no process
(serve.stack does).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from contracts import logs
from contracts.config import StrictConfig, load_config, parse_config
from contracts.errors import ConfigError, ConflictError, EngineError
from contracts.traffic import Split, Upstream
from serve.config import ServeConfig
from serve.drafts import resolved
from serve.engine.config import EngineOptions
from serve.engine.deployer import ServeDeployer
from serve.engine.vllm_server import STALE_S, build_engine_app
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from serve.students import Students, check_students

ROUTER_APP = "stillhouse-router"
CONTROLLER_APP = "stillhouse-controller"
RESOLVED = "stack-config.json"
"""The stack's configuration as `build` reads it, in run_dir: with defaults and environment filled in."""
REVISION_DIGITS = 12
MOUNT_LAG_S = 180.0
"""A kubelet brings a changed ConfigMap into running pods within some 90 s."""


class AppArgs(StrictConfig):
    """What a Serve config file gives an application (`args`)."""

    config: str
    """Path of the stack's configuration, on every node that may build."""
    application: str
    """Name of the application to build: `upstream-<name>` of an engine, the router's or the controller's."""
    revision: str | None = None
    """First digits of the file's SHA-256. Ray builds an application again when its arguments change, so this
    is how a change inside the file reaches it; `build` waits for the file that has this digest."""


def serve_config(config: ServeConfig, path: str, revision: str | None = None) -> dict[str, Any]:
    """What Ray Serve is told to run this stack: the content of a Serve config file.

    Args:
        path: where `build` finds the configuration.
        revision: `revision_of` the file; the router and the controller are built again when it changes, the
            engines, which take minutes, only when their own lines of the Serve config do.
    """
    again = {} if revision is None else {"revision": revision}
    engines = [
        str(config.upstream(name).app) for name, up in config.upstreams.items() if up.engine is not None
    ]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.http.host, "port": config.http.port},
        "logging_config": {"enable_access_log": False},
        "applications": [
            *(_application(name, None, {"config": path}) for name in engines),
            _application(ROUTER_APP, "/", {"config": path, **again}),
            _application(CONTROLLER_APP, None, {"config": path, **again}),
        ],
    }


def _application(name: str, prefix: str | None, args: dict[str, str]) -> dict[str, Any]:
    built = {"import_path": "serve.app:build", "args": {**args, "application": name}}
    return {"name": name, "route_prefix": prefix, **built}


def build(args: dict[str, Any]) -> ray_serve.Application:
    """One application of a Serve config file; Ray calls this in a task on some node of the cluster.

    Raises: ConfigError naming what is wrong with the arguments or the configuration.
    """
    wanted = parse_config(args, AppArgs, "args of serve.app:build")
    if wanted.revision is not None:
        wait_for_revision(Path(wanted.config), wanted.revision)
    config = load_config(wanted.config, ServeConfig)
    if wanted.application == ROUTER_APP:
        return router_application(config)
    if wanted.application == CONTROLLER_APP:
        return build_controller_app(config)
    engines = engine_applications(config)
    if wanted.application not in engines:
        known = ", ".join([*engines, ROUTER_APP, CONTROLLER_APP])
        raise ConfigError(f"application: {wanted.config} has no {wanted.application!r}; it has: {known}")
    return engines[wanted.application]


def revision_of(text: bytes) -> str:
    """The revision of a configuration file with this content."""
    return hashlib.sha256(text).hexdigest()[:REVISION_DIGITS]


def wait_for_revision(file: Path, revision: str, timeout_s: float = MOUNT_LAG_S) -> None:
    """Until the file has that revision. Raises: ConfigError when it still has another after the timeout."""
    deadline = time.monotonic() + timeout_s
    while (found := revision_of(file.read_bytes()) if file.exists() else "no file") != revision:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"revision: {file} is {found}, and {revision} was asked for. Apply the file's ConfigMap and "
                "the Serve config together, or correct 'revision' in the Serve config."
            )
        time.sleep(1.0)


class ControllerReplica:
    """Runs the rollout controller, and what keeps this cluster's students, each in a thread.

    Ray Serve starts it again when its process is killed. Its application is RUNNING once the students
    are: KubeRay moves traffic to a new cluster only then.
    """

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        from registry.mlflow_store import MlflowRegistry
        from serve.rollout.aliases import promoted_hook, restored_hook, rolled_back_hook
        from serve.rollout.controller import Controller
        from serve.rollout.metrics import ControllerMetrics
        from serve.rollout.queries import QueryReader

        parsed = ServeConfig.model_validate(config)
        logs.start(parsed.logging, "controller", names=logs.OURS)
        engine = open_state(parsed.state_url)
        declare_routes(parsed, TrafficState(engine), SettingsState(engine))
        registry = MlflowRegistry(parsed.registry_uri)
        self._stop = threading.Event()
        deployer = make_deployer(parsed, TrafficState(engine))
        self._controller = Controller(
            engine,
            deployer,
            on_promoted=promoted_hook(registry),
            on_rolled_back=rolled_back_hook(registry),
            on_restored=restored_hook(registry),
            metrics=ControllerMetrics(),
            queries=None if parsed.prometheus is None else QueryReader(parsed.prometheus),
        )
        students = Students(parsed, engine, deployer)
        loops = {"controller": self._controller.run_forever, "students": students.run_forever}
        self._threads = [
            threading.Thread(target=loop, args=(self._stop,), name=name, daemon=True)
            for name, loop in loops.items()
        ]
        for thread in self._threads:
            thread.start()
        if not await asyncio.to_thread(students.wait_settled, parsed.students.start_timeout_s, self._stop):
            logging.getLogger(__name__).warning("not every student that a split or rollout needs runs yet")

    def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        ended = [thread.name for thread in self._threads if not thread.is_alive()]
        if ended and not self._stop.is_set():
            raise EngineError(f"the controller's loop {ended[0]!r} ended; see the log of its replica.")

    def __del__(self) -> None:
        """Called by Ray Serve before the replica goes: finish the tick and hand the lease back."""
        if hasattr(self, "_threads"):
            self._stop.set()
            for thread in self._threads:
                thread.join(10)


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
            **config.controller.reserved(),
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(config.metrics_dir)}},
        },
    )(ControllerReplica)
    return deployment.bind(config.model_dump(mode="json"))


def router_application(config: ServeConfig) -> ray_serve.Application:
    """The routers of this stack."""
    from serve.router.deployment import build_router_app

    return build_router_app(
        config.router_config(),
        config.router.replicas,
        str(config.metrics_dir),
        placement=config.router,
    )


def make_deployer(config: ServeConfig, traffic: TrafficState) -> ServeDeployer:
    """The Deployer of this stack's students. Raises: NotFoundError for a draft that the registry has not."""
    options, log_dir = _drafting(config.students.options(), config), str(config.log_dir)
    return ServeDeployer(traffic, options, config.state_url, log_dir, config.logging)


def engine_applications(config: ServeConfig) -> dict[str, ray_serve.Application]:
    """Application name → application, for every declared upstream that is an engine of ours."""
    found = {}
    for name, section in config.upstreams.items():
        if section.engine is None:
            continue
        upstream = config.upstream(name)
        options = _drafting(section.engine.options(), config)
        app = str(upstream.app)
        found[app] = build_engine_app(
            app,
            section.engine.model,
            upstream.model,
            options,
            config.state_url,
            str(config.log_dir),
            config.logging,
        )
    return found


def _drafting(options: EngineOptions, config: ServeConfig) -> EngineOptions:
    """The options with a draft of the registry's as its folder."""
    if options.speculative is None:
        return options
    return options.model_copy(update={"speculative": resolved(options.speculative, config.registry_uri)})


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


def declare_routes(
    config: ServeConfig, traffic: TrafficState, settings: SettingsState, reset: bool = False
) -> None:
    """`write_routes` and `write_settings`, again when somebody else wrote a split in the same moment.

    On a cluster nobody runs `stillhouse up`: the controller does this when it starts.
    """
    for last in (False, False, True):
        try:
            write_routes(config, traffic, reset)
            write_settings(config, settings)
            return
        except ConflictError:
            if last:
                raise


def _changed(split: Split, declared: dict[str, Upstream]) -> dict[str, Upstream]:
    found = {}
    for part in ("stable", "canary"):
        now: Upstream | None = getattr(split, part)
        if now is not None and now.digest is None and now.name in declared:
            found[part] = declared[now.name]
    return found


def deploy_stack(config: ServeConfig, reset_routes: bool = False) -> list[str]:
    """Write the routes and hand every application to Ray Serve, but for the students, which the controller
    deploys; returns the names of all, the engines' first."""
    engine = open_state(config.state_url)
    traffic = TrafficState(engine)
    traffic.drop_stale_endpoints(STALE_S)  # of a stack that was killed; one beside this may live
    declare_routes(config, traffic, SettingsState(engine), reset_routes)
    students = check_students(Students(config, engine, make_deployer(config, traffic)))
    resolved = config.run_dir / RESOLVED
    resolved.unlink(missing_ok=True)
    resolved.touch(mode=0o600)  # the state store's URL may hold a password
    resolved.write_text(config.model_dump_json(indent=2))
    told = serve_config(config, str(resolved))
    deploy_serve_config(told)
    declared = [str(app["name"]) for app in told["applications"]]
    return [*declared[:-2], *students, *declared[-2:]]


def deploy_serve_config(told: dict[str, Any]) -> None:
    """Hand a Serve config to Ray Serve and return at once, as `serve run` and KubeRay do.

    Applications of an earlier Serve config that it does not name are deleted; students, which the controller
    deploys, are not. Raises: EngineError when Serve refuses it.
    """
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client  # `serve run`'s way; the public one needs the dashboard

    try:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(told))
    except (RayError, ValueError) as err:
        raise EngineError(f"Ray Serve did not take the Serve config: {err}") from err
