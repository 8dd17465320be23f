"""Divergences between a teacher and a student, and the op that takes them from hidden states to gradients.

`teachers` says what is known of the teacher, `formulas` holds the divergences, `rows` applies them to a block
of logits, `fused` to a chunk in one launch (its `kernel`, on CUDA), `chunked` is the autograd function. Knows
nothing of models, batches or where a teacher's outputs come from.
"""

from distill_jobs.training.divergence.chunked import linear_divergence
from distill_jobs.training.divergence.formulas import Divergence
from distill_jobs.training.divergence.rows import LossWeights, loss_weights
from distill_jobs.training.divergence.teachers import (
    DenseTeacher,
    HiddenTeacher,
    MixtureTeacher,
    SampledTeacher,
    SparseTeacher,
    Teacher,
)

__all__ = [
    "DenseTeacher",
    "Divergence",
    "HiddenTeacher",
    "LossWeights",
    "MixtureTeacher",
    "SampledTeacher",
    "SparseTeacher",
    "Teacher",
    "linear_divergence",
    "loss_weights",
]
