"""Further nodes of a stack's own Ray, on this machine: each a raylet in a process tree of its own, as a
worker pod is. A node that dies is started again, as a cluster replaces a pod.

Ends with the supervisor, however that ends: Linux ties `ray start` to it, and the raylet to `ray start`.
Knows nothing about what runs on a node.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from contracts.errors import EngineError
from serve.config import NodeSection, ServeConfig
from serve.router.haproxy import free_ports
from serve.stack.processes import end_child
from serve.stack.ray_head import START_ATTEMPTS
from serve.stack.record import NodeRecord

_log = logging.getLogger("stillhouse.nodes")

TIED = Path(__file__).with_name("tied.py")
LABEL = "stillhouse.node"
"""Label that Ray knows a node's name by."""
_START_S = 300.0
_PAUSE_S = 5.0
"""Between two starts of one node: whatever ended it may end it again."""
_STOP_S = 10.0


class Nodes:
    """Used by the supervisor's main thread alone: the nodes are tied to the thread that starts them."""

    def __init__(self, config: ServeConfig) -> None:
        self._config, self._address = config, ""
        self._nodes = {name: _Node(name, section, config) for name, section in config.ray.nodes.items()}

    @property
    def records(self) -> tuple[NodeRecord, ...]:
        """What there is to say about each that was started."""
        return tuple(node.record for node in self._nodes.values() if node.record is not None)

    def start(self, address: str, check: Callable[[], None]) -> None:
        """Start all and return once Ray has them; `check` is called meanwhile and may raise.

        Raises: EngineError when one does not join.
        """
        self._address = address
        for node in self._nodes.values():
            node.start(address)
        deadline = time.monotonic() + _START_S
        while missing := self._nodes.keys() - joined():
            check()
            for name in missing:
                self._nodes[name].start_again(address)
            if time.monotonic() > deadline:
                raise EngineError(f"node {sorted(missing)[0]!r} did not join Ray in {_START_S:.0f} s.")
            time.sleep(0.1)

    def keep(self) -> bool:
        """Start those again that died; True when the records changed."""
        changed = False
        for name, node in self._nodes.items():
            if not node.running and node.may_start:
                _log.warning("node %s ended; starting it again", name)
                node.start(self._address)
                changed = True
        return changed

    def stop(self) -> None:
        """End all; what ran on them is cut."""
        for node in self._nodes.values():
            node.end()


class _Node:
    """One node: `ray start --block`, the raylet below it, and everything below that."""

    def __init__(self, name: str, section: NodeSection, config: ServeConfig) -> None:
        self._name, self._section, self._config = name, section, config
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0
        self.log = config.log_dir / f"node-{name}.log"
        self.record: NodeRecord | None = None

    @property
    def running(self) -> bool:
        """True while its first process lives, which ends when its raylet does."""
        return self._process is not None and self._process.poll() is None

    @property
    def may_start(self) -> bool:
        """False for some seconds after a start."""
        return time.monotonic() >= self._not_before

    def start(self, address: str) -> None:
        """Start it; returns at once."""
        self._not_before = time.monotonic() + _PAUSE_S
        tied = [sys.executable, "-S", str(TIED), str(os.getpid()), sys.executable]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [*tied, *self._arguments(address)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
        self.record = NodeRecord(
            name=self._name,
            pid=self._process.pid,
            started_at=psutil.Process(self._process.pid).create_time(),
            starts=1 if self.record is None else self.record.starts + 1,
            resources=dict(self._section.resources),
        )

    def start_again(self, address: str) -> None:
        """While the stack starts: one that ended gets another try. Raises: EngineError after the third."""
        if self.running or self.record is None:
            return
        if self.record.starts >= START_ATTEMPTS:
            raise EngineError(f"node {self._name!r} did not start; see {self.log}.")
        self.start(address)

    def _arguments(self, address: str) -> list[str]:
        listen, grpc = free_ports(2)
        return [
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *("--address", address, "--node-ip-address", address.rsplit(":", 1)[0]),
            *("--num-cpus", str(self._section.num_cpus), "--num-gpus", str(self._section.num_gpus)),
            *("--resources", json.dumps(self._section.resources)),
            *("--labels", f"{LABEL}={self._name}"),
            *("--object-store-memory", str(self._config.ray.object_store_mb * 2**20)),
            # Ray's fixed ports are the first node's; workers take whatever Linux gives them.
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--dashboard-agent-listen-port", str(listen), "--dashboard-agent-grpc-port", str(grpc)),
        ]

    def end(self) -> None:
        """End it: SIGTERM, by which `ray start` ends the node's own processes, then SIGKILL."""
        end_child(self._process, _STOP_S)


def joined() -> set[str]:
    """Names of the further nodes that Ray says are alive."""
    import ray

    return {
        node["Labels"][LABEL] for node in ray.nodes() if node["Alive"] and LABEL in node.get("Labels", {})
    }
