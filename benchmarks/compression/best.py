"""The best student end to end against its teacher: accuracy, bytes and tokens/s, both served by vLLM.

The recipes' best (JSD, 3,000 steps on 12,000 rows) trains the demo's student, cut to the width at which even
8 bits a weight are a sixteenth of the teacher's bytes (by the formula of `stillhouse search`). It is
quantized in several ways and chosen as `stillhouse quantize` does, on requests that are neither trained on
nor tested with. Rows that `benchmarks.recipes` made are used again; its trainings are not, since it keeps no
weights. The training goes on where it was stopped, under a digest of its configuration; the trained student,
its candidates and all answers are kept, tokens/s are measured anew. Knows nothing of other parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.compression.side_by_side import Speeds, measure
from benchmarks.recipes import data
from benchmarks.recipes.job import Job, configure, result_file
from benchmarks.results import Bar, at_least
from contracts.config import write_atomic
from contracts.errors import QuantizationError
from demo.world import grade
from demo.world.cases import Case
from distill_jobs.config import EngineConfig, IntervalConfig
from distill_jobs.engine import read_lines, run_engine, write_lines
from distill_jobs.measuring.intervals import Bootstrap
from distill_jobs.measuring.statistics import Statistic, mean_of
from distill_jobs.quantizing.candidates import Measured, choose, parse_candidate
from distill_jobs.quantizing.checkpoints import weight_bytes
from distill_jobs.quantizing.compare import Comparison, compare
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.student import build
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.training.attention import register
from distill_jobs.training.columns import read_manifest
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import STATE, Trainer
from distill_jobs.training.models import load_model, save_model

TEACHER = Path(data.TEACHER)
RECIPES = Path("runs/bench-recipes-2400x120")
"""Where `benchmarks.recipes` keeps its rows."""
RECIPE, ROWS, STEPS, CHOOSING = "jsd", 12_000, 3000, 400
TESTED, FIRST_TESTED = 1000, data.FIRST_EVALUATION + 10_000
WIDTH = ShrinkConfig(intermediate=704)
"""2,540,040 bytes as w8a8; at the base's 768 neurons it would be 2,638,856 of the 2,583,268 there are."""
CANDIDATES = ("smoothquant-w8a8-channel", "gptq-w4a16-g32")
MAX_LOSS = 0.02
"""Of perplexity; within it the fastest is chosen."""
FEWER, ACCURATE, FASTER = 16, 0.98, 5.0
CLIENTS = 32
"""Requests in flight that the bar is measured at, as in benchmarks/serving."""
BATCHES, TOKENS, ROUNDS = (1, 8, CLIENTS, 128), 48, 5
"""Requests in flight, tokens of each answer, turns a model."""
SAVED = 200
"""Steps between checkpoints of the training."""
QUICK = Job(RECIPE, 0, 20, 128, 32)


