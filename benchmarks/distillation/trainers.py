"""Our training loop beside TRL's GKDTrainer and DistillationTrainer: tokens a second and peak memory.

Same student, teacher, rows, batch, steps, threads and precision; a live dense teacher and the JSD with beta
0.5. Pairs of models: the demo's, Qwen3-shaped ones whose vocabulary is as long against their width as those
of real ones, and on CUDA the shapes of Qwen3 0.6B and 1.7B themselves. TRL runs with and without gradient
checkpointing, and a bar takes the better of the two each time. A token is one that is not padding, of
prompts too; the first steps are not timed. Peak memory is the resident set above that of the process before
it loads models, on CUDA the allocator's. Knows nothing about what the losses are worth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.distillation.parity import PEER, PINS
from benchmarks.peers import ROOT, make, program
from benchmarks.results import Bar, at_least, at_most
from demo.world.cases import case
from demo.world.tools import canonical

MODELS = ROOT / "demo" / "models"
CPU_ROUNDS, CUDA_ROUNDS = 2, 1
"""The sides take turns, and each one's faster run counts; on CUDA a run's steps are many."""


@dataclass(frozen=True)
class Pair:
    """Qwen3-shaped student and teacher (layers, width) with random weights; their speed is not their
    weights'."""

    vocabulary: int
    student: tuple[int, int]
    teacher: tuple[int, int]
    heads: int = 4
    head_dim: int = 64
    stored: str = "float32"


WIDE = Pair(32_768, (2, 256), (6, 320))
QWEN3 = Pair(151_936, (28, 1024), (28, 2048), 16, 128, "bfloat16")


@dataclass(frozen=True)
class Setting:
    """One comparison: whose models, how many rows a step, and who writes the answers."""

    name: str
    pair: Pair | None  # None: the demo's
    trainer: str  # TRL's
    own_answers: bool
    batch: int
    steps: int
    pass_tokens: int | None = 384
    """Ours, on a CPU: wider passes are faster on two threads and need more memory."""
    read_tokens: int | None = 768
    """A pass of our teacher's, of which nothing is kept."""
    skip: int = 1
    """Steps before those that are timed."""
    most_cases: int = 1
    """A row has the text of so many of the demo's cases, in turn of one to this."""


SETTINGS = [
    Setting("demo models, answers given, GKDTrainer", None, "gkd", False, 32, 7, 512),
    Setting("demo models, answers given, DistillationTrainer's step", None, "distillation", False, 32, 7),
    Setting("vocabulary 32k, answers given, GKDTrainer", WIDE, "gkd", False, 32, 4),
    Setting("vocabulary 32k, answers given, DistillationTrainer's step", WIDE, "distillation", False, 32, 4),
    Setting("demo models, student's own answers, DistillationTrainer", None, "distillation", True, 32, 4),
]
OURS_BY_DEFAULT: dict[str, Any] = {"pass_tokens": None, "read_tokens": None}
CUDA_SETTINGS = [
    *(
        replace(
            one,
            **OURS_BY_DEFAULT,
            **({"steps": 12, "skip": 4} if one.own_answers else {"steps": 32, "skip": 12}),
        )
        for one in SETTINGS
    ),
    Setting("Qwen3 0.6B from 1.7B, GKDTrainer", QWEN3, "gkd", False, 8, 10, None, None, 4, 8),
    Setting(
        "Qwen3 0.6B from 1.7B, DistillationTrainer's step",
        QWEN3,
        "distillation",
        False,
        32,
        8,
        4096,
        None,
        3,
        8,
    ),
]
"""Those of the CPU, with more steps since they are short, and models as people have them."""


def rows(count: int, path: Path, most_cases: int = 1) -> Path:
    """Requests of the demo's world with their right answers, as token ids, one JSON object a line."""
    from distill_jobs.tokens import ChatTokenizer

    tokenizer = ChatTokenizer(str(MODELS / "tokenizer"))
    taken = 0
    with path.open("w") as out:
        for index in range(count):
            size = 1 + index % most_cases
            cases = [case("live", taken + number) for number in range(size)]
            taken += size
            messages = [{"role": "user", "content": " ".join(one.text for one in cases)}]
            prompt = tokenizer.prompt({"messages": messages})
            answer = tokenizer.answer(" ".join(canonical(one.answer) for one in cases))
            row = {"messages": messages, "input_ids": prompt + answer, "prompt_len": len(prompt)}
            out.write(json.dumps(row) + "\n")
    return path


