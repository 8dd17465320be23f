"""The driver that `test_training_ray` starts, kills and starts again: one tiny training run on a local Ray,
or on two nodes of which one is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from distill_jobs.ray_session import ray_session
from distill_jobs.training import LossConfig, OptimizerConfig, TrainConfig, run_training

LOST_AT = 45


def config(workers: int, **changes: object) -> TrainConfig:
    """A run of 240 short steps; fp32, so that interrupted and straight runs can be compared."""
    base = {
        "name": "tiny",
        "dtype": "float32",
        "batch_rows": 8,
        "epochs": 80,
        "checkpoint_steps": 20,
        "log_steps": 1,
        "workers": workers,
        "cpus_per_worker": 0.5,
        "optimizer": OptimizerConfig(lr=3e-3),
        "loss": LossConfig(kd_weight=1.0, hard_weight=0.5, temperature=2.0),
    }
    return TrainConfig.model_validate({**base, **changes})


def on_local_ray(data: Path, base: str, out: Path) -> float:
    """Two workers on one node."""
    with ray_session("local", cpus=4):
        return run_training(config(workers=2), data, base, out).metrics["step"]


def on_two_nodes(data: Path, base: str, out: Path) -> float:
    """A worker on each of two nodes; the second node is killed at step 45 and does not come back."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    lost: list[float] = []

    def watch(metrics: dict[str, float]) -> None:
        if not lost and metrics["step"] >= LOST_AT:
            lost.append(metrics["step"])
            cluster.remove_node(second, allow_graceful=False)

    one = config(workers=2, min_workers=1, cpus_per_worker=1, epochs=60)
    return run_training(one, data, base, out, watch).metrics["step"]


if __name__ == "__main__":
    kind, data, base, out = sys.argv[1:5]
    run = on_two_nodes if kind == "nodes" else on_local_ray
    print("FINISHED", run(Path(data), base, Path(out)), flush=True)
