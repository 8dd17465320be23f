"""Our training loop beside TRL's GKDTrainer and DistillationTrainer: tokens a second and peak memory.

Same student, teacher, rows, batch, steps, threads and precision; a live dense teacher and the JSD with beta
0.5. Two pairs of models: the demo's, and a Qwen3-shaped one whose vocabulary is as long against its width as
those of real ones. TRL runs with and without gradient checkpointing, and a bar takes the better of the two
each time. A token is one that is not padding, of prompts too; the first step is not timed. Peak memory is the
resident set above that of the process before it loads models. Knows nothing about what the losses are
worth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.distillation.parity import PEER, PINS
from benchmarks.peers import ROOT, make, program
from benchmarks.results import Bar, at_least, at_most
from demo.world.cases import case
from demo.world.tools import canonical

MODELS = ROOT / "demo" / "models"
VOCABULARY = 32_768
SKIP = 1
ROUNDS = 2  # the sides take turns, and each one's faster run counts


@dataclass(frozen=True)
class Setting:
    """One comparison: whose models, how many rows a step, and who writes the answers."""

    name: str
    wide: bool
    trainer: str  # TRL's
    own_answers: bool
    batch: int
    steps: int
    pass_tokens: int = 384
    """Ours, on a CPU: wider passes are faster on two threads and need more memory. The teacher, of which
    nothing is kept, reads 768 at once."""


SETTINGS = [
    Setting("demo models, answers given, GKDTrainer", False, "gkd", False, 32, 7, 512),
    Setting("demo models, answers given, DistillationTrainer's step", False, "distillation", False, 32, 7),
    Setting("vocabulary 32k, answers given, GKDTrainer", True, "gkd", False, 32, 4),
    Setting("vocabulary 32k, answers given, DistillationTrainer's step", True, "distillation", False, 32, 4),
    Setting("demo models, student's own answers, DistillationTrainer", False, "distillation", True, 32, 4),
]


def rows(count: int, path: Path) -> Path:
    """Requests of the demo's world with their right answers, as token ids, one JSON object a line."""
    from distill_jobs.tokens import ChatTokenizer

    tokenizer = ChatTokenizer(str(MODELS / "tokenizer"))
    with path.open("w") as out:
        for index in range(count):
            one = case("live", index)
            messages = [{"role": "user", "content": one.text}]
            prompt = tokenizer.prompt({"messages": messages})
            answer = tokenizer.answer(canonical(one.answer))
            row = {"messages": messages, "input_ids": prompt + answer, "prompt_len": len(prompt)}
            out.write(json.dumps(row) + "\n")
    return path


def wide_model(folder: Path, layers: int, width: int) -> str:
    """A Qwen3-shaped model with random weights and a long vocabulary; its speed is not its weights'."""
    from transformers import AutoTokenizer

    from distill_jobs.training.config import ShapeConfig
    from distill_jobs.training.models import from_shape

    shape = ShapeConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        layers=layers,
        intermediate_size=3 * width,
        tokenizer=str(MODELS / "tokenizer"),
    )
    from_shape(shape, 0).save_pretrained(folder)
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


def compare(one: Setting, threads: int, dtype: str, folder: Path) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows of ours and TRL's runs in a setting, and its bars."""
    student, teacher = str(MODELS / "student-base"), str(MODELS / "teacher")
    if one.wide:
        student = wide_model(folder / "student", 2, 256)
        teacher = wide_model(folder / "teacher", 6, 320)
    spec = {
        "trainer": one.trainer,
        "student": student,
        "teacher": teacher,
        "rows": str(rows(one.batch * one.steps, folder / "rows.jsonl")),
        "batch": one.batch,
        "pass_tokens": one.pass_tokens,
        "steps": one.steps,
        "skip": SKIP,
        "beta": 0.5,
        "lr": 1e-4,
        "dtype": dtype,
        "threads": threads,
        "checkpointing": False,
        "own_answers": one.own_answers,
        "max_new_tokens": 64,
        "imports": ["transformers.models.qwen3.modeling_qwen3", "torch._dynamo", "pandas"],
    }
    theirs = [program(PEER, "python"), str(Path(__file__).with_name("peer_trainer.py"))]
    sides = {
        "ours": ([sys.executable, "-m", "benchmarks.distillation.our_trainer"], spec),
        "TRL": (theirs, spec),
        "TRL, gradient checkpointing": (theirs, {**spec, "checkpointing": True}),
    }
    rounds = [{k: _figures(*side, folder) for k, side in sides.items()} for _ in range(ROUNDS)]
    found = {k: max((one[k] for one in rounds), key=lambda run: run["tokens_per_s"]) for k in sides}
    made = [{"part": "trainers", "what": one.name, "dtype": dtype, "side": k, **v} for k, v in found.items()]
    ours, peers = found["ours"], [v for k, v in found.items() if k != "ours"]
    speed = ours["tokens_per_s"] / max(p["tokens_per_s"] for p in peers)
    memory = ours["peak_bytes"] / min(p["peak_bytes"] for p in peers)
    return made, [
        at_least(f"tokens/s, ours / TRL: {one.name}", speed, 1.5),
        at_most(f"peak memory, ours / TRL: {one.name}", memory, 0.5),
    ]


def run(threads: int, only: str = "", dtype: str = "float32") -> tuple[list[dict[str, Any]], list[Bar]]:
    """Every setting whose name contains `only`."""
    make(PEER, PINS)
    table: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for one in SETTINGS:
        if only in one.name:
            with tempfile.TemporaryDirectory(prefix="stillhouse-trainers-") as folder:
                some, met = compare(one, threads, dtype, Path(folder))
            table += some
            bars += met
    return table, bars
