"""The trainer: rows with cached teacher probabilities in, a Hugging Face checkpoint out.

`TrainConfig` is importable without torch; `run_training` pulls in torch and Ray when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill_jobs.training.config import (
    EarlyStopConfig,
    LossConfig,
    OptimizerConfig,
    ShapeConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from distill_jobs.training.ray_train import TrainResult, run_training

__all__ = [
    "EarlyStopConfig",
    "LossConfig",
    "OptimizerConfig",
    "ShapeConfig",
    "TrainConfig",
    "TrainResult",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name in ("TrainResult", "run_training"):
        from distill_jobs.training import ray_train

        return getattr(ray_train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
