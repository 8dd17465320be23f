"""The benchmark's stack: teacher and student on vLLM, a cascade of both, a route for each, as `up` starts it.

Knows nothing about what is measured.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gateway.processes import Failed, Process
from contracts.cascade import Signal
from serve.config import ServeConfig, load_serve_config
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

TEACHER, STUDENT, SMART = "teacher", "student", "smart"
GRADER = "right"
_SPLIT_S = 60.0


class Stack:
    """A running stack. The routes `teacher`, `student` and `smart` have the upstream of their name."""

    def __init__(self, folder: Path, teacher: Path, student: Path, ends: ExitStack) -> None:
        """Start it; `ends` ends it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.file = folder / "stack.yaml"
        self.file.write_text(yaml.safe_dump(_settings(folder, port, teacher, student)))
        command = [sys.executable, "-m", "cli.main", "up", "--config", str(self.file)]
        print("starting a stack with two engines (about two minutes) …", flush=True)
        process = ends.enter_context(Process(command, folder / "log.txt", start_s=900))
        process.wait_ready(f"{self.url}/ready")
        self.config: ServeConfig = load_serve_config(self.file)

    def set_threshold(self, signal: Signal, threshold: float) -> None:
        """Put the cascade in force with what was calibrated, as a changed file and `up` would.

        Raises: Failed when the router does not take it over.
        """
        engine = open_state(self.config.state_url)
        try:
            traffic = TrafficState(engine)
            before = traffic.get_split(SMART)
            if before is None or before.stable.cascade is None:
                raise Failed(f"route {SMART} has no cascade")
            changed = before.stable.cascade.model_copy(update={"signal": signal, "threshold": threshold})
            stable = before.stable.model_copy(update={"cascade": changed})
            after = before.model_copy(update={"version": before.version + 1, "stable": stable})
            traffic.put_split(after)
            deadline = time.monotonic() + _SPLIT_S
            while any(r.versions.get(SMART) != after.version for r in traffic.routers(_SPLIT_S)):
                if time.monotonic() > deadline:
                    raise Failed("the router did not take the threshold over")
                time.sleep(0.2)
        finally:
            engine.dispose()


def _settings(folder: Path, port: int, teacher: Path, student: Path) -> dict[str, Any]:
    engine = {"max_model_len": 512, "kv_cache_bytes": 256 * 2**20, "dtype": "bfloat16", "enforce_eager": True}
    cascade = {"first": STUDENT, "then": TEACHER, "threshold": -0.01}
    return {
        "run_dir": str(folder / "run"),
        "http": {"port": port},
        "upstreams": {
            TEACHER: {"engine": {"model": str(teacher), **engine}},
            STUDENT: {"engine": {"model": str(student), **engine}},
            SMART: {"cascade": cascade},
        },
        "routes": {name: name for name in (TEACHER, STUDENT, SMART)},
        "router": {"replicas": 1},
        "graders": {GRADER: {"kind": "function", "function": "demo.world.grader:grade"}},
    }
