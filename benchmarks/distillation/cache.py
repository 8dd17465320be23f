"""What a cache of a teacher may leave out: 12 sampled tokens a position beside all logits and the top 12.

A teacher with a Zipf-like tail over 2,048 tokens and a language model's entropy (2 nats): 50 draws are about
12 different tokens, as in the paper (arXiv 2503.16870). A smaller student is trained from each cache on the
same positions with the op, three seeds. On positions never seen: the loss (cross entropy with the teacher's
distribution, nats; what is over its entropy is the KL), and the calibration error of the student's likeliest
token against the chance the teacher gives it (ECE, 15 bins, percentage points). Draws are made by the teach
stage's own function. Knows nothing of files that jobs write.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from benchmarks.results import Bar, at_least, at_most
from distill_jobs.teaching.sampled import draw
from distill_jobs.training.divergence import (
    HiddenTeacher,
    LossWeights,
    SampledTeacher,
    SparseTeacher,
    Teacher,
    linear_divergence,
)

VOCABULARY, SYMBOLS, TEACHER_WIDTH, WIDTH = 2048, 64, 48, 40
POSITIONS, HELD_OUT, BATCH, EPOCHS, K, DRAWS = 400_000, 8_192, 2048, 2, 12, 50
SHARPNESS = 0.9
SEEDS = (0, 1, 2)
SCHEMES = {
    "full": "all logits",
    "sampled": f"{DRAWS} draws",
    "topk": f"top {K} and a tail bucket",
    "renormalised": f"top {K}, renormalised",
}


@dataclass(frozen=True)
class TeacherModel:
    """logits = head(tanh(mix(embeddings of two symbols)), 1): the last column is the tail's prior."""

    embedding: Tensor  # (2, SYMBOLS, TEACHER_WIDTH)
    mix: Tensor  # (TEACHER_WIDTH, TEACHER_WIDTH)
    head: Tensor  # (VOCABULARY, TEACHER_WIDTH + 1)

    def hidden(self, contexts: Tensor) -> Tensor:
        """(N, TEACHER_WIDTH + 1) for (N, 2) symbols."""
        states = self.embedding[0, contexts[:, 0]] + self.embedding[1, contexts[:, 1]]
        return torch.cat([torch.tanh(states @ self.mix), states.new_ones(len(states), 1)], -1)


def make_teacher() -> TeacherModel:
    """The same teacher at every call."""
    generator = torch.Generator().manual_seed(23)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = torch.randperm(VOCABULARY, generator=generator) + 1.0
    head = torch.cat([draw(VOCABULARY, TEACHER_WIDTH) * SHARPNESS, -rank.log()[:, None]], -1)
    return TeacherModel(
        draw(2, SYMBOLS, TEACHER_WIDTH), draw(TEACHER_WIDTH, TEACHER_WIDTH) * TEACHER_WIDTH**-0.5, head
    )


class Student(nn.Module):
    """Narrower than the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.ModuleList(nn.Embedding(SYMBOLS, 2 * WIDTH) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH + 1, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=0.05)

    def forward(self, contexts: Tensor) -> Tensor:
        """(N, WIDTH + 1) last hidden states; the constant is the output bias."""
        states = torch.tanh(self.symbols[0](contexts[:, 0]) + self.symbols[1](contexts[:, 1]))
        return torch.cat([torch.tanh(self.down(states)), states.new_ones(len(states), 1)], -1)


Cache = Callable[[slice], Teacher]
"""What is known of the teacher at some of the positions."""


def fill(teacher: TeacherModel, contexts: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws and the top k at every position."""
    found: dict[str, list[Tensor]] = {"drawn": [], "weights": [], "top": [], "logprobs": []}
    for part in contexts.split(4096):
        logprobs = torch.log_softmax(teacher.hidden(part) @ teacher.head.T, -1)
        numbers = torch.rand(len(part), DRAWS, generator=generator, dtype=torch.float64)
        ids, weights = draw(logprobs, numbers.numpy(), 1.0)
        top = logprobs.topk(K)
        for name, one in (
            ("drawn", torch.from_numpy(ids)),
            ("weights", torch.from_numpy(weights).half()),
            ("top", top.indices),
            ("logprobs", top.values.half()),
        ):
            found[name].append(one)
    return {name: torch.cat(parts) for name, parts in found.items()}


def caches(teacher: TeacherModel, contexts: Tensor, filled: dict[str, Tensor]) -> dict[str, Cache]:
    """The teacher as each scheme remembers it."""

    def renormalised(part: slice) -> Teacher:
        logprobs = filled["logprobs"][part].float()
        return SampledTeacher(filled["top"][part], torch.log_softmax(logprobs, -1))

    return {
        "full": lambda part: HiddenTeacher(teacher.hidden(contexts[part]), teacher.head),
        "sampled": lambda part: SampledTeacher(filled["drawn"][part], filled["weights"][part].float()),
        "topk": lambda part: SparseTeacher(filled["top"][part], filled["logprobs"][part].float()),
        "renormalised": renormalised,
    }


