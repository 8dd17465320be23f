"""evaluate: teacher, student, quantized artifact and champion, measured through vLLM, which will serve them.

One engine start a model: speed, answers to the evaluation requests, scores of the teacher's answers. What
the teacher and the champion did is cached by their digests, the dataset's and the engine's version. Knows
nothing about gates, nor what a metric is (measuring/).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contracts.config import write_atomic
from contracts.errors import EngineError
from distill_jobs.config import EngineConfig, EvaluateConfig
from distill_jobs.engine import engine_name, read_lines, run_engine, write_lines
from distill_jobs.evaluation_set import read_rows
from distill_jobs.keys import output_file, sha256_of
from distill_jobs.measuring.harness import check_tasks, read_tasks, run_tasks, tasks_digest
from distill_jobs.measuring.intervals import Bootstrap
from distill_jobs.measuring.statistics import Statistic, save
from distill_jobs.measuring.subject import Measured, Output, measure, read_output
from distill_jobs.progress import Progress
from distill_jobs.quantizing.checkpoints import params_of, quantization_of
from distill_jobs.quantizing.verify import verify_served
from distill_jobs.stage import Result, locked
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.worker_process import OnProgress
from registry.adapter import folders_of
from registry.digest import bytes_of

Engine = Callable[[dict[str, Any], EngineConfig, OnProgress | None], dict[str, Any]]

TEACHER = "teacher"
MODELS = (TEACHER, "student", "quantized")

_ARITHMETIC = {
    "grader", "classes", "bleu_tokenize", "confidence", "ece_bins", "intervals", "dataset", "dataset_args"
}  # fmt: skip
"""Settings that are about what was measured, not about measuring: they leave the caches valid."""


@dataclass(frozen=True)
class Subjects:
    """The checkpoints, the evaluation requests, and where evaluations of other jobs' models may be kept."""

    models: dict[str, Path]
    """By name, the teacher first: everybody is scored on its answers."""
    teacher_digest: str
    dataset: Path
    dataset_digest: str
    cache_dir: Path
    champion_digest: str | None = None
    """Set when `models` has a "champion" to measure."""
    champion_metrics: dict[str, float | None] = field(default_factory=dict)
    """Its metrics as the registry has them, when they are of these requests and so need no measuring."""


def run(
    config: EvaluateConfig, subjects: Subjects, folder: Path, progress: Progress, engine: Engine = run_engine
) -> Result:
    """Measure all; a model whose measurement is finished is not measured again."""
    check_tasks(config.lm_eval)
    dataset = read_rows(subjects.dataset, config.samples)
    where = {name: _folder(config, subjects, folder, name) for name in subjects.models}
    for number, name in enumerate(subjects.models):
        if (where[name] / "done.json").is_file():
            continue
        on_progress = _scaled(progress, number, len(subjects.models))
        # Two jobs with one teacher meet in the cache; the second is told, rather than both writing one file.
        with locked(where[name]):
            _measure(config, subjects.models[name], dataset, where, name, engine, on_progress)
    measured = _measured(config, where, dataset)
    measured["quantized"] = _verified(config, subjects, where, measured["quantized"])
    return _result(config, subjects, measured, dataset, folder)


def _folder(config: EvaluateConfig, subjects: Subjects, folder: Path, name: str) -> Path:
    """Where a model's evaluation lies: the teacher's and the champion's are shared between jobs."""
    digest = {TEACHER: subjects.teacher_digest, "champion": subjects.champion_digest}.get(name)
    if digest is None or not config.cache_teacher:
        return folder / name
    settings = config.model_dump(mode="json", exclude=_ARITHMETIC | {"cache_teacher"})
    parts = [digest, subjects.dataset_digest, engine_name(), settings, tasks_digest(config.lm_eval)]
    key = sha256_of(parts if name == TEACHER else [*parts, subjects.teacher_digest])
    return subjects.cache_dir / f"{name}-evaluation-{key[:16]}"


def _measure(
    config: EvaluateConfig,
    model: Path,
    dataset: list[dict[str, Any]],
    where: dict[str, Path],
    name: str,
    engine: Engine,
    on_progress: OnProgress,
) -> None:
    """One engine job, and one more for lm-eval's tasks. The teacher's answers are what all are scored on."""
    out = where[name]
    tokenizer = ChatTokenizer(str(model))
    room = config.engine.max_model_len - config.answer_tokens
    prompts = [{"id": i, "ids": tokenizer.prompt(row["request"])} for i, row in enumerate(dataset)]
    longest = max(len(p["ids"]) for p in prompts)
    if longest > room:
        raise EngineError(
            f"An evaluation request has {longest} tokens, and evaluate.answer_tokens is"
            f" {config.answer_tokens}:"
            f" set evaluate.engine.max_model_len to at least {longest + config.answer_tokens}."
        )
    write_lines(out / "prompts.jsonl", prompts)
    rows, same = _rows_to_score(tokenizer, prompts, where, out)
    job = {
        "model": str(model),
        "out": str(out.resolve()),
        "answer": {"prompts": str(out / "prompts.jsonl"), "max_tokens": config.answer_tokens},
        "score": {"rows": rows, "limit": config.score_samples, "topk": config.topk},
        "speed": {
            "prompts": str(out / "prompts.jsonl"),
            "batch": config.speed_batch,
            "tokens": config.speed_tokens,
            "ttft": config.ttft_samples,
        },
    }
    result = engine(job, config.engine, on_progress)
    if config.lm_eval:
        run_tasks(config, model, out)
    write_atomic(out / "done.json", json.dumps(result | {"teachers_tokens": same}) + "\n")


