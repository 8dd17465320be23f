"""The training loop on Ray Train: N workers, checkpoints that survive killed workers and a killed driver.

It knows Ray and folders; what a step is, is in `loop`. Called again with the same arguments it continues:
the run's name carries a fingerprint of everything that shapes the result, and Ray restores the run of that
name.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    CheckpointConfig,
    CheckpointConsistencyMode,
    FailureConfig,
    ReportedCheckpointStatus,
    RunConfig,
    ScalingConfig,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from contracts.config import canonical_json
from contracts.errors import DataError, TrainingError
from distill_jobs.training.adapters import add_lora, save_student
from distill_jobs.training.attention import register
from distill_jobs.training.columns import read_manifest
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.fake_quant import fake_quantize
from distill_jobs.training.loop import Trainer, writing
from distill_jobs.training.models import load_model
from distill_jobs.training.parallel import joined
from distill_jobs.training.progress import PROGRESS, append, append_validations, following
from distill_jobs.training.storage import Storage, open_storage
from distill_jobs.training.validation import MODEL, RESULTS, UNKNOWN, exhausted, validate


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the checkpoint is, and its metrics: step, steps, epoch, tokens, seconds, kd, ce, grad_norm, lr;
    validation_loss, validation_kd and validation_ce where it was validated."""

    checkpoint_dir: Path
    metrics: dict[str, float]


def fingerprint(config: TrainConfig, data_dir: Path, base_model: str) -> str:
    """What decides the result: hyperparameters, the data (by its manifest, else names and sizes) and the
    start."""
    shaping = config.model_dump(exclude=set(config.OPERATIONAL))
    data = read_manifest(data_dir) or sorted(
        (p.name, p.stat().st_size) for p in Path(data_dir).glob("part-*.parquet")
    )
    return hashlib.sha256(canonical_json([shaping, data, base_model]).encode()).hexdigest()[:12]


def _trainer(config: TrainConfig, data_dir: str, base_model: str) -> Trainer:
    """This worker's trainer, continued from the run's last checkpoint when there is one."""
    torch.set_num_threads(config.threads)
    model = load_model(base_model, config.shape, config.seed)
    if config.lora is not None:
        model = add_lora(model, config.lora, base_model)
    if config.fake_quant is not None:
        fake_quantize(model, config.fake_quant)
    if config.use_gpu:
        model.to(ray.train.torch.get_device())
    model.set_attn_implementation(register())
    if config.compile:
        for block in model.get_decoder().layers:
            block.compile(dynamic=True)
    rows = Rows(Path(data_dir), config.max_length, with_teacher=config.cached_teacher)
    entries = model.get_input_embeddings().weight.shape[0]
    if rows.largest_id >= entries:
        raise DataError(f"{data_dir} holds token {rows.largest_id}; the student's vocabulary has {entries}.")
    trainer = Trainer(model, rows, config, joined())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.load(Path(folder))
    return trainer


@dataclass(slots=True)
class _Run:
    """One worker's side of a run: what it reports, and when it stops."""

    trainer: Trainer
    config: TrainConfig
    tokenizer: str
    progress: Path
    storage: Storage

    def train(self) -> None:
        """To the last step, or to where validation stops improving."""
        steps = self.trainer.steps
        if self.trainer.position.step >= steps or self._stops(self.trainer.position.step):
            return  # a finished run that was called again
        for metrics in self.trainer.run():
            step, last = int(metrics["step"]), metrics["step"] == steps
            if self.trainer.workers.rank == 0 and (step % self.config.log_steps == 0 or last):
                append(self.progress, metrics)
            every = self.config.validate_steps
            validated = every is not None and (step % every == 0 or last)
            if validated or last or step % self.config.checkpoint_steps == 0:
                self._report(metrics, validated, validated or last)
            if validated and self._stops(step):
                return

    def _report(self, metrics: dict[str, float], validated: bool, export: bool) -> None:
        """Hand Ray a checkpoint, gathered from all workers; the last and the validated ones also hold the
        model as a Hugging Face folder."""
        if self.config.validate_steps is not None:
            metrics = {**metrics, "validation_loss": UNKNOWN}
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "checkpoint"
            self.trainer.save(place)
            weights = self.trainer.weights() if export else {}
            if self.trainer.workers.rank != 0:
                ray.train.report(metrics)
                return
            if export:
                save_student(self.trainer.model, self.tokenizer, place / MODEL, self.config.lora, weights)
            task = ValidationTaskConfig({"step": int(metrics["step"]), "steps": int(metrics["steps"])})
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(str(place)),
                validation=task if validated else False,
            )

    def _stops(self, step: int) -> bool:
        """Whether the validations before this step say so; the same on every worker.

        The newest one still runs beside the training. Waiting for all others makes the step at which a run
        ends the same however long validations take.
        """
        if self.config.validate_steps is None:
            return False
        says = torch.zeros(1, device=next(self.trainer.model.parameters()).device)
        if self.trainer.workers.rank == 0:
            if self.config.early_stop is not None:
                _wait_for_validations(step)
            results = self.storage.read_jsons(RESULTS)
            append_validations(self.progress, results)
            known = [one["validation_loss"] for one in results if one["step"] < step]
            says += bool(self.config.early_stop and exhausted(known, self.config.early_stop))
        self.trainer.workers.add(says)
        return bool(says > 0)