def train(cache: Cache, contexts: Tensor, seed: int) -> Student:
    """Adam with a rate that falls to zero, over the positions in order."""
    torch.manual_seed(seed)
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2, betas=(0.9, 0.99))
    steps = EPOCHS * (len(contexts) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    even, labels = torch.full((BATCH,), 1 / BATCH), torch.zeros(BATCH, dtype=torch.long)
    for step in range(steps):
        start = step % (len(contexts) // BATCH) * BATCH
        part = slice(start, start + BATCH)
        optimizer.zero_grad()
        states = student(contexts[part])
        loss, _ = linear_divergence(
            states, student.head.weight, labels, cache(part), LossWeights(1.0, 0.0), even
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return student


@dataclass(frozen=True)
class Found:
    """A student on held-out positions."""

    loss: float  # cross entropy with the teacher's distribution, nats a position
    kl: float  # KL(teacher || student): the part of the loss that training can take away
    ece: float  # percentage points


def measure(student: Student, teacher: TeacherModel, contexts: Tensor) -> Found:
    """The student beside its teacher."""
    with torch.no_grad():
        log_p = torch.log_softmax(teacher.hidden(contexts) @ teacher.head.T, -1)
        log_q = torch.log_softmax(student(contexts) @ student.head.weight.T, -1)
    p = log_p.exp()
    loss, kl = (float((p * gap).sum(-1).mean()) for gap in (-log_q, log_p - log_q))
    sure, best = log_q.exp().max(-1)
    right = p.gather(-1, best[:, None]).squeeze(-1)
    bins = (sure * 15).long().clamp_max(14)
    gaps = torch.zeros(15).index_add_(0, bins, right - sure).abs().sum() / len(sure)
    return Found(loss, kl, 100 * float(gaps))


def stored(teacher: TeacherModel, contexts: Tensor, filled: dict[str, Tensor]) -> dict[str, float]:
    """Bytes a position of each cache in Parquet, ids as int32 and values as float16."""
    some = slice(0, 4096)
    logits = (teacher.hidden(contexts[some]) @ teacher.head.T).half()
    columns = {
        "full": [logits],
        "sampled": [filled["drawn"][some].int(), filled["weights"][some]],
        "topk": [filled["top"][some].int(), filled["logprobs"][some]],
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="stillhouse-cache-") as folder:
        for name, tensors in columns.items():
            lists = [pa.FixedSizeListArray.from_arrays(t.numpy().reshape(-1), t.shape[1]) for t in tensors]
            path = Path(folder) / name
            pq.write_table(pa.table(lists, names=[str(i) for i in range(len(lists))]), path)
            found[name] = path.stat().st_size / 4096
    return {**found, "renormalised": found["topk"]}


def run(threads: int, positions: int = POSITIONS) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row a scheme, means over the seeds; bars against the full cache."""
    torch.set_num_threads(threads)
    teacher = make_teacher()
    found: dict[str, list[Found]] = {name: [] for name in SCHEMES}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        contexts = torch.randint(SYMBOLS, (positions, 2), generator=generator)
        held_out = torch.randint(SYMBOLS, (HELD_OUT, 2), generator=generator)
        filled = fill(teacher, contexts, generator)
        for name, cache in caches(teacher, contexts, filled).items():
            found[name].append(measure(train(cache, contexts, seed), teacher, held_out))
    sizes = stored(teacher, contexts, filled)
    unique = float((~torch.isneginf(filled["weights"])).sum(-1).double().mean())
    tokens = {"full": VOCABULARY, "sampled": unique, "topk": K, "renormalised": K}
    rows = [
        {
            "part": "cache",
            "what": what,
            "loss": [one.loss for one in found[name]],
            "kl": [one.kl for one in found[name]],
            "ece_points": [one.ece for one in found[name]],
            "tokens_a_position": tokens[name],
            "bytes_a_position": sizes[name],
        }
        for name, what in SCHEMES.items()
    ]
    return rows, _bars(found, sizes)


def _bars(found: dict[str, list[Found]], sizes: dict[str, float]) -> list[Bar]:
    loss, ece = (
        {name: mean(getattr(one, what) for one in of) for name, of in found.items()}
        for what in ("loss", "ece")
    )
    drawn = f"{DRAWS} draws / all logits"
    return [
        at_most(f"{drawn}: loss", loss["sampled"] / loss["full"], 1.01),
        at_most(f"{drawn}: ECE apart, percentage points", abs(ece["sampled"] - ece["full"]), 1.0),
        at_most(f"{drawn}: storage", sizes["sampled"] / sizes["full"], 1 / 50),
        at_least(f"top {K} with tail / all logits: loss, the best seed", _least(found, "topk"), 1.02),
        at_least(
            f"top {K} renormalised / all logits: loss, the best seed", _least(found, "renormalised"), 1.02
        ),
    ]


def _least(found: dict[str, list[Found]], name: str) -> float:
    """The smallest ratio over the seeds: worse means worse at every seed."""
    return min(one.loss / full.loss for one, full in zip(found[name], found["full"], strict=True))
