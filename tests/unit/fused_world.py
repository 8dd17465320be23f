"""The fused path without a GPU, in a process of its own: `python -m tests.unit.fused_world PART`.

`interpret` runs the kernel in triton's interpreter (TRITON_INTERPRET=1 must be set before triton is imported)
and prints how far it is from the torch path in float64; `compile` compiles it for sm_90, as it is called,
without a driver. Both print JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from distill_jobs.training.divergence import (
    DenseTeacher,
    Divergence,
    HiddenTeacher,
    LossWeights,
    chunked,
    fused,
)
from distill_jobs.training.divergence.formulas import Kind
from distill_jobs.training.divergence.rows import row_losses
from tests.unit.losses_oracle import apart, draw_world, eager, ours

ROWS, VOCABULARY, BLOCK = 2, 300, 128

Case = tuple[Tensor, Tensor | None, LossWeights]
"""Logits of the student and of the teacher, and the loss."""


def _logits(vocabulary: int, seed: int) -> Tensor:
    return torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def _masked(logits: Tensor, every: int) -> Tensor:
    return logits.masked_fill(torch.arange(logits.shape[1]) % every == 3, -torch.inf)


def cases() -> Iterator[tuple[str, Case]]:
    """Every divergence at T 1 and 2, beside other vocabularies, tokens that a side cannot take, and a
    vocabulary shorter than a block; then the corners of single divergences."""
    z, t = _logits(VOCABULARY, 1), _logits(VOCABULARY, 2)
    for kind in get_args(Kind):
        cold, warm = (LossWeights(0.7, 0.4, Divergence(kind, 0.3, 0.2, x)) for x in (1.0, 2.0))
        yield f"{kind}, T 1", (z, t, cold)
        yield f"{kind}, T 2", (z, t, warm)
        yield f"{kind}, -inf on both sides", (_masked(z, 11), _masked(t, 7), warm)
        yield f"{kind}, teacher shorter by more than a block", (z, t[:, :150], cold)
        yield f"{kind}, teacher longer", (z[:, :150], t, warm)
        yield f"{kind}, shorter than a block", (z[:, :50], t[:, :49], warm)
    for name, one in {
        "jsd 0": Divergence("jsd", beta=0.0),
        "jsd 1": Divergence("jsd", beta=1.0),
        "jsd over beta": Divergence("jsd", beta=0.1, over_beta=True),
        "skew 0": Divergence("skew_kl", alpha=0.0),
        "skew reverse 0": Divergence("skew_reverse_kl", alpha=0.0),
        "no T squared": Divergence(temperature=3.0, t_squared=False),
    }.items():
        yield name, (z, t, LossWeights(1.0, 0.0, one))
    yield "labels alone", (z, None, LossWeights(1.0, 0.4))
    yield "teacher without weight", (z, t, LossWeights(0.0, 0.4))
    yield "bf16 teacher in a longer row", (z, t.bfloat16()[:, :250], LossWeights())
    yield "certain by 200 nats", (z, t + 200 * (torch.arange(VOCABULARY) == 9), LossWeights())


def difference(logits: Tensor, theirs: Tensor | None, weights: LossWeights) -> dict[str, float]:
    """How far divergence, cross entropy and gradient are from the torch path in float64."""
    labels, scale = torch.tensor([5, logits.shape[1] - 1]), torch.tensor([1.0, 0.5])
    teacher = None if theirs is None else DenseTeacher(theirs)
    grad, wanted = logits.clone(), logits.double()
    losses = fused.fused_losses(grad, labels, teacher, weights, scale, grad, BLOCK)
    exact = row_losses(wanted, labels, teacher, weights)
    found = {
        "cross entropy": apart(losses[:, 1], exact[:, 1]),
        "gradient": apart(grad, wanted * scale[:, None]),
    }
    if teacher is None or not weights.kd:
        return {**found, "divergence": float(losses[:, 0].abs().max())}
    return {**found, "divergence": apart(losses[:, 0], exact[:, 0])}


def whole_op() -> dict[str, float]:
    """The op from hidden states, beside float64 autograd; rows of two chunks."""
    chunked.fusible = lambda *_: True  # type: ignore[assignment]
    world, weights = draw_world(5, 8, 60), LossWeights(0.7, 0.4, Divergence("jsd", 0.3, temperature=2.0))
    teacher = HiddenTeacher(world["teacher_hidden"], world["teacher_head"])
    pairs = zip(ours(world, teacher, weights, 3), eager(world, teacher, weights), strict=True)
    return dict(zip(("loss", "hidden", "weight"), (apart(*pair) for pair in pairs), strict=True))


def corners() -> dict[str, Any]:
    """A gradient in bf16 beside one in fp32, the logits left alone; a label outside the vocabulary."""
    z, teacher = _logits(VOCABULARY, 1), DenseTeacher(_logits(VOCABULARY, 2))
    kept, low, ones = z.clone(), torch.empty_like(z, dtype=torch.bfloat16), torch.ones(ROWS)
    full = torch.empty_like(z)
    for labels, grad in ((torch.tensor([5, 299]), low), (torch.tensor([5, 299]), full)):
        fused.fused_losses(z, labels, teacher, LossWeights(), ones, grad, BLOCK)
    lost = fused.fused_losses(z, torch.tensor([-100, 300]), teacher, LossWeights(), ones, full.clone(), BLOCK)
    return {
        "bf16": apart(low, full),
        "logits kept": bool((z == kept).all()),
        "outside": [bool(x) for x in lost[:, 1].isnan()],
    }


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter."""
    rows = {name: difference(*case) for name, case in cases()}
    return {"rows": rows, "corners": corners(), "op": whole_op()}


class _NoDriver:
    """What triton asks of a driver before it compiles for an H100."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_all() -> dict[str, Any]:
    """For every divergence, the bytes of machine code that `fused_losses` would launch; and whether importing
    the op had left triton alone."""
    late = "triton" not in sys.modules
    from triton import knobs
    from triton.runtime import driver

    from distill_jobs.training.divergence.kernel import row_kernel

    driver.set_active(_NoDriver())
    made: list[Any] = []
    real = row_kernel.run

    def only_compile(*args: Any, warmup: bool, **options: Any) -> None:
        made.append(real(*args, warmup=True, **options))

    row_kernel.run = only_compile
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        z, labels, ones = torch.zeros(2, 256), torch.zeros(2, dtype=torch.long), torch.ones(2)
        for kind in (None, *get_args(Kind)):
            weights = LossWeights(1.0, 0.5, Divergence(kind or "forward_kl", temperature=2.0))
            low = torch.empty_like(z, dtype=torch.bfloat16)
            fused.fused_losses(z, labels, DenseTeacher(z) if kind else None, weights, ones, low)
            found[kind or "none"] = len(made[-1].asm["cubin"])
    return {"bytes": found, "imported late": late}


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
