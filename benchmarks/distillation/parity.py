"""Our losses and gradients beside TRL's and ModelOpt's, on the same random tensors in fp32.

The peers run in an environment of their own and give back tensors. Knows nothing about speed.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import make, program
from benchmarks.results import Bar, at_most
from distill_jobs.training.divergence import Divergence, HiddenTeacher, LossWeights, linear_divergence

PEER = "trl"
PINS = Path(__file__).with_name("requirements") / "trl.txt"
NAMES = {
    "gkd": "TRL 1.16 GKDTrainer.generalized_jsd_loss",
    "chunked": "TRL 1.16 ChunkedDivergenceFunction",
    "modelopt": "ModelOpt 0.47 LogitsDistillationLoss",
}
ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY = 300, 96, 160, 5000


def cases() -> list[dict[str, Any]]:
    """(peer, beta, T): TRL's over beta, without T^2; ModelOpt's forward KL with it."""
    betas = [
        {"peer": peer, "beta": beta, "temperature": t}
        for peer in ("gkd", "chunked")
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0)
        for t in (1.0, 2.0)
    ]
    return betas + [{"peer": "modelopt", "beta": 0.0, "temperature": t} for t in (1.0, 2.0, 4.0)]


def tensors() -> dict[str, Tensor]:
    """A student and a wider teacher, with logits of a few nats."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "hidden": draw(ROWS, WIDTH),
        "weight": draw(VOCABULARY, WIDTH, scale=2 * WIDTH**-0.5),
        "teacher_hidden": draw(ROWS, TEACHER_WIDTH),
        "teacher_head": draw(VOCABULARY, TEACHER_WIDTH, scale=2 * TEACHER_WIDTH**-0.5),
    }


def ours(given: dict[str, Tensor], case: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients of the chunked op, in the peer's convention."""
    hidden, weight = (given[k].clone().requires_grad_() for k in ("hidden", "weight"))
    one = Divergence(
        "jsd", beta=case["beta"], temperature=case["temperature"], t_squared=case["peer"] == "modelopt"
    )
    teacher = HiddenTeacher(given["teacher_hidden"], given["teacher_head"])
    labels, even = torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS,), 1 / ROWS)
    loss, _ = linear_divergence(hidden, weight, labels, teacher, LossWeights(1.0, 0.0, one), even)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def apart(left: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value of the second."""
    return float((left.double() - right.double()).abs().max() / right.double().abs().max())


def theirs(given: dict[str, Tensor], wanted: list[dict[str, Any]]) -> list[list[Tensor]]:
    """What the peers give back for the cases."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-parity-") as folder:
        source, found = Path(folder) / "in.pt", Path(folder) / "out.pt"
        torch.save({"tensors": given, "cases": wanted}, source)
        script = Path(__file__).with_name("peer_losses.py")
        subprocess.run([program(PEER, "python"), str(script), str(source), str(found)], check=True)
        answers: list[list[Tensor]] = torch.load(found)
        return answers


def run(threads: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """One row a case, one bar a peer."""
    torch.set_num_threads(threads)
    make(PEER, PINS)
    given, wanted = tensors(), cases()
    rows: list[dict[str, Any]] = []
    for case, answer in zip(wanted, theirs(given, wanted), strict=True):
        far = [apart(a, b) for a, b in zip(ours(given, case), answer, strict=True)]
        names = ("loss", "grad_hidden", "grad_weight")
        rows.append({"part": "parity", **case, **dict(zip(names, far, strict=True))})
    bars = []
    for peer, name in NAMES.items():
        worst = max(max(r[k] for k in names) for r in rows if r["peer"] == peer)
        bars.append(at_most(f"relative difference, loss and gradients: {name}", worst, 1e-5))
    return rows, bars