def _wait_for_validations(step: int) -> None:
    """Until no checkpoint from before `step` waits for its validation."""
    while True:
        reported = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        if not any(
            one.status == ReportedCheckpointStatus.PENDING_VALIDATION and one.metrics["step"] < step
            for one in reported
        ):
            return
        time.sleep(0.2)


def _worker(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    config = TrainConfig.model_validate(arguments["config"])
    trainer = _trainer(config, arguments["data_dir"], arguments["base_model"])
    tokenizer = config.shape.tokenizer if config.shape else arguments["base_model"]
    _Run(trainer, config, tokenizer, Path(arguments["progress"]), arguments["storage"]).train()


def _ensure_ray(config: TrainConfig) -> None:
    """Use the cluster that is there (initialised, or RAY_ADDRESS); else start one that the workers fit
    into."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    cpus = max(os.cpu_count() or 1, int(config.workers * config.cpus_per_worker) + 1)
    ray.init(
        address="local",
        num_cpus=cpus,
        resources=config.ray_resources,
        include_dashboard=False,
        log_to_driver=False,
    )


def _validation(config: TrainConfig, data_dir: Path, storage: Storage) -> ValidationConfig | None:
    """How Ray validates checkpoints: on the rows of `validation` beside those of the training.

    Raises: DataError when it is asked for and there are none.
    """
    if config.validate_steps is None:
        return None
    held_out = data_dir.with_name("validation")
    if not held_out.is_dir():
        raise DataError(f"validate_steps is set, but there is no {held_out}; teach a validation split.")
    Rows(held_out, config.max_length, with_teacher=config.cached_teacher)
    arguments = {"config": config.model_dump(), "data_dir": str(held_out), "storage": storage}
    return ValidationConfig(
        validate,
        ValidationTaskConfig(arguments),
        {
            "num_cpus": config.validation_cpus,
            "num_gpus": config.validation_gpus,
            # On the same nodes, beside the workers, which may have reserved all there is.
            "resources": dict.fromkeys(config.resources_per_worker, 0.001),
        },
    )


def _scaling(config: TrainConfig) -> ScalingConfig:
    fewest = config.min_workers or config.workers
    return ScalingConfig(
        num_workers=(fewest, config.workers) if fewest < config.workers else config.workers,
        use_gpu=config.use_gpu,
        resources_per_worker=config.worker_resources,
    )


def _retention(config: TrainConfig) -> CheckpointConfig:
    """The newest checkpoints, or those that validate best; the latest is always kept, too."""
    if config.validate_steps is None:
        return CheckpointConfig(num_to_keep=config.keep_checkpoints)
    return CheckpointConfig(
        num_to_keep=config.keep_checkpoints,
        checkpoint_score_attribute="validation_loss",
        checkpoint_score_order="min",
    )


def _chosen(config: TrainConfig, result: Any) -> tuple[Any, dict[str, float]]:
    """The checkpoint to export: the best validated one where a run may stop early, else the last."""
    best = [
        (checkpoint, metrics)
        for checkpoint, metrics in result.best_checkpoints or []
        if math.isfinite(metrics.get("validation_loss", UNKNOWN))
    ]
    if config.early_stop is None or not best:
        return result.checkpoint, dict(result.metrics or {})
    checkpoint, metrics = min(best, key=lambda one: (one[1]["validation_loss"], one[1]["step"]))
    return checkpoint, dict(metrics)


def run_training(
    config: TrainConfig,
    data_dir: Path,
    base_model: str,
    out_dir: Path,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train and leave a plain Hugging Face checkpoint (bf16 safetensors and tokenizer) in `out_dir`.

    The run's checkpoints stay beside it in `<out_dir>.run` (or in `storage`), so that the same call continues
    after a SIGKILL. With `validate_steps`, checkpoints are validated on the rows of `validation` beside
    `data_dir` while training goes on; with `early_stop` too, the best of them is exported.
    With `on_progress`, metrics arrive every `log_steps` steps, in a thread of this process.

    Raises: TrainingError when the run failed more often than `max_failures`, DataError when the rows are
    malformed.
    """
    data_dir, out_dir = Path(data_dir).resolve(), Path(out_dir).resolve()
    beside = out_dir.with_name(out_dir.name + ".run")
    name = f"{config.name}-{fingerprint(config, data_dir, base_model)}"
    progress = beside / name / PROGRESS
    storage = open_storage(config.storage or str(beside))
    Rows(data_dir, config.max_length, with_teacher=config.cached_teacher)  # fail here, not in a worker
    validation = _validation(config, data_dir, storage.below(name))
    _ensure_ray(config)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(),
            "data_dir": str(data_dir),
            "base_model": base_model,
            "progress": str(progress),
            "storage": storage.below(name),
        },
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.remote,
            checkpoint_config=_retention(config),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
        validation_config=validation,
    )
    with following(progress, on_progress):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as err:
            raise TrainingError(f"run {name} in {storage.path} failed: {err}") from err
        append_validations(progress, storage.below(name).read_jsons(RESULTS))
    if result.checkpoint is None:
        raise TrainingError(f"run {name} in {storage.path} ended without a checkpoint.")
    checkpoint, metrics = _chosen(config, result)
    metrics = {name: value for name, value in metrics.items() if value != UNKNOWN}
    with checkpoint.as_directory() as folder, writing(out_dir) as temporary:
        shutil.copytree(Path(folder) / MODEL, temporary, dirs_exist_ok=True)
    return TrainResult(out_dir, metrics)