def random_model(folder: Path, pair: Pair, layers: int, width: int) -> str:
    """One of a pair, written to a folder; its weights are drawn where that is fast."""
    from transformers import AutoTokenizer

    from distill_jobs.training.config import ShapeConfig
    from distill_jobs.training.models import from_shape

    shape = ShapeConfig(
        vocab_size=pair.vocabulary,
        hidden_size=width,
        layers=layers,
        heads=pair.heads,
        kv_heads=pair.heads // 2,
        head_dim=pair.head_dim,
        intermediate_size=3 * width,
        tokenizer=str(MODELS / "tokenizer"),
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        from_shape(shape, 0).to(getattr(torch, pair.stored)).save_pretrained(folder)
    torch.cuda.empty_cache()
    AutoTokenizer.from_pretrained(MODELS / "tokenizer").save_pretrained(folder)
    return str(folder)


def _figures(command: list[str], spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    env = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise RuntimeError(f"{command[-1]} failed:\n{done.stderr[-2000:]}")
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    return {**found, "tokens_per_s": found["tokens"] / found["seconds"]}


def compare(
    one: Setting, threads: int, dtype: str, folder: Path, rounds: int
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows of ours and TRL's runs in a setting, and its bars."""
    student, teacher = str(MODELS / "student-base"), str(MODELS / "teacher")
    if one.pair is not None:
        student = random_model(folder / "student", one.pair, *one.pair.student)
        teacher = random_model(folder / "teacher", one.pair, *one.pair.teacher)
    spec = {
        "trainer": one.trainer,
        "student": student,
        "teacher": teacher,
        "rows": str(rows(one.batch * one.steps, folder / "rows.jsonl", one.most_cases)),
        "batch": one.batch,
        "pass_tokens": one.pass_tokens,
        "read_tokens": one.read_tokens,
        "steps": one.steps,
        "skip": one.skip,
        "beta": 0.5,
        "lr": 1e-4,
        "dtype": dtype,
        "threads": threads,
        "checkpointing": False,
        "own_answers": one.own_answers,
        "max_new_tokens": 64,
        "max_length": 1024,
        "imports": ["transformers.models.qwen3.modeling_qwen3", "torch._dynamo", "pandas"],
    }
    theirs = [program(PEER, "python"), str(Path(__file__).with_name("peer_trainer.py"))]
    sides = {
        "ours": ([sys.executable, "-m", "benchmarks.distillation.our_trainer"], spec),
        "TRL": (theirs, spec),
        "TRL, gradient checkpointing": (theirs, {**spec, "checkpointing": True}),
    }
    turns = [{k: _figures(*side, folder) for k, side in sides.items()} for _ in range(rounds)]
    found = {k: max((turn[k] for turn in turns), key=lambda run: run["tokens_per_s"]) for k in sides}
    made = [{"part": "trainers", "what": one.name, "dtype": dtype, "side": k, **v} for k, v in found.items()]
    ours, peers = found["ours"], [v for k, v in found.items() if k != "ours"]
    speed = ours["tokens_per_s"] / max(p["tokens_per_s"] for p in peers)
    memory = ours["peak_bytes"] / min(p["peak_bytes"] for p in peers)
    return made, [
        at_least(f"tokens/s, ours / TRL: {one.name}", speed, 1.5),
        at_most(f"peak memory, ours / TRL: {one.name}", memory, 0.5),
    ]


def run(threads: int, only: str = "") -> tuple[list[dict[str, Any]], list[Bar]]:
    """Every setting whose name contains `only`; in bf16 on CUDA, in fp32 on a CPU."""
    make(PEER, PINS)
    on_cuda = torch.cuda.is_available()
    settings, dtype, rounds = (
        (CUDA_SETTINGS, "bfloat16", CUDA_ROUNDS) if on_cuda else (SETTINGS, "float32", CPU_ROUNDS)
    )
    table: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for one in settings:
        if only in one.name:
            with tempfile.TemporaryDirectory(prefix="stillhouse-trainers-") as folder:
                some, met = compare(one, threads, dtype, Path(folder), rounds)
            table += some
            bars += met
    return table, bars
