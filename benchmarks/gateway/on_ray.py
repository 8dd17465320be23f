"""Runs a gateway on a Ray Serve of its own, HAProxy in front; prints its URL.

The router has as many replicas as it has processes alone, the bare proxy one, as it has alone.

Usage: python -m benchmarks.gateway.on_ray stillhouse CONFIG METRICS_DIR | bare
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.gateway.processes import ROOT
from serve.router.haproxy import free_ports, haproxy_environment


def main(which: str, *args: str) -> None:
    """Serve until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="sh-ha-", dir="/tmp") as folder:
        os.environ.update(haproxy_environment(Path(folder)))
        os.environ.update(RAY_raylet_start_wait_time_s="240", RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60")
        import ray
        from ray import serve as ray_serve

        (port,) = free_ports(1)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **_passed_on()}},
        )
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(_app(which, *args), name=which, route_prefix="/")
        print(f"{which} on Ray listens on http://127.0.0.1:{port}", flush=True)
        stop.wait()
        ray_serve.shutdown()
        ray.shutdown()


def _app(which: str, *args: str) -> Any:
    if which == "stillhouse":
        from contracts.config import load_config
        from serve.router.config import RouterConfig
        from serve.router.deployment import build_router_app
        from serve.router.workers import default_workers

        config, metrics = args
        return build_router_app(load_config(config, RouterConfig), default_workers(), metrics)
    from ray import serve as ray_serve

    from benchmarks.gateway.bare import BareReplica

    deployment = ray_serve.deployment(
        name="bare", max_ongoing_requests=4096, logging_config={"enable_access_log": False}
    )
    return deployment(ray_serve.ingress()(BareReplica)).bind()


def _passed_on() -> dict[str, str]:
    backend = os.environ.get("BARE_BACKEND")
    return {} if backend is None else {"BARE_BACKEND": backend}


if __name__ == "__main__":
    main(*sys.argv[1:])
