"""Clusters on one machine for tests: stacks of two Ray nodes each, which may share a state store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from serve.stack.record import NodeRecord, ray_environment
from tests.integration.engine_stand_in import stand_in
from tests.integration.held_port import held_port
from tests.integration.stack_rig import ENGINE, POLICY, LiveStack, family

NODE = "second"
EACH = {"routers": 1, "teachers": 1, "students": 1}
"""What either node has: one router, one replica of the teacher and one of the student."""
ENGINES = os.environ.get("STILLHOUSE_TEST_CLUSTER_ENGINES", "stand-in")
"""`vllm`: real engines, for a look by hand; they take minutes on two cores."""

_TASK = """
import json, os, sys, ray
ray.init(log_to_driver=False, logging_level="ERROR")
task = ray.remote(num_cpus=0.1, resources=json.loads(sys.argv[1]), max_retries=0)(lambda: os.getppid())
print(ray.get(task.remote()))
"""


class ClusterStack(LiveStack):
    """A stack of two nodes; one made `beside` another has its stores, its models and its configuration."""

    def __init__(self, folder: Path, beside: ClusterStack | None = None) -> None:
        self._beside = beside
        super().__init__(folder)

    def make_models(self) -> None:
        """Folders of checkpoints; nobody reads them where engines have a stand-in."""
        if self._beside is not None:
            self.teacher, self.student, self._engine = (
                self._beside.teacher,
                self._beside.student,
                self._beside._engine,
            )
        elif ENGINES == "vllm":
            super().make_models()
            self._engine: dict[str, Any] = dict(ENGINE)
        else:
            for model in (self.teacher, self.student):
                model.mkdir(parents=True)
                (model / "config.json").write_text("{}")
            self._engine = {"env": stand_in(self.folder / "stand-in")}

    def settings(self) -> dict[str, Any]:
        """Either node has everything once, so each pair has one replica on each; training runs on one."""
        stores = self.folder if self._beside is None else self._beside.folder
        teacher = {
            "model": str(self.teacher),
            "num_replicas": 2,
            "resources": {"teachers": 1},
            **self._engine,
        }
        steps = [{"weight": 0.3, "min_samples": 100_000, "min_dwell_s": 1}, {"weight": 0.6}]
        return {
            "run_dir": str(self.folder / "run"),
            "state_url": f"sqlite:///{stores}/shared/state.db",
            "registry_uri": f"sqlite:///{stores}/shared/mlflow.db",
            "http": {"port": held_port()},
            "ray": {
                "object_store_mb": 80,
                "resources": {**EACH, "controller": 1},
                "nodes": {NODE: {"num_cpus": 8, "resources": {**EACH, "train": 1}}},
            },
            "upstreams": {"teacher": {"engine": teacher}},
            "routes": {"support": "teacher"},
            "router": {"replicas": 2, "resources": {"routers": 1}},
            "controller": {"resources": {"controller": 1}},
            "students": {
                "num_replicas": 2, "resources": {"students": 1}, "drain_timeout_s": 20, **self._engine
            },
            "policies": {"default": {**POLICY, "steps": steps, "no_data_deadline_s": 900}},
        }  # fmt: skip

    @property
    def node(self) -> NodeRecord:
        """The second node, as `status` sees it."""
        (found,) = self.record.nodes
        return found

    def on_node(self, pid: int) -> bool:
        """True for a process of the second node."""
        return pid in below(self.node.pid)

    def where(self, resources: dict[str, float]) -> int:
        """The raylet whose worker runs a task that needs these; the worker itself ends with its job."""
        env = {**os.environ, **ray_environment(self.record), "RAY_USAGE_STATS_ENABLED": "0"}
        program = [sys.executable, "-c", _TASK, json.dumps(resources)]
        return int(subprocess.run(program, env=env, capture_output=True, check=True, timeout=300).stdout)

    def routers_on_nodes(self) -> list[bool]:
        """For each router that reported and lives, whether it is on the second node."""
        ours = below(self.record.pid)
        return sorted(self.on_node(r.pid) for r in self.traffic.routers(60) if r.pid in ours)

    def engines_on_nodes(self, app: str) -> list[bool]:
        """The same of the engines of this stack that answer for an application."""
        ours = below(self.record.pid)
        return sorted(self.on_node(e.pid) for e in self.traffic.endpoints(60).get(app, []) if e.pid in ours)

    def kill_node(self) -> int:
        """SIGKILL the second node: its raylet and everything below, at once; returns how many processes."""
        victims = family(self.node.pid)
        for number in (
            signal.SIGSTOP,
            signal.SIGKILL,
        ):  # stopped first: none may see that another one is dead
            for process in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        return len(victims)


def below(pid: int) -> set[int]:
    """The pids of a process and of all below it; none when it is gone."""
    try:
        return {process.pid for process in family(pid)}
    except psutil.NoSuchProcess:
        return set()


@dataclass
class Load:
    """What clients saw. They retry nothing."""

    url: str
    """Where they ask; may be changed while they do."""
    answered: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def steady(stack: LiveStack, threads: int = 4, per_second: float = 8.0) -> Iterator[Load]:
    """Non-streaming conversations, each a new one, until the block ends."""
    seen, stop = Load(f"{stack.url}/v1"), threading.Event()

    def ask() -> None:
        while not stop.wait(threads / per_second):
            client = stack.client(base_url=seen.url, timeout=120)
            text = f"conversation {time.monotonic_ns()}"
            try:
                client.chat.completions.create(
                    model="support", max_tokens=8, messages=[{"role": "user", "content": text}]
                )
                seen.answered += 1
            except Exception as err:  # noqa: BLE001 reason: every failure counts, whatever it is
                seen.failed.append(f"{time.time():.1f} {client.base_url}: {err!r}"[:300])

    pool = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in pool:
            thread.join(150)
