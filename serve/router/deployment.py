"""The router as a Ray Serve application: one RouterApp a replica, started and drained with it.

With ray_ingress.py the only module of the router that knows Ray. Knows nothing about students or rollouts.
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve

from contracts import logs
from serve.placement import Placement
from serve.router.config import RouterConfig

DEPLOYMENT = "router"


class RouterReplica:
    """One router process; Ray Serve runs the lifespan of the application it builds."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = RouterConfig.model_validate(config)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve in the replica's process, after its environment is set."""
        logs.start(self._config.logging, "router", names=logs.OURS)
        # Imported here: prometheus_client must see the replica's environment.
        from serve.router.app import create_app
        from serve.router.ray_ingress import serve_directly
        from serve.router.server import bounds_of

        app = create_app(self._config)
        serve_directly(app, bounds_of(self._config), app.listens)
        return app


def build_router_app(
    config: RouterConfig,
    num_replicas: int,
    multiproc_dir: str,
    *,
    placement: Placement | None = None,
    max_ongoing_requests: int = 4096,
) -> ray_serve.Application:
    """The router as an application for `ray_serve.run(app, name=..., route_prefix="/")`.

    Args:
        config: what every replica reads; the router's routes live in the state store.
        num_replicas: router processes.
        multiproc_dir: folder in which the replicas of one host count together, so that any of them can
            answer a scrape for all. Empty it before the first start, not on restarts.
        placement: what Ray reserves for a replica and on how many nodes; it needs little, its load is mostly
            waiting.
        max_ongoing_requests: per replica. Streams are long and cheap, so this is high.
    """
    where = placement or Placement()
    deployment = ray_serve.deployment(
        name=DEPLOYMENT,
        num_replicas=num_replicas,
        max_replicas_per_node=where.max_replicas_per_node,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=-1,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.drain_s + 15.0,
        health_check_period_s=5.0,
        logging_config={"enable_access_log": False},  # one line a request costs more than routing it
        ray_actor_options={
            **where.reserved(),
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": multiproc_dir}},
        },
    )(ray_serve.ingress()(RouterReplica))
    return deployment.bind(config.model_dump(mode="json"))
