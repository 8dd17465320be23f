"""train: the pipeline's side of distill_jobs.training: what a run is keyed by, and what its result means.

Unit of work: the trainer's own checkpoints, in the stage's folder. Knows nothing about losses or workers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from contracts.errors import TrainingError
from distill_jobs.keys import key_config, model_digest, output_file
from distill_jobs.progress import Progress
from distill_jobs.ray_session import ray_session
from distill_jobs.shrink.config import DENSE, ShrinkConfig
from distill_jobs.stage import Result
from distill_jobs.training.config import TrainConfig


class TrainResult(Protocol):
    """What a trainer hands back."""

    @property
    def checkpoint_dir(self) -> Path:
        """A Hugging Face checkpoint folder that vLLM can load."""

    @property
    def metrics(self) -> dict[str, float]:
        """Last values of what it measured."""


Trainer = Callable[..., TrainResult]
"""run_training(config, data_dir, base_model, out_dir, on_progress)."""


def train_key(config: TrainConfig, base_model: str) -> dict[str, object]:
    """What decides a run's result: its configuration and the weights (or the tokenizer) it starts from."""
    start = base_model if config.shape is None else config.shape.tokenizer
    key: dict[str, object] = key_config(config) | {"start_digest": model_digest_or_tokenizer(start)}
    if config.teacher is not None:
        key["teacher_digests"] = [model_digest(one.model) for one in config.teacher.models]
    return key


def model_digest_or_tokenizer(start: str) -> str:
    """Digest of a checkpoint folder, or of a folder that holds only a tokenizer."""
    from registry.digest import digest_folder

    folder = Path(start)
    return digest_folder(folder) if folder.is_dir() else model_digest(start)


def run(
    config: TrainConfig,
    data: Path,
    base_model: str,
    folder: Path,
    progress: Progress,
    ray_address: str = "auto",
    trainer: Trainer | None = None,
) -> Result:
    """Train into `folder`, going on from the last checkpoint there. Raises: TrainingError without a
    checkpoint.
    """
    real = trainer is None
    if trainer is None:
        from distill_jobs.training import run_training

        trainer = run_training
    # Workers have a working directory of their own: relative folders would not be found there.
    if config.shape is not None:
        shape = config.shape.model_copy(update={"tokenizer": _absolute(config.shape.tokenizer)})
        config = config.model_copy(update={"shape": shape})
    if config.teacher is not None:
        models = tuple(m.model_copy(update={"model": _absolute(m.model)}) for m in config.teacher.models)
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"models": models})})

    notes: dict[str, str] = {}
    start = _absolute(base_model)
    if config.shrink is not None:
        start = str((folder / "start").resolve())
        notes = _shrunken(config, config.shrink, _absolute(base_model), data, Path(start), progress)

    def on_progress(metrics: dict[str, float]) -> None:
        if "validation_loss" not in metrics:  # of an earlier step, validated aside
            progress.update(int(metrics["step"]), int(metrics["steps"]), "steps")

    # One CPU more than the workers take, for Ray Train's own controller.
    with (
        ray_session(
            ray_address,
            cpus=int(config.workers * config.cpus_per_worker) + 1,
            resources=config.ray_resources,
        )
        if real
        else nullcontext()
    ):
        result = trainer(config, data, start, folder / "student", on_progress)
    left = Path(result.checkpoint_dir)
    if not any((left / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise TrainingError(f"Training ended without a checkpoint in {result.checkpoint_dir}.")
    metrics: dict[str, float | None] = {k: float(v) for k, v in result.metrics.items()}
    return Result({"student": output_file(Path(result.checkpoint_dir))}, metrics=metrics, notes=notes)


def _shrunken(
    config: TrainConfig, shrink: ShrinkConfig, base: str, data: Path, start: Path, progress: Progress
) -> dict[str, str]:
    """Build the checkpoint that training starts from; what the manifest says of it."""
    from distill_jobs.shrink.student import build_folder

    progress.update(0, 1, "measuring what to cut")
    report = build_folder(base, shrink, data, config.max_length, start)
    notes = {"start": f"{report['params']:,} of {report['params_before']:,} parameters of {base}"}
    if shrink.sparsify is not None:
        notes["sparsity"] = f"{report['zeros']:.1%} of the blocks' weights are zero; {DENSE}"
    return notes


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
