"""Ray for a stack: one of its own, quiet, small and private; or a connection to a cluster that runs.

Environment variables must be set before Ray is imported anywhere in this process, so `prepare` comes first.
Knows nothing about applications.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import psutil

from contracts.errors import EngineError
from serve.config import ServeConfig
from serve.router.haproxy import haproxy_environment
from serve.stack.processes import MARKER, end_processes

ROOT = Path(__file__).resolve().parents[2]
START_ATTEMPTS = 3
"""A busy machine may need more than the time Ray gives itself; a broken one fails thrice as well."""


def prepare(config: ServeConfig, stack_id: str) -> Path | None:
    """Set the environment of Ray and everything below it; returns the token file of a Ray of our own."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.update(
        {
            MARKER: stack_id,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),  # replicas import this package
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray starts workers at nice 15. An answer must not wait for whatever else runs here; batch jobs,
            # which start a Ray of their own, keep the 15 and give way.
            "RAY_worker_niceness": "0",
            # A proxy that is slow on a busy machine is not a dead one; Ray's 5 s would kill it in its cradle.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
        }
    )
    if config.ray.address is not None:
        return None
    config.ray_dir.mkdir(parents=True, exist_ok=True)
    if config.ray.haproxy:
        os.environ.update(haproxy_environment(config.ray_dir / "ha"))
    token = config.run_dir / "ray.token"
    token.unlink(missing_ok=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    os.environ.pop("RAY_ADDRESS", None)
    return token


def start_ray(config: ServeConfig, stack_id: str) -> str:
    """Start our own Ray or join the named one; returns the address other processes join by."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    own = {
        "num_cpus": config.ray.num_cpus,
        "num_gpus": config.ray.num_gpus,
        "resources": dict(config.ray.resources),
        "include_dashboard": False,
        "object_store_memory": config.ray.object_store_mb * 2**20,
        "_temp_dir": str(config.ray_dir),
    }
    options = {"address": config.ray.address} if config.ray.address is not None else own
    for attempt in range(START_ATTEMPTS):
        try:
            return str(ray.init(**options, **quiet).address_info["gcs_address"])
        except Exception as err:  # Ray raises a bare Exception when its 30 s were too short
            ray.shutdown()
            if config.ray.address is not None or attempt == START_ATTEMPTS - 1:
                where = config.ray.address or f"its own, in {config.ray_dir}"
                raise EngineError(f"Ray ({where}) did not start: {err}") from err
            end_processes(stack_id)
    raise AssertionError("unreachable")


def start_serve(config: ServeConfig, own_port: int | None = None) -> None:
    """Start Ray Serve with its HTTP proxy on the configured address, or on a loopback port of its own."""
    import logging

    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    host, port = (config.http.host, config.http.port) if own_port is None else ("127.0.0.1", own_port)
    for attempt in range(START_ATTEMPTS):
        try:
            ray_serve.start(
                proxy_location="HeadOnly" if config.ray.address is None else "EveryNode",
                http_options={"host": host, "port": port},
                logging_config={"enable_access_log": False},
            )
            return
        except (RayError, TimeoutError, RayServeException) as err:
            # Serve replaces a proxy that was not up in time, but this call still waits for the old one.
            if attempt == START_ATTEMPTS - 1:
                raise EngineError(f"Ray Serve did not start: {err}") from err
            time.sleep(1.0)


def head_processes() -> list[psutil.Process]:
    """The Ray processes this process started and cannot do without."""
    children = psutil.Process().children()
    return [p for p in children if p.name() in ("gcs_server", "raylet")]