def run(threads: int, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row for the teacher, the bf16 student and the chosen one; three bars."""
    job = QUICK if quick else Job(RECIPE, 0, STEPS, ROWS, CHOOSING)
    place = rows_folder(folder, job)
    name = f"{result_file(job, folder).stem}-i{WIDTH.intermediate}"
    student = trained(job, place, folder / "best" / name, threads)
    chosen, found = quantized(student, place, folder / "best" / f"{name}-quantized", threads, quick)
    models = {"teacher": TEACHER, "student": student, chosen.name: Path(chosen.artifact)}
    asked = data.requests("evaluation", FIRST_TESTED, 32 if quick else TESTED)
    answers = folder / "best" / f"{name}-answers-{len(asked)}"
    right = {one: graded(folder_of, asked, answers / one, threads) for one, folder_of in models.items()}
    speeds = _speeds(models, answers / "teacher" / "prompts.jsonl", answers, threads, quick)
    rows = [_row(one, folder_of, right[one], speeds[one]) for one, folder_of in models.items()]
    rows += [_candidate(one) for one in found]
    return rows, bars(rows[0], rows[2], right["teacher"], right[chosen.name], speeds, chosen.name)


def rows_folder(folder: Path, job: Job) -> Path:
    """Rows with the teacher's answers: those of the recipes' table where they are, else made here."""
    known = {RECIPES / "rows": job.rows, RECIPES / "held-out": job.held_out}
    if all(one.exists() and read_manifest(one).get("rows") == count for one, count in known.items()):
        return RECIPES
    made = folder / f"rows-{job.rows}-{job.held_out}"
    data.make(made, job.rows, job.held_out, [])
    return made


def trained(job: Job, place: Path, out: Path, threads: int) -> Path:
    """The student's checkpoint; a training that was stopped goes on from its last state."""
    if (out / "config.json").is_file():
        return out
    torch.manual_seed(job.seed)
    torch.set_num_threads(threads)
    config = configure(job)
    rows = Rows(place / "rows", config.max_length, config.cached_teacher)
    model = build(load_model(data.STUDENT, None, job.seed), WIDTH, rows).model
    model.set_attn_implementation(register())
    trainer = Trainer(model, rows, config)
    state = out.with_name(f"{out.name}.state")
    if (state / STATE).is_file():
        trainer.load(state)
    for metrics in tqdm(
        trainer.run(), desc=f"training {out.name}", total=job.steps, initial=trainer.position.step,
        unit="step", mininterval=10,
    ):  # fmt: skip
        if metrics["step"] % SAVED == 0 and metrics["step"] < job.steps:
            trainer.save(state)
    save_model(trainer.model, data.STUDENT, out)
    return out


def quantized(
    student: Path, place: Path, out: Path, threads: int, quick: bool
) -> tuple[Measured, list[Measured]]:
    """The fastest candidate within bytes and loss, and all of them.

    Raises: QuantizationError when there is none, with what each of them was.
    """
    budget = weight_bytes(TEACHER) // FEWER
    config = QuantizeConfig(samples=128, threads=threads, scheme="MIXED", budget_bytes=budget)
    rows = [{"id": i, **one} for i, one in enumerate(answered_rows(place / "held-out"))]
    calibration = [
        {"ids": one["ids"] + one["completion"]} for one in answered_rows(place / "rows")[: config.samples]
    ]
    names = CANDIDATES[:1] if quick else CANDIDATES
    job = Comparison(
        model=student,
        out=out,
        candidates=tuple(parse_candidate(one, config) for one in names),
        rows=rows,
        calibration=calibration,
        engine=EngineConfig(max_model_len=512, kv_cache_bytes=128 << 20, threads=threads),
    )
    _, found = compare(job, lambda text: print(text, flush=True))
    choice = choose(found, "speed", MAX_LOSS, budget)
    if choice.picked is None:
        told = "; ".join(f"{one.name}: {one.bytes} bytes, loss {one.loss}, {one.refused}" for one in found)
        raise QuantizationError(f"no candidate has at most {budget:,} bytes and 2 % loss: {told}")
    return choice.picked, found


def answered_rows(folder: Path) -> list[dict[str, list[int]]]:
    """{"ids", "completion"} of every row."""
    table = pq.read_table(folder / "part-00000.parquet", columns=["input_ids", "prompt_len"]).to_pylist()
    return [
        {"ids": row["input_ids"][: row["prompt_len"]], "completion": row["input_ids"][row["prompt_len"] :]}
        for row in table
    ]


def graded(model: Path, asked: Sequence[Case], out: Path, threads: int) -> list[float]:
    """1 for every request that vLLM answers right with the model, greedily; answers are kept in `out`."""
    bodies = [data.body(one) for one in asked]
    file = out / "done.json"
    if not file.is_file():
        tokenizer = ChatTokenizer(data.STUDENT)
        prompts = out / "prompts.jsonl"
        write_lines(prompts, [{"id": i, "ids": tokenizer.prompt(one)} for i, one in enumerate(bodies)])
        task = {
            "model": str(model.resolve()), "out": str(out.resolve()),
            "answer": {"prompts": str(prompts.resolve()), "max_tokens": data.MAX_NEW},
        }  # fmt: skip
        write_atomic(file, json.dumps(run_engine(task, _engine(threads, 64))) + "\n")
    texts = {row["id"]: row["text"] for row in read_lines(out / "answers.jsonl")}
    return [float(bool(grade(one, texts[i]))) for i, one in enumerate(bodies)]


def _engine(threads: int, requests: int) -> EngineConfig:
    return EngineConfig(
        max_model_len=data.MAX_LENGTH, max_num_seqs=requests, kv_cache_bytes=512 << 20, threads=threads
    )


def _speeds(models: dict[str, Path], prompts: Path, out: Path, threads: int, quick: bool) -> Speeds:
    batches = (8, CLIENTS) if quick else BATCHES
    tokens, rounds = (8, 1) if quick else (TOKENS, ROUNDS)
    return measure(models, prompts, out, _engine(threads, max(batches)), batches, tokens, rounds)


def _row(name: str, model: Path, right: list[float], speeds: dict[str, list[float]]) -> dict[str, Any]:
    interval = Bootstrap(len(right), IntervalConfig()).interval(mean_of(list(right)))
    return {
        "part": "best",
        "name": name,
        "bytes": weight_bytes(model),
        "accuracy": float(np.mean(right)),
        "accuracy_interval": interval,
        "requests": len(right),
        **{f"tokens_per_s_{batch}": float(np.median(turns)) for batch, turns in speeds.items()},
    }


def _candidate(one: Measured) -> dict[str, Any]:
    kept = {"name", "bytes", "perplexity", "loss", "served_gap", "refused"}
    return {"part": "best", **one.model_dump(include=kept), "name": f"candidate {one.name}"}


def bars(
    teacher: dict[str, Any],
    student: dict[str, Any],
    teacher_right: list[float],
    student_right: list[float],
    speeds: Speeds,
    name: str,
) -> list[Bar]:
    """The issue's three; `student`'s row gets the interval of its accuracy over the teacher's."""
    by_name: dict[str, Statistic] = {
        "teacher": mean_of(list(teacher_right)),
        name: mean_of(list(student_right)),
    }
    student["of_teacher_interval"] = Bootstrap(len(teacher_right), IntervalConfig()).ratio(
        by_name[name], by_name["teacher"]
    )
    turns = zip(speeds[name][str(CLIENTS)], speeds["teacher"][str(CLIENTS)], strict=True)
    return [
        at_least(
            "best student, served: accuracy of the teacher's",
            student["accuracy"] / max(teacher["accuracy"], 1e-9), ACCURATE,
        ),
        at_least("teacher / best student, bytes", teacher["bytes"] / student["bytes"], FEWER, " ×"),
        at_least(
            f"best student / teacher, tokens/s with {CLIENTS} in flight, served side by side",
            float(np.median([mine / its for mine, its in turns])), FASTER, " ×",
        ),
    ]  # fmt: skip
