"""The driver that `test_training_ray` starts, kills and starts again: one tiny training run on a local
Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from distill_jobs.training import LossConfig, OptimizerConfig, TrainConfig, run_training


def config(workers: int) -> TrainConfig:
    """A run of 240 short steps; fp32, so that interrupted and straight runs can be compared."""
    return TrainConfig(
        name="tiny",
        dtype="float32",
        batch_rows=8,
        epochs=80,
        checkpoint_steps=20,
        log_steps=1,
        workers=workers,
        cpus_per_worker=0.5,
        optimizer=OptimizerConfig(lr=3e-3),
        loss=LossConfig(kd_weight=1.0, hard_weight=0.5, temperature=2.0),
    )


if __name__ == "__main__":
    data, base, out = sys.argv[1:4]
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    result = run_training(config(workers=2), Path(data), base, Path(out))
    print("FINISHED", result.metrics["step"], flush=True)
