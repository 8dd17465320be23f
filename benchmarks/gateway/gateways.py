"""The gateways that are compared: how each is installed, started with everything on, and asked.

Peers live in environments of their own below `.cache/bench/`, made from the pinned files in `requirements/`.
Knows nothing about load or results.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gateway.load import Door
from benchmarks.gateway.processes import Process
from benchmarks.peers import make, program
from contracts.traffic import Split, Upstream
from serve.router.config import RouterConfig
from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

_PINS = Path(__file__).with_name("requirements")
ROUTE = "bench"


@dataclass
class Running:
    """A gateway that takes requests."""

    door: Door
    process: Process


Start = Callable[[str, Path, ExitStack], Running]
"""(backend's URL, a folder of its own, what ends it) → the gateway, ready."""


@dataclass(frozen=True)
class Gateway:
    """One line of the table."""

    name: str
    what: str
    start: Start
    peer: str | None = None
    """Environment below `.cache/bench/` that it needs."""
    slow: bool = False
    """It cannot carry the fixed rate."""
    ours: bool = False
    """It keeps a request log of ours."""


def prepare(gateways: list[Gateway]) -> None:
    """Make the environments that are missing or out of date."""
    for peer in {g.peer for g in gateways if g.peer is not None}:
        make(peer, _PINS / f"{peer}.txt")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# ours ---------------------------------------------------------------------------------------------


def _settings(backend: str, folder: Path) -> tuple[Path, str]:
    """A state store with one route, half of it canary, and a router's configuration; and a client's key."""
    url = f"sqlite:///{folder}/state.db"
    engine = open_state(url)
    arms = {
        "stable": Upstream(name="bench", model="bench", url=backend),
        "canary": Upstream(name="bench-next", model="bench-next", url=backend),
    }
    split = Split(route=ROUTE, version=1, salt="bench", weight=0.5, rollout_id="bench", **arms)
    TrafficState(engine).put_split(split)
    key, secret = new_key("bench")
    KeyState(engine).create_key(key)
    engine.dispose()
    config = {"state_url": url, "keys": True, "log": {"dir": str(folder / "requests")}}
    path = folder / "router.json"
    path.write_text(RouterConfig.model_validate(config).model_dump_json())
    return path, secret


def _stillhouse(backend: str, folder: Path, ends: ExitStack) -> Running:
    config, key = _settings(backend, folder)
    command = [sys.executable, "-m", "serve.router", "--config", str(config), "--port", "0"]
    process = ends.enter_context(Process(command, folder / "log.txt"))
    door = Door(process.printed_url(), ROUTE, key)
    process.wait_ready(f"{door.url}/ready")
    return Running(door, process)


def _stillhouse_on_ray(backend: str, folder: Path, ends: ExitStack) -> Running:
    config, key = _settings(backend, folder)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gateway.on_ray",
        "stillhouse",
        str(config),
        str(folder / "metrics"),
    ]
    process = ends.enter_context(Process(command, folder / "log.txt", start_s=240))
    door = Door(process.printed_url(), ROUTE, key)
    process.wait_ready(f"{door.url}/ready")
    return Running(door, process)


# others -------------------------------------------------------------------------------------------


def _bare(backend: str, folder: Path, ends: ExitStack) -> Running:
    command = [sys.executable, "-m", "benchmarks.gateway.bare"]
    process = ends.enter_context(Process(command, folder / "log.txt", {"BARE_BACKEND": backend}))
    return Running(Door(process.printed_url()), process)


def _bare_on_ray(backend: str, folder: Path, ends: ExitStack) -> Running:
    command = [sys.executable, "-m", "benchmarks.gateway.on_ray", "bare"]
    process = ends.enter_context(Process(command, folder / "log.txt", {"BARE_BACKEND": backend}, start_s=240))
    return Running(Door(process.printed_url()), process)


def _vllm_router(backend: str, folder: Path, ends: ExitStack) -> Running:
    port, metrics = _free_port(), _free_port()
    command = [
        program("vllm-router", "vllm-router"), "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", backend, "--prometheus-host", "127.0.0.1",
        "--prometheus-port", str(metrics), "--log-level", "warning",
    ]  # fmt: skip
    process = ends.enter_context(Process(command, folder / "log.txt"))
    process.wait_ready(f"http://127.0.0.1:{port}/health")
    return Running(Door(f"http://127.0.0.1:{port}"), process)


def _sglang_router(backend: str, folder: Path, ends: ExitStack) -> Running:
    port, metrics = _free_port(), _free_port()
    command = [
        program("sglang-router", "python"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1",
        "--port", str(port), "--worker-urls", backend, "--prometheus-host", "127.0.0.1",
        "--prometheus-port", str(metrics), "--log-level", "warn",
    ]  # fmt: skip
    process = ends.enter_context(Process(command, folder / "log.txt"))
    process.wait_ready(f"http://127.0.0.1:{port}/health")
    return Running(Door(f"http://127.0.0.1:{port}"), process)


def _litellm(backend: str, folder: Path, ends: ExitStack) -> Running:
    port, key = _free_port(), f"sk-{secrets.token_hex(16)}"
    params = {"model": "openai/bench", "api_base": f"{backend}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": ROUTE, "litellm_params": params}],
                "litellm_settings": {"callbacks": ["prometheus"], "telemetry": False},
                "general_settings": {"master_key": key},
            }
        )
    )
    command = [
        program("litellm", "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
        "--num_workers", "1", "--telemetry", "False",
    ]  # fmt: skip
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    process = ends.enter_context(Process(command, folder / "log.txt", env))
    process.wait_ready(f"http://127.0.0.1:{port}/health/liveliness")
    return Running(Door(f"http://127.0.0.1:{port}", ROUTE, key), process)


OURS, OURS_ON_RAY = "Stillhouse router", "Stillhouse router on Ray Serve"
BARE, BARE_ON_RAY = "bare proxy", "bare proxy on Ray Serve"
VLLM_ROUTER, LITELLM = "vllm-router 0.1.17", "LiteLLM proxy 1.109.1"

GATEWAYS = [
    Gateway(
        OURS,
        "one process a core, key check, canary at 50 %, usage, request log, metrics",
        _stillhouse,
        ours=True,
    ),
    Gateway(VLLM_ROUTER, "Rust, its defaults, metrics", _vllm_router, "vllm-router"),
    Gateway("sglang-router 0.3.2", "Rust, its defaults, metrics", _sglang_router, "sglang-router"),
    Gateway(LITELLM, "one worker, master key", _litellm, "litellm", slow=True),
    Gateway(BARE, "uvicorn, aiohttp; nothing on", _bare),
    Gateway(OURS_ON_RAY, "HAProxy in front, everything on", _stillhouse_on_ray, ours=True),
    Gateway(BARE_ON_RAY, "HAProxy in front, throughput flags", _bare_on_ray),
]
