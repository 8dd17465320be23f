"""One line of the table for one seed: a student trained by a recipe, its answers, its KL to the teacher.

Training is the project's own loop in this process, without Ray; answers are decoded greedily by the training
model in bf16 (the served engine gives the same task accuracy within a request or two, and costs a start a
student). Knows nothing of other jobs.
"""

from __future__ import annotations

import copy
import ctypes
import json
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.recipes.data import (
    FIRST_EVALUATION,
    MAX_LENGTH,
    MAX_NEW,
    STUDENT,
    TEACHER,
    body,
    requests,
    with_rationales,
)
from contracts.config import load_config, write_atomic
from demo.world import grade
from distill_jobs.config import DistillConfig
from distill_jobs.keys import sha256_of
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.training.adapters import add_lora, merged
from distill_jobs.training.attention import register
from distill_jobs.training.config import LossConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.live_teacher import LiveTeacher
from distill_jobs.training.loop import Trainer, count
from distill_jobs.training.method_config import LiveTeacherConfig, TeacherModel
from distill_jobs.training.models import load_model
from distill_jobs.training.optim import cast_parameters
from distill_jobs.training.prefixes.generate import Sampling, generate
from distill_jobs.training.recipes import with_recipe
from distill_jobs.training.step import DistillStep

PR_SET_PDEATHSIG = 1
BASE = Path("configs/distill-support.yaml")


@dataclass(frozen=True, slots=True)
class Job:
    """What one result is of; its name is its file's."""

    recipe: str
    seed: int
    steps: int
    rows: int
    held_out: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.steps}x{self.rows}-{self.seed}"


def end_with_parent() -> None:
    """In a worker: a benchmark that is ended by a signal takes its training along."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def configure(job: Job) -> TrainConfig:
    """The recipe over the demo's training configuration, for one process and so many steps."""
    base = load_config(BASE, DistillConfig).train
    plain = {"workers": 1, "max_length": MAX_LENGTH, "seed": job.seed, "batch_rows": 32}
    config = with_recipe(base.model_copy(update=plain), job.recipe)
    updates = {"max_steps": job.steps, "epochs": 1000.0}
    return config.model_copy(update=updates)


def explains(recipe: str) -> bool:
    """Whether the recipe trains on rationales, too."""
    return configure(Job(recipe, 0, 1, 1, 1)).terms.rationale is not None


def result_file(job: Job, folder: Path) -> Path:
    """Where the job's result is kept: another recipe of the same name has another file. What is left at its
    default does not count: a setting that is new changes no result that was there before it."""
    digest = sha256_of(configure(job).model_dump(mode="json", exclude_defaults=True))[:8]
    return folder / "results" / f"{job.name}-{job.held_out}-{digest}.json"


def trainer_of(job: Job, folder: Path) -> Trainer:
    """The job's run, before its first step."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    config = configure(job)
    model = load_model(STUDENT, None, job.seed)
    if config.lora is not None:
        model = add_lora(model, config.lora, STUDENT)
    model.set_attn_implementation(register())
    explained = config.terms.rationale is not None
    place = with_rationales(folder, job.rows) if explained else folder / "rows"
    rows = Rows(place, config.max_length, config.cached_teacher)
    whole = explained or job.rows >= len(rows)
    return Trainer(model, rows if whole else first_rows(rows, job.rows), config)


def first_rows(rows: Rows, count: int) -> Rows:
    """The first rows alone: small jobs share the large one's file."""
    part = copy.copy(rows)
    for name in ("lengths", "prompt_len", "weights", "rationale", "difficulty", "teacher_tags"):
        setattr(part, name, getattr(rows, name)[:count])
    return part


def run(job: Job, folder: Path, on_step: Callable[[dict[str, float]], None] | None = None) -> dict[str, Any]:
    """Train and measure; the result is kept in a file and read from there the next time."""
    file = result_file(job, folder)
    disable_progress_bar()
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    trainer = trainer_of(job, folder)
    seconds, metrics = [], {}
    for metrics in trainer.run():
        seconds.append(metrics["seconds"])
        if on_step is not None:
            on_step(metrics)
    half = seconds[len(seconds) // 2 - 1] if len(seconds) > 1 else 0.0
    student: Any = merged(trainer.model) if trainer.config.lora is not None else trainer.model
    cast_parameters(student, torch.bfloat16)
    student.set_attn_implementation(register())
    result = asdict(job) | {
        "train_rows": len(trainer.rows.lengths),
        "seconds": seconds[-1],
        "second_half_seconds": seconds[-1] - half,
        "tokens": metrics["tokens"],
        "loss": {k: v for k, v in metrics.items() if k in trainer.step.parts},
        "generation_share": metrics.get("generation_seconds", 0.0) / seconds[-1],
        "right": answers_right(student, job.held_out),
        "kl": kl_to_teacher(student, folder),
        "params": sum(p.numel() for p in student.parameters()),
    }
    write_atomic(file, json.dumps(result) + "\n")
    return result


def answers_right(model: Any, held_out: int) -> list[int]:
    """1 for every held-out request that is answered right, greedily."""
    tokenizer, words = ChatTokenizer(STUDENT), AutoTokenizer.from_pretrained(STUDENT)
    asked = [body(one) for one in requests("evaluation", FIRST_EVALUATION, held_out)]
    prompts = [np.asarray(tokenizer.prompt(one)) for one in asked]
    how = Sampling(0.0, MAX_NEW, (tokenizer.eos,))
    right = [0] * len(asked)
    order = np.argsort([len(p) for p in prompts], kind="stable")
    for start in range(0, len(order), 100):
        part = order[start : start + 100]
        found = generate(model, [prompts[i] for i in part], torch.zeros(len(part), MAX_NEW), how)
        for index, ids in zip(part, found, strict=True):
            text = words.decode(ids.tolist(), skip_special_tokens=True)
            right[index] = int(bool(grade(asked[index], text)))
    return right


def kl_to_teacher(model: Any, folder: Path) -> float:
    """Mean KL(teacher || student) over the whole vocabulary at the held-out answers' tokens, in nats."""
    teacher = LiveTeacherConfig(models=(TeacherModel(model=TEACHER),), cache_rows=0)
    config = TrainConfig(loss=LossConfig(kd_weight=1, hard_weight=0), teacher=teacher)
    step, rows = DistillStep(model.eval(), config), Rows(folder / "held-out", MAX_LENGTH, False)
    indices = np.arange(len(rows))
    step.rows(0, 1, indices, rows)
    counts, total = count(rows, indices), 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = rows.micro_batch(indices[start : start + 64], False, True)
            total += float(step.loss(batch, counts)[1][0])
    return total


def teacher_result(folder: Path, held_out: int) -> dict[str, Any]:
    """The teacher, answered and judged the same way."""
    file = folder / "results" / f"teacher-{held_out}.json"
    if not file.exists():
        teacher = LiveTeacher(TeacherModel(model=TEACHER), 0, torch.device("cpu"), register())
        right = answers_right(teacher.model, held_out)
        params = sum(p.numel() for p in teacher.model.parameters())
        write_atomic(file, json.dumps({"right": right, "params": params}) + "\n")
    return dict(json.loads(file.read_text(encoding="utf-8")))
