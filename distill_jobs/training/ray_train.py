"""The training loop on Ray Train: N workers, checkpoints that survive killed workers and a killed driver.

It knows Ray and folders; what a step is, is in `loop`. Called again with the same arguments it continues:
the run's name carries a fingerprint of everything that shapes the result, and Ray restores the run of that
name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from contracts.config import canonical_json
from contracts.errors import TrainingError
from distill_jobs.training.adapters import add_lora, save_student
from distill_jobs.training.attention import register
from distill_jobs.training.columns import read_manifest
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer, writing
from distill_jobs.training.models import load_model
from distill_jobs.training.parallel import joined

PROGRESS = "progress.jsonl"
MODEL = "model"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the checkpoint is, and the last metrics: step, steps, epoch, tokens, seconds, kd, ce, grad_norm,
    lr."""

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
    if config.use_gpu:
        model.to(ray.train.torch.get_device())
    else:
        model.set_attn_implementation(register())
    if config.compile:
        for block in model.get_decoder().layers:
            block.compile(dynamic=True)
    rows = Rows(Path(data_dir), config.max_length, with_teacher=config.cached_teacher)
    trainer = Trainer(model, rows, config, joined())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.load(Path(folder))
    return trainer


def _worker(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    config = TrainConfig.model_validate(arguments["config"])
    trainer = _trainer(config, arguments["data_dir"], arguments["base_model"])
    tokenizer = config.shape.tokenizer if config.shape else arguments["base_model"]
    progress = Path(arguments["progress"]) if trainer.workers.rank == 0 else None
    if progress:
        progress.parent.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {"step": trainer.position.step, "steps": trainer.steps}
    for metrics in trainer.run():
        if progress and (metrics["step"] % config.log_steps == 0 or metrics["step"] == metrics["steps"]):
            with progress.open("a", encoding="utf-8") as out:
                out.write(json.dumps(metrics) + "\n")
        if metrics["step"] % config.checkpoint_steps == 0 and metrics["step"] < metrics["steps"]:
            _report(trainer, metrics, None)
    _report(trainer, metrics, tokenizer)


def _report(trainer: Trainer, metrics: dict[str, float], tokenizer: str | None) -> None:
    """Hand Ray a checkpoint; the last one (with a tokenizer) also holds the model as a Hugging Face
    folder."""
    if trainer.workers.rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoint"
        trainer.save(place)
        if tokenizer is not None:
            save_student(trainer.model, tokenizer, place / MODEL, trainer.config.lora)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(place)))


@contextlib.contextmanager
def _following(path: Path, on_progress: Callable[[dict[str, float]], None] | None) -> Iterator[None]:
    """Hand every new line of the progress file to the callback while the run lasts."""
    if on_progress is None:
        yield
        return
    done = threading.Event()
    position = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        nonlocal position
        while True:
            last = done.wait(0.5)
            if path.exists():
                with path.open(encoding="utf-8") as lines:
                    lines.seek(position)
                    whole = lines.read()
                whole = whole[: whole.rfind("\n") + 1]
                position += len(whole.encode())
                for line in whole.splitlines():
                    on_progress(json.loads(line))
            if last:
                return

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _ensure_ray(config: TrainConfig) -> None:
    """Use the cluster that is there (initialised, or RAY_ADDRESS); else start one that the workers fit
    into."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    cpus = max(os.cpu_count() or 1, int(config.workers * config.cpus_per_worker) + 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)


def run_training(
    config: TrainConfig,
    data_dir: Path,
    base_model: str,
    out_dir: Path,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train and leave a plain Hugging Face checkpoint (bf16 safetensors and tokenizer) in `out_dir`.

    The run's checkpoints stay beside it in `<out_dir>.run`, so that the same call continues after a SIGKILL.
    With `on_progress`, metrics arrive every `log_steps` steps, in a thread of this process.

    Raises: TrainingError when the run failed more often than `max_failures`, DataError when the rows are
    malformed.
    """
    data_dir, out_dir = Path(data_dir).resolve(), Path(out_dir).resolve()
    storage = out_dir.with_name(out_dir.name + ".run")
    name = f"{config.name}-{fingerprint(config, data_dir, base_model)}"
    progress = storage / name / PROGRESS
    Rows(data_dir, config.max_length, with_teacher=config.loss.kd_weight > 0)  # fail here, not in a worker
    _ensure_ray(config)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(),
            "data_dir": str(data_dir),
            "base_model": base_model,
            "progress": str(progress),
        },
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    with _following(progress, on_progress):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as err:
            raise TrainingError(f"run {name} in {storage} failed: {err}") from err
    if result.checkpoint is None:
        raise TrainingError(f"run {name} in {storage} ended without a checkpoint.")
    with result.checkpoint.as_directory() as folder, writing(out_dir) as temporary:
        shutil.copytree(Path(folder) / MODEL, temporary, dirs_exist_ok=True)
    return TrainResult(out_dir, dict(result.metrics or {}))
