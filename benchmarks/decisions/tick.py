"""One controller tick over 1,000 rollouts of 5 metrics each, all due: the shipped Controller, on SQLite.

`build` makes the world (routes, rollouts ramping, a look of counts from two routers), `measure` times
`Controller.tick()`. Traffic, engines and webhooks are outside it; all that a tick reads and writes is inside.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from contracts.metrics import MetricKind, MetricSpec
from contracts.model import Artifact, ModelRecord
from contracts.rollout import LedgerEntry, Phase, Step
from contracts.traffic import Split, Upstream
from serve.rollout.controller import Controller
from serve.rollout.decide import initial
from serve.rollout.deployer import FakeDeployer
from serve.rollout.policy import RolloutPolicy, make_spec
from serve.rollout.simulate import ArmModel, draw_counts
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

T0 = 1_000_000.0
LOOK_S = 60.0
PER_S = 5.0
ARM = ArmModel(errors=0.01, wrong=0.02, ttft_s=0.12, e2e_s=0.9)
METRICS = (
    MetricSpec(kind=MetricKind.ERRORS, margin=0.02),
    MetricSpec(kind=MetricKind.TTFT, margin=0.05, thresholds_s=(0.2,)),
    MetricSpec(kind=MetricKind.E2E, margin=0.05, thresholds_s=(2.0,)),
    MetricSpec(kind=MetricKind.QUALITY, margin=0.03),
    MetricSpec(kind=MetricKind.QUALITY, margin=0.06, name="lenient", pass_at=0.5),
)


class Clock:
    """The controller's clock, moved by hand."""

    now = T0

    def __call__(self) -> float:
        """Unix seconds."""
        return self.now


@dataclass
class TickWorld:
    """A state store full of rollouts, and the controller over it."""

    engine: Engine
    controller: Controller
    clock: Clock
    ids: dict[str, str]
    """Route → rollout."""
    seqs: dict[str, int]

    def serve(self, rng: np.random.Generator, seconds: float, weight: float) -> None:
        """Let both routers write one entry an arm for every route."""
        traffic = TrafficState(self.engine)
        versions = {route: split.version for route, split in traffic.splits().items()}
        entries = []
        for replica in ("router-a", "router-b"):
            for route, rollout_id in self.ids.items():
                n = int(rng.poisson(PER_S * seconds / 2))
                n_canary = int(rng.binomial(n, weight))
                for arm, size in (("stable", n - n_canary), ("canary", n_canary)):
                    self.seqs[replica] = self.seqs.get(replica, 0) + 1
                    entries.append(
                        LedgerEntry(
                            replica=replica,
                            seq=self.seqs[replica],
                            route=route,
                            rollout_id=rollout_id,
                            arm=arm,
                            split_version=versions[route],
                            at=self.clock.now,
                            counts=draw_counts(rng, ARM, size),
                        )
                    )
        traffic.append_ledger(entries)


def build(folder: Path, rollouts: int = 1000) -> TickWorld:
    """A world on SQLite whose rollouts have all begun their first step at 10 %."""
    return build_in(f"sqlite:///{folder}/state.db", rollouts)


def build_in(state_url: str, rollouts: int) -> TickWorld:
    """The same in any state store."""
    engine = open_state(state_url)
    state, traffic, clock = RolloutState(engine), TrafficState(engine), Clock()
    policy = RolloutPolicy(
        steps=(Step(weight=0.1, min_samples=10**9),),
        metrics=METRICS,
        look_s=LOOK_S,
        alpha_harm=1e-9,  # of a thousand equal arms some would be thrown back, and the ticks get shorter
    )
    stable = Upstream(name="teacher", model="teacher", url="http://127.0.0.1:9000")
    ids = {}
    for i in range(rollouts):
        route = f"route-{i:04d}"
        traffic.put_split(Split(route=route, version=1, salt="old", stable=stable))
        record = ModelRecord(
            name=f"student-{i:04d}",
            version=1,
            artifact=Artifact(uri="/models/s", digest=f"digest-{i}", precision="awq", bytes=1, params=1),
            created_at=T0,
        )
        spec = make_spec(policy, route, record, now=T0)
        state.create(spec, initial(spec))
        ids[route] = spec.id
    controller = Controller(engine, FakeDeployer(), holder="bench", clock=clock)
    for _ in range(2):
        controller.tick()
    assert all(one.status.phase is Phase.RAMPING for one in state.active())
    return TickWorld(engine, controller, clock, ids, {})


def measure(world: TickWorld, looks: int = 5) -> list[dict[str, Any]]:
    """Seconds (wall, CPU) of a tick in which every rollout looks, and of the next, in which none is due."""
    rng, rows = np.random.default_rng(0), []
    for look in range(looks):
        world.serve(rng, LOOK_S, weight=0.1)
        world.clock.now += LOOK_S + 1.0
        due = _timed(world)
        idle = _timed(world)
        rows.append({"look": look + 1, "rollouts": len(world.ids), "due": due, "idle": idle})
    looked = [one.status.total_counts["canary"].n for one in RolloutState(world.engine).active()]
    assert len(looked) == len(world.ids), "a rollout ended in the middle of the measurement"
    assert min(looked) > 0, "a rollout was not looked at"
    return rows


def seconds(rollouts: int = 1000, looks: int = 3) -> float:
    """Seconds (wall) of the median tick in which every rollout is due, written to disk and all."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(build(Path(folder), rollouts), looks)
    return float(np.median([row["due"]["wall_s"] for row in rows]))


def restarted(world: TickWorld) -> dict[str, float]:
    """Seconds of the first tick of another process: everything is read and parsed again."""
    fresh = Controller(world.engine, FakeDeployer(), holder="bench", clock=world.clock)
    return _timed(TickWorld(world.engine, fresh, world.clock, world.ids, world.seqs))


def _timed(world: TickWorld) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    assert world.controller.tick()
    return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--looks", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = build(Path(folder), options.rollouts)
        rows = measure(world, options.looks)
        first = restarted(world)
    worst = max(row["due"]["wall_s"] for row in rows)
    print(json.dumps({"rows": rows, "worst_due_s": worst, "restarted": first}, indent=2))


if __name__ == "__main__":
    main()