def _rows_to_score(
    tokenizer: ChatTokenizer, prompts: list[dict[str, Any]], where: dict[str, Path], out: Path
) -> tuple[str | None, bool]:
    """The file of the teacher's answers as this model's tokens (None: its own answers), and whether these are
    the teacher's tokens: of a model with another tokenizer no KL can be taken.
    """
    teacher = where[TEACHER]
    if out == teacher:
        write_atomic(out / "vocabulary.txt", tokenizer.digest + "\n")
        return None, True
    if (teacher / "vocabulary.txt").read_text(encoding="utf-8").strip() == tokenizer.digest:
        return str(teacher / "rows.jsonl"), True
    texts = {row["id"]: row["text"] for row in read_lines(teacher / "answers.jsonl")}
    rows = [{"id": p["id"], "ids": p["ids"], "completion": tokenizer.answer(texts[p["id"]])} for p in prompts]
    write_lines(out / "own-rows.jsonl", rows)
    return str(out / "own-rows.jsonl"), False


def _measured(
    config: EvaluateConfig, where: dict[str, Path], dataset: list[dict[str, Any]]
) -> dict[str, Measured]:
    """What the engine wrote about each model, as statistics."""
    outputs: dict[str, Output] = {name: read_output(where[name]) for name in where}
    teacher = outputs[TEACHER]
    texts = dict(enumerate(teacher.texts))
    found = {}
    for name, own in outputs.items():
        one = measure(config, dataset, own, None if name == TEACHER else teacher, texts)
        means, figures = read_tasks(where[name])
        found[name] = replace(one, statistics=one.statistics | means, figures=one.figures | figures)
    return found


def _verified(
    config: EvaluateConfig, subjects: Subjects, where: dict[str, Path], measured: Measured
) -> Measured:
    """The artifact's measurements with what its file says offline; one that is served otherwise than it was
    written, or broken in the writing, is refused. Raises: QuantizationError.
    """
    student, artifact = subjects.models["student"], subjects.models["quantized"]
    if quantization_of(folders_of(artifact)[0]) is None:
        return measured
    at = where["quantized"]
    found = verify_served(
        student, artifact, where["student"], at, at / "offline", config.engine.kv_cache_dtype
    )
    found.check(str(artifact))
    figures = {"offline_perplexity": found.offline_perplexity, "served_gap": found.served_gap}
    return replace(measured, figures=measured.figures | figures)


def _result(
    config: EvaluateConfig,
    subjects: Subjects,
    measured: dict[str, Measured],
    dataset: list[dict[str, Any]],
    folder: Path,
) -> Result:
    """Metrics with their intervals, the statistics that gates compare, and a readable row a request."""
    statistics = {f"{n}.{m}": s for n, one in measured.items() for m, s in one.statistics.items()}
    metrics = {name: s.value() for name, s in statistics.items()}
    metrics |= {f"{n}.{m}": v for n, one in measured.items() for m, v in one.figures.items()}
    metrics |= {f"champion.{name}": value for name, value in subjects.champion_metrics.items()}
    metrics |= _sizes(subjects)
    intervals = _intervals(config, statistics)
    report = {
        "metrics": metrics,
        "intervals": intervals,
        "details": {name: one.details for name, one in measured.items()},
    }
    write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    save(statistics, folder / "statistics.npz")
    _write_requests(folder / "requests.jsonl", measured, dataset)
    outputs = {
        "report": output_file(folder / "report.json"),
        "statistics": output_file(folder / "statistics.npz"),
        "requests": output_file(folder / "requests.jsonl", rows=len(dataset)),
    }
    notes = {"engine": engine_name(), "dataset_digest": subjects.dataset_digest}
    return Result(outputs, {"samples": len(dataset)}, metrics, notes, intervals)


def _intervals(config: EvaluateConfig, statistics: dict[str, Statistic]) -> dict[str, tuple[float, float]]:
    """By metric, where it has one; a task of lm-eval has examples of its own to resample."""
    found = {}
    for size in {len(s.rows) for s in statistics.values()}:
        bootstrap = Bootstrap(size, config.intervals)
        mine = {name: bootstrap.interval(s) for name, s in statistics.items() if len(s.rows) == size}
        found |= {name: interval for name, interval in mine.items() if interval is not None}
    return found


def _write_requests(file: Path, measured: dict[str, Measured], dataset: list[dict[str, Any]]) -> None:
    """What each model answered to each request, side by side."""
    texts = [row["text"] for row in measured[TEACHER].rows]
    with_own = [row.get("answer", text) for row, text in zip(dataset, texts, strict=True)]
    lines = [
        {
            "id": i,
            "request": row["request"],
            "reference": reference,
            "models": {name: one.rows[i] for name, one in measured.items()},
        }
        for i, (row, reference) in enumerate(zip(dataset, with_own, strict=True))
    ]
    write_lines(file, lines)


def _sizes(subjects: Subjects) -> dict[str, float | None]:
    """Bytes on disk and parameters, of an adapter with its base's; a packed artifact has its student's
    parameters.
    """
    sizes: dict[str, float | None] = {}
    parts = {name: folders_of(model) for name, model in subjects.models.items()}
    for name, folders in parts.items():
        if name != "champion":
            like = parts["student"] if name == "quantized" else folders
            sizes[f"{name}.params"] = float(sum(params_of(part) for part in like))
        sizes[f"{name}.bytes"] = float(sum(bytes_of(part) for part in folders))
    return sizes


def _scaled(progress: Progress, number: int, models: int) -> OnProgress:
    """A model's progress as a part of the stage's: each model is two thirds answers, one third scores."""

    def tell(done: int, total: int, unit: str) -> None:
        share = done / total if total else 1.0
        within = 0.67 * share if unit == "answers" else 0.67 + 0.33 * share
        progress.update(int(100 * (number + within)), 100 * models, "percent of a model")

    return tell
