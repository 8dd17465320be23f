"""Matrix products with an output matrix: inputs of any precision, results and sums in fp32 (fp64 for fp64).

bf16 logits of 20 would be off by 0.06, and a gradient rounded to bf16 before it is summed over chunks biases
training. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 64
_EXACT = (torch.float32, torch.float64)


@contextmanager
def _bf16_inputs(wanted: bool) -> Iterator[None]:
    """On a CPU, fp32 products may read their inputs as bf16, which loses nothing where they were bf16."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Products:
    """The products of one output matrix (V, d) with chunks of at most `rows` hidden states.

    Results share one buffer: a chunk's logits are gone when the next one's are asked for.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.low = weight.dtype not in _EXACT
        self.on_cpu = self.low and not weight.is_cuda
        self.as_bf16 = self.on_cpu and weight.dtype == torch.bfloat16
        self.weight = weight.float() if self.on_cpu else weight
        self.exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.buffer = torch.empty(self._full(rows), len(weight), dtype=self.exact, device=weight.device)

    def _full(self, rows: int) -> int:
        """Rows that are multiplied for so many: kernels that a CPU compiles for a shape are used again."""
        return -(-rows // _ROWS) * _ROWS if self.as_bf16 else rows

    def _filled(self, hidden: Tensor) -> Tensor:
        """In the results' precision, zeros behind."""
        return pad(hidden.to(self.exact), (0, 0, 0, self._full(len(hidden)) - len(hidden)))

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) = hidden @ weight.T, in the shared buffer."""
        rows = len(hidden)
        if self.low and not self.on_cpu:
            return torch.mm(hidden, self.weight.T, out_dtype=torch.float32, out=self.buffer[:rows])
        with _bf16_inputs(self.as_bf16):
            return torch.mm(self._filled(hidden), self.weight.T, out=self.buffer[: self._full(rows)])[:rows]

    def gradient(self) -> Tensor:
        """Where a gradient in the logits may go, in the precision that `backward` multiplies in: the logits'
        own place where that is theirs too."""
        if self.low and not self.on_cpu:
            return torch.empty_like(self.buffer, dtype=self.weight.dtype)
        return self.buffer

    def backward(
        self,
        grad: Tensor,
        hidden: Tensor,
        grad_hidden: Tensor | None,
        part: slice,
        grad_weight: Tensor | None,
    ) -> None:
        """grad_hidden[part] = grad @ weight and grad_weight += grad.T @ hidden, where they are wanted; `grad`
        is the first rows of what `gradient` returned."""
        if self.low and not self.on_cpu:
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, self.weight, out=grad_hidden[part])
            if grad_weight is not None:
                torch.addmm(grad_weight, grad.T, hidden, out_dtype=torch.float32, out=grad_weight)
            return
        rows = len(grad)
        grad = self.buffer[: self._full(rows)]
        grad[rows:] = 0
        with _bf16_inputs(self.as_bf16):
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ self.weight)[:rows]
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, self._filled(hidden))
