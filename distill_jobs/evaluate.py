"""evaluate: teacher, student and quantized artifact measured through vLLM, the engine that will serve.

One engine start a model: speed, answers to the evaluation requests, then scores of the teacher's answers. The
teacher's part is cached by its digest, the dataset's and the engine's version. Knows nothing about gates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contracts.config import write_atomic
from contracts.errors import EngineError
from contracts.plugins import load_function
from distill_jobs.config import EngineConfig, EvaluateConfig
from distill_jobs.engine import engine_name, read_lines, run_engine, write_lines
from distill_jobs.evaluation_set import read_requests
from distill_jobs.keys import output_file, sha256_of
from distill_jobs.measures import accuracy, against_teacher, perplexity
from distill_jobs.progress import Progress
from distill_jobs.quantize import params_of
from distill_jobs.stage import Result, locked
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.worker_process import OnProgress
from registry.digest import bytes_of

Engine = Callable[[dict[str, Any], EngineConfig, OnProgress | None], dict[str, Any]]

MODELS = ("teacher", "student", "quantized")


@dataclass(frozen=True)
class Subjects:
    """The three checkpoints, the evaluation requests, and where the teacher's evaluation may be kept."""

    teacher: Path
    teacher_digest: str
    student: Path
    quantized: Path
    dataset: Path
    dataset_digest: str
    cache_dir: Path


def run(
    config: EvaluateConfig, subjects: Subjects, folder: Path, progress: Progress, engine: Engine = run_engine
) -> Result:
    """Measure all three; a model whose measurement is finished is not measured again."""
    requests = read_requests(subjects.dataset, config.samples)
    where = {
        "teacher": _teacher_folder(config, subjects, folder),
        "student": folder / "student",
        "quantized": folder / "quantized",
    }
    for number, name in enumerate(MODELS):
        if (where[name] / "done.json").is_file():
            continue
        on_progress = _scaled(progress, number)
        # Two jobs with one teacher meet in the cache; the second is told, rather than both writing one file.
        with locked(where[name]):
            _measure(config, getattr(subjects, name), requests, where, name, engine, on_progress)
    metrics: dict[str, float | None] = {}
    for name in MODELS:
        found = _metrics(config, where, name, requests)
        metrics |= {f"{name}.{metric}": value for metric, value in found.items()}
    metrics |= _sizes(subjects)
    write_atomic(folder / "report.json", json.dumps(metrics, indent=1) + "\n")
    outputs = {"report": output_file(folder / "report.json")}
    notes = {"engine": engine_name(), "dataset_digest": subjects.dataset_digest}
    return Result(outputs, {"samples": len(requests)}, metrics, notes)


def _teacher_folder(config: EvaluateConfig, subjects: Subjects, folder: Path) -> Path:
    """Where the teacher's evaluation lies: shared between jobs unless the configuration says otherwise."""
    if not config.cache_teacher:
        return folder / "teacher"
    measured = config.model_dump(mode="json", exclude={"grader", "dataset", "dataset_args", "cache_teacher"})
    key = sha256_of([subjects.teacher_digest, subjects.dataset_digest, engine_name(), measured])
    return subjects.cache_dir / f"teacher-evaluation-{key[:16]}"


def _measure(
    config: EvaluateConfig,
    model: Path,
    requests: list[dict[str, Any]],
    where: dict[str, Path],
    name: str,
    engine: Engine,
    on_progress: OnProgress,
) -> None:
    """One engine job. The teacher's own answers are the rows that everybody's scores are taken on."""
    out = where[name]
    tokenizer = ChatTokenizer(str(model))
    room = config.engine.max_model_len - config.answer_tokens
    prompts = [{"id": i, "ids": tokenizer.prompt(r)} for i, r in enumerate(requests)]
    longest = max(len(p["ids"]) for p in prompts)
    if longest > room:
        raise EngineError(
            f"An evaluation request has {longest} tokens, and evaluate.answer_tokens is"
            f" {config.answer_tokens}:"
            f" set evaluate.engine.max_model_len to at least {longest + config.answer_tokens}."
        )
    write_lines(out / "prompts.jsonl", prompts)
    rows = None if name == "teacher" else str(where["teacher"] / "rows.jsonl")
    job = {
        "model": str(model),
        "out": str(out.resolve()),
        "answer": {"prompts": str(out / "prompts.jsonl"), "max_tokens": config.answer_tokens},
        "score": {"rows": rows, "limit": config.score_samples, "topk": config.topk},
        "speed": {
            "prompts": str(out / "prompts.jsonl"),
            "batch": config.speed_batch,
            "tokens": config.speed_tokens,
        },
    }
    result = engine(job, config.engine, on_progress)
    write_atomic(out / "done.json", json.dumps(result) + "\n")


def _metrics(
    config: EvaluateConfig, where: dict[str, Path], name: str, requests: list[dict[str, Any]]
) -> dict[str, float | None]:
    """What the engine wrote about one model, as metrics."""
    out = where[name]
    done = json.loads((out / "done.json").read_text(encoding="utf-8"))
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    found: dict[str, float | None] = {
        "tokens_per_s": done["speed"]["tokens_per_s"],
        "perplexity": perplexity(row["actual"] for row in scores),
    }
    if config.grader is not None:
        texts = {r["id"]: r["text"] for r in read_lines(out / "answers.jsonl")}
        grade = load_function(config.grader, "evaluate.grader")
        found["accuracy"], graded = accuracy(grade, requests, [texts[i] for i in range(len(requests))])
        found["graded"] = float(graded)
    if name != "teacher":
        found |= against_teacher(pq.read_table(where["teacher"] / "scores.parquet").to_pylist(), scores)
    return found


def _sizes(subjects: Subjects) -> dict[str, float | None]:
    """Bytes on disk and parameters; a packed artifact has its student's parameters."""
    params = {"teacher": params_of(subjects.teacher), "student": params_of(subjects.student)}
    params["quantized"] = params["student"]
    sizes: dict[str, float | None] = {f"{name}.params": float(count) for name, count in params.items()}
    for name in MODELS:
        sizes[f"{name}.bytes"] = float(bytes_of(getattr(subjects, name)))
    return sizes


def _scaled(progress: Progress, number: int) -> OnProgress:
    """A model's progress as a part of the stage's: each model is two thirds answers, one third scores."""

    def tell(done: int, total: int, unit: str) -> None:
        share = done / total if total else 1.0
        within = 0.67 * share if unit == "answers" else 0.67 + 0.33 * share
        progress.update(int(100 * (number + within)), 100 * len(MODELS), "percent of a model")

    return tell
