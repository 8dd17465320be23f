"""The rows that every recipe of the table trains on: requests of the demo's world, answered by the teacher.

Answers are the teacher's own greedy ones, its top-k beside them; rationales are the world's (the demo's
teacher writes none): which words ask for which call, and what they mean. Everything is written once into the
run's folder. Knows nothing of recipes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers.utils.logging import disable_progress_bar

from contracts.errors import DataError
from demo.world import case
from demo.world.cases import Case
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.training.attention import register
from distill_jobs.training.columns import read_manifest
from distill_jobs.training.data import Rows
from distill_jobs.training.live_teacher import LiveTeacher
from distill_jobs.training.loop import writing
from distill_jobs.training.method_config import TeacherModel
from distill_jobs.training.prefixes.generate import Sampling, generate

TEACHER = "demo/models/teacher"
STUDENT = "demo/models/student-base"
TOP_K = 20
FIRST_EVALUATION = 100_000  # lower evaluation cases watched the teacher's training
MAX_NEW = 96
MAX_LENGTH = 256


def requests(split: str, first: int, count: int) -> list[Case]:
    """Cases of the demo's world."""
    return [case(split, first + number) for number in range(count)]


def body(one: Case) -> dict[str, Any]:
    """The request as a client sends it."""
    return {"messages": [{"role": "user", "content": one.text}], "metadata": {"case": one.id}}


def rationale(one: Case) -> str:
    """Why the answer is what it is: the words that ask for each call, and what its arguments stand for."""
    if not one.spoken:
        return "nothing to do"
    parts = []
    for said in one.spoken:
        means = [f'"{shown}" is {name} {value}' for name, (shown, value) in said.slots.items()]
        parts.append("; ".join([f'"{said.words}" asks for {said.tool}', *means]))
    return ". ".join(parts)


def with_rationales(folder: Path, count: int) -> Path:
    """Where the first rows are beside their rationales."""
    return folder / f"rationale-{count}"


def make(folder: Path, rows: int, held_out: int, explained: Collection[int]) -> None:
    """Fill `folder` with `rows`, `held-out`, and so many of the first rows with rationales; what is there
    stays."""
    disable_progress_bar()
    tokenizer = ChatTokenizer(STUDENT)
    teacher = LiveTeacher(TeacherModel(model=TEACHER), 0, torch.device("cpu"), register())
    for name, cases in (
        ("rows", requests("live", 0, rows)),
        ("held-out", requests("evaluation", FIRST_EVALUATION, held_out)),
    ):
        if not (folder / name).exists():
            _answered(folder / name, cases, tokenizer, teacher)
        if (known := read_manifest(folder / name).get("rows")) != len(cases):
            raise DataError(f"{folder / name} has {known} rows, not {len(cases)}; take another --folder.")
    for count in explained:
        if not with_rationales(folder, count).exists():
            _explain(folder, requests("live", 0, count), tokenizer)


def _answered(place: Path, cases: list[Case], tokenizer: ChatTokenizer, teacher: LiveTeacher) -> None:
    """Rows with the teacher's greedy answers and its top-k at every answer's position."""
    prompts = [np.asarray(tokenizer.prompt(body(one))) for one in cases]
    order = np.argsort([len(p) for p in prompts], kind="stable")
    how = Sampling(0.0, MAX_NEW, (tokenizer.eos,))
    answers: dict[int, np.ndarray] = {}
    for start in tqdm(range(0, len(order), 128), desc=f"teacher answers {place.name}", unit="batch"):
        part = order[start : start + 128]
        numbers = torch.zeros(len(part), MAX_NEW)
        found = generate(teacher.model, [prompts[i] for i in part], numbers, how)
        answers |= dict(zip(part.tolist(), found, strict=True))
    ids = [np.concatenate([prompt, answers[i]]) for i, prompt in enumerate(prompts)]
    table: dict[str, Any] = {
        "input_ids": pa.array([one.tolist() for one in ids], pa.list_(pa.int32())),
        "prompt_len": pa.array([len(p) for p in prompts], pa.int32()),
        "difficulty": pa.array([float(len(answers[i])) for i in range(len(ids))], pa.float32()),
        "teacher": ["special" if one.language == "zh" else "general" for one in cases],
    }
    top_ids, top_logprobs = _top(ids, [len(p) for p in prompts], teacher)
    table["topk_ids"] = pa.array([one.reshape(-1).tolist() for one in top_ids], pa.list_(pa.int32()))
    table["topk_logprobs"] = pa.array(
        [one.reshape(-1).astype(np.float16) for one in top_logprobs], pa.list_(pa.float16())
    )
    _write(place, table, {"k": TOP_K, "scheme": "topk", "vocab_size": len(teacher.head), "rows": len(ids)})


def _top(
    ids: list[np.ndarray], prompts: list[int], teacher: LiveTeacher
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(answer, k) ids and log-probabilities of every row."""
    ones = np.ones(len(ids), np.float32)
    rows = Rows.of(ids, np.asarray(prompts), ones, np.zeros(len(ids), bool))
    found_ids, found = [np.zeros(0)] * len(ids), [np.zeros(0)] * len(ids)
    order = np.argsort(rows.lengths, kind="stable")
    for start in tqdm(range(0, len(ids), 64), desc="teacher scores", unit="batch"):
        part = order[start : start + 64]
        last, _ = teacher.last_hidden(
            lambda places, part=part: rows.micro_batch(part[places], False, True), part.tolist(), False
        )
        logprobs = torch.log_softmax(last.float() @ teacher.head.T.float(), -1).topk(TOP_K, -1)
        sizes = (rows.lengths - rows.prompt_len)[part].tolist()
        for index, top_ids, top in zip(
            part, torch.split(logprobs.indices, sizes), torch.split(logprobs.values, sizes), strict=True
        ):
            found_ids[index], found[index] = top_ids.numpy(), top.numpy()
    return found_ids, found


def _explain(folder: Path, cases: list[Case], tokenizer: ChatTokenizer) -> None:
    """The first rows again, each beside a row of task "rationale" for the same request."""
    known = pq.read_table(folder / "rows" / "part-00000.parquet", columns=["input_ids", "prompt_len"])
    count = len(cases)
    ids = known["input_ids"].to_pylist()[:count]
    prompts = known["prompt_len"].to_pylist()[:count]
    why = [one[:n] + tokenizer.answer(rationale(of)) for one, n, of in zip(ids, prompts, cases, strict=True)]
    kept = [i for i, one in enumerate(why) if len(one) < MAX_LENGTH - 16]
    table = {
        "input_ids": pa.array(ids + [why[i] for i in kept], pa.list_(pa.int32())),
        "prompt_len": pa.array(prompts + [prompts[i] for i in kept], pa.int32()),
        "task": ["answer"] * count + ["rationale"] * len(kept),
    }
    _write(with_rationales(folder, count), table, {"scheme": "topk"})


def _write(place: Path, table: dict[str, Any], about: dict[str, Any]) -> None:
    with writing(place) as temporary:
        pq.write_table(pa.table(table), temporary / "part-00000.parquet")
        (temporary / "manifest.json").write_text(json.dumps(about))
