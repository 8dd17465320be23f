"""The demo's hands on the product: the `stillhouse` command, the public URL, the state store for reading.

It starts a stack of its own on a free port and always takes it down again. Knows no router.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from contracts.errors import NotFoundError, StillhouseError
from contracts.model import ModelRecord
from demo.console import Console
from demo.load import Target
from demo.traffic import Traffic
from registry.mlflow_store import open_registry
from registry.store import Registry
from serve.config import load_serve_config
from serve.engine.process import VllmProcess
from serve.state.rollouts import RolloutState, StoredRollout
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

ROOT = Path(__file__).resolve().parent.parent
STACK_CONFIG = ROOT / "configs" / "demo.yaml"
DISTILL_CONFIG = ROOT / "configs" / "distill-support.yaml"


class Stack:
    """A context: up on entering, down on leaving, whatever happens in between."""

    def __init__(self, out: Path, console: Console) -> None:
        self.out, self.console = out.resolve(), console
        self.rollouts: list[dict[str, Any]] = []
        os.environ["STILLHOUSE_RUN_DIR"] = str(self.out)
        os.environ["STILLHOUSE_PORT"] = str(_free_port())
        os.environ["STILLHOUSE_CONFIG"] = str(STACK_CONFIG)
        self.config = load_serve_config(str(STACK_CONFIG))
        self.base_url = f"http://127.0.0.1:{os.environ['STILLHOUSE_PORT']}/v1"
        self.workdir = self.out / "distill"

    def __enter__(self) -> Stack:
        with self.console.step(
            "stillhouse up: Ray, the teacher on vLLM, two routers, the controller"
        ) as step:
            try:
                self._stillhouse("up", "--detach")
            except BaseException:  # also Ctrl-C: nothing may stay running
                self._down()
                raise
            step.note(self.base_url)
        engine = open_state(self.config.state_url)
        self.traffic_state, self.rollout_state = TrafficState(engine), RolloutState(engine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.console.step("stillhouse down"):
            self._down()

    @property
    def registry(self) -> Registry:
        """The registry of this stack."""
        return open_registry(self.config.registry_uri)

    def record(self, ref: str) -> ModelRecord:
        """A model of the registry."""
        return self.registry.get(ref)

    def distill(self, overrides: list[str]) -> None:
        """`stillhouse distill` in the background of serving, its progress shown."""
        sets = [x for o in overrides for x in ("--set", o)]
        command = ["distill", str(DISTILL_CONFIG), "--workdir", str(self.workdir), *sets]
        with self.console.progress(
            "stillhouse distill: collect → teach → train → quantize → evaluate"
        ) as bar:
            process = self._start(command, self.out / "distill.log")
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    self._show(bar)
            finally:
                _end(process)
            bar.to(1, self._stage_times(), 1)
        if process.returncode:
            raise StillhouseError(f"stillhouse distill failed:\n{_tail(self.out / 'distill.log')}")

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Stage → its manifest, of the pipeline's work folder."""
        found = [json.loads(p.read_text()) for p in self.workdir.glob("*/manifest.json")]
        return {m["stage"]: m for m in found if "stage" in m}

    def rollout(self, route: str, ref: str, policy: str, traffic: Traffic) -> dict[str, Any]:
        """Start a rollout, watch it to its end, and say what it was."""
        before, started = (traffic.stats.requests, traffic.stats.failed), time.time()
        self._stillhouse("rollout", "start", route, ref, "--policy", policy)
        with self.console.progress(f"stillhouse rollout start {route} {ref}", 100) as bar:
            stored = self._watch(route, bar)
        time.sleep(1.0)  # answers that were under way when it ended
        fact = {
            "id": stored.spec.id,
            "model": stored.spec.model_ref,
            "decision": stored.status.decision,
            "reason": stored.status.reason,
            "requests": traffic.stats.requests - before[0],
            "failed_requests": traffic.stats.failed - before[1],
            "canary_requests": stored.status.total_counts["canary"].n if stored.status.total_counts else 0,
            "max_weight": stored.status.max_weight,
            "seconds": round(time.time() - started, 1),
        }
        self.rollouts.append(fact)
        return fact

    def _watch(self, route: str, bar: Any, timeout_s: float = 900.0) -> StoredRollout:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stored = self.rollout_state.history(route)[-1]
            status = stored.status
            counts = status.total_counts.get("canary")
            seen = f", {counts.n} canary requests" if counts else ""
            note = f"{status.phase}{seen}: {status.reason}"
            bar.to(100 if status.phase == "promoted" else round(status.weight * 100), note)
            if status.phase.terminal:
                return stored
            time.sleep(0.5)
        raise StillhouseError(
            f"the rollout of route {route!r} did not end within {timeout_s:.0f} s: {status.reason}"
        )

    def load_targets(self, route: str) -> list[Target]:
        """The teacher and the route's stable student, each at one replica's own URL."""
        split = self.traffic_state.get_split(route)
        if split is None:
            raise NotFoundError(f"route {route!r} has no split.")
        teacher = next(u for u in self.config.upstream_nouns() if u.name != split.stable.name)
        endpoints = self.traffic_state.endpoints()
        found = []
        for name, upstream in (("teacher", teacher), ("student", split.stable)):
            url = upstream.url or endpoints[str(upstream.app)][0].url
            found.append(Target(name, url, upstream.model))
        return found

    @contextmanager
    def bf16_student(self) -> Iterator[Target]:
        """The student before quantization, served as the stack serves students; it never gets traffic."""
        folder = str(self.manifests()["train"]["outputs"]["student"]["path"])
        engine = VllmProcess(
            folder,
            "student",
            self.config.students.options(),
            "127.0.0.1",
            self.out / "logs" / "bf16-student.log",
        )
        engine.start()
        try:
            engine.wait_ready()
            yield Target("student bf16", engine.url, "student")
        finally:
            engine.stop()

    def _show(self, bar: Any) -> None:
        try:
            now = json.loads((self.workdir / "progress.json").read_text())
        except (OSError, ValueError):  # not written yet
            return
        bar.to(now.get("done") or 0, f"{now.get('stage')} {now.get('note') or ''}", now.get("total") or None)

    def _stage_times(self) -> str:
        return ", ".join(
            f"{s} {m['seconds']:.0f} s" for s, m in sorted(self.manifests().items(), key=_started)
        )

    def _stillhouse(self, *arguments: str, timeout_s: float = 600.0) -> str:
        command = [sys.executable, "-m", "cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise StillhouseError(f"`stillhouse {' '.join(arguments)}` failed:\n{said[-3000:]}")
        return done.stdout

    def _start(self, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "cli.main", *arguments], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def _down(self) -> None:
        self._stillhouse("down")


def _started(item: tuple[str, dict[str, Any]]) -> float:
    return float(item[1].get("started_at") or 0.0)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
