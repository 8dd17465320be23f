"""Runs the router on a Ray of its own, HAProxy in front. Arguments: CONFIG METRICS_DIR REPLICAS."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from contracts.config import load_config
from serve.router.config import RouterConfig
from serve.router.haproxy import haproxy_environment


def main(config: str, multiproc_dir: str, replicas: int) -> None:
    """Serve until SIGTERM."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="sh-ha-", dir="/tmp") as folder:
        os.environ.update(haproxy_environment(Path(folder)))
        # A busy machine is slow, not dead: Ray's own 60 s and 5 s would end it while it starts.
        os.environ.update(RAY_raylet_start_wait_time_s="240", RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60")
        import ray
        from ray import serve as ray_serve

        from serve.router.deployment import build_router_app

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        root = str(Path(__file__).resolve().parents[2])
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": root}},
        )
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = build_router_app(load_config(config, RouterConfig), replicas, multiproc_dir)
        ray_serve.run(app, name="router", route_prefix="/")
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        print(f"router on Ray listens on http://127.0.0.1:{port}", flush=True)
        stop.wait()
        ray_serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
