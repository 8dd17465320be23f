"""The chunked linear-plus-divergence op beside the plain way: time, peak memory, and that both agree.

Each side runs in a process of its own, so that neither finds memory the other left. On a CPU the peak is
the process's resident set above what it holds before the step (VmHWM, reset first); on CUDA it is the
allocator's. Both include the gradients. A row names the path that ran: eager, torch (the op on a CPU), or
fused (the op on CUDA). Knows nothing about trainers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.results import Bar, at_most
from distill_jobs.training.divergence import Divergence, HiddenTeacher, LossWeights, linear_divergence
from distill_jobs.training.divergence.fused import fusible

TEMPERATURE, KD, HARD, BETA = 2.0, 1.0, 0.5, 0.5


@dataclass(frozen=True)
class Shape:
    """Rows, width of student and teacher, vocabulary."""

    rows: int
    width: int
    vocabulary: int
    dtype: str


CPU = Shape(2048, 256, 32_768, "float32")
CUDA = Shape(8192, 4096, 128_256, "bfloat16")


def inputs(shape: Shape, device: str) -> dict[str, Tensor]:
    """Random hidden states, output matrices and labels, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, size: float) -> Tensor:
        drawn = torch.randn(rows, shape.width, generator=generator, device=device) * size
        return drawn.to(getattr(torch, shape.dtype))

    matrix = 2 * shape.width**-0.5
    return {
        "hidden": draw(shape.rows, 1),
        "weight": draw(shape.vocabulary, matrix),
        "teacher_hidden": draw(shape.rows, 1),
        "teacher_head": draw(shape.vocabulary, matrix),
        "labels": torch.randint(shape.vocabulary, (shape.rows,), generator=generator, device=device),
    }


def eager(one: dict[str, Tensor], kind: str) -> Tensor:
    """As one writes it: all logits of both, log_softmax, kl_div, cross entropy."""
    logits = (one["hidden"] @ one["weight"].T).float()
    with torch.no_grad():
        theirs = (one["teacher_hidden"] @ one["teacher_head"].T).float()
    log_q, log_p = log_softmax(logits / TEMPERATURE, -1), log_softmax(theirs / TEMPERATURE, -1)
    if kind == "forward_kl":
        kd = kl_div(log_q, log_p, reduction="sum", log_target=True)
    else:
        log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
        pair = (kl_div(log_m, side, reduction="sum", log_target=True) for side in (log_p, log_q))
        kd = sum(pair, torch.zeros((), device=logits.device)) / 2
    rows = len(logits)
    return KD * TEMPERATURE**2 * kd / rows + HARD * cross_entropy(logits, one["labels"])


def chunked(one: dict[str, Tensor], kind: str) -> Tensor:
    """The op."""
    weights = LossWeights(KD, HARD, Divergence(kind, beta=BETA, temperature=TEMPERATURE))  # type: ignore[arg-type]
    rows = len(one["hidden"])
    even = torch.full((rows,), 1 / rows, device=one["hidden"].device)
    teacher = HiddenTeacher(one["teacher_hidden"], one["teacher_head"])
    return linear_divergence(one["hidden"], one["weight"], one["labels"], teacher, weights, even)[0]


SIDES: dict[str, Callable[[dict[str, Tensor], str], Tensor]] = {"eager": eager, "chunked": chunked}


def path(side: str, one: dict[str, Tensor]) -> str:
    """Which code a side runs."""
    if side == "eager":
        return side
    logits = torch.empty(0, dtype=torch.float32, device=one["hidden"].device)
    return "fused" if fusible(logits, HiddenTeacher(one["teacher_hidden"], one["teacher_head"])) else "torch"


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak(device: str) -> int:
    """Forget the peak; returns what is held now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    """Most bytes held at once since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def measure(side: str, kind: str, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """One side's best time and peak memory, its loss and its gradients' norms."""
    one = inputs(shape, device)
    leaves = [one["hidden"].requires_grad_(), one["weight"].requires_grad_()]
    seconds, peaks = [], []
    for _ in range(repeats):
        for leaf in leaves:
            leaf.grad = None
        held = reset_peak(device)
        started = time.perf_counter()
        loss = SIDES[side](one, kind)
        loss.backward()  # type: ignore[no-untyped-call]
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        peaks.append(peak(device) - held)
    norms = [float(leaf.grad.double().norm()) for leaf in leaves if leaf.grad is not None]
    found = {"path": path(side, one), "seconds": min(seconds), "peak_bytes": max(peaks)}
    return {**found, "loss": float(loss.detach()), "norms": norms}


def _fresh(side: str, kind: str, threads: int, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.distillation.op", side, kind, str(threads), str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(threads: int, repeats: int = 5) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows and bars for forward KL and JSD, with the hard label and T = 2."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = CUDA if device == "cuda" else CPU
    rows, bars = [], []
    for kind in ("forward_kl", "jsd"):
        found = {side: _fresh(side, kind, threads, repeats) for side in SIDES}
        for side, one in found.items():
            what = (
                f"{kind} + CE, {shape.rows} rows x {shape.vocabulary} tokens, d {shape.width}, {shape.dtype}"
            )
            rows.append({"part": "op", "what": what, "side": side, "device": device, **one})
        ours, plain = found["chunked"], found["eager"]
        where = f"chunked op / eager, {kind}, {device}"
        memory = ours["peak_bytes"] / plain["peak_bytes"]
        bars.append(at_most(f"{where}: peak memory", memory, 1 / 6))
        bars.append(at_most(f"{where}: time", ours["seconds"] / plain["seconds"], 1.0))
    return rows, bars


def main() -> None:
    """One side in this process; prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("kind", choices=["forward_kl", "jsd"])
    parser.add_argument("threads", type=int)
    parser.add_argument("repeats", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(measure(args.side, args.kind, CUDA if device == "cuda" else CPU, device, args.repeats)))


if __name__ == "__main__":
    main()
