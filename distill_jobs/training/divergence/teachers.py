"""What is known of the teacher at every row: all logits, hidden states to rebuild them, k tokens, or draws.

Vocabularies may differ in length, because models pad theirs: ids mean the same token on both sides, and only
the common part is compared. Knows nothing of divergences or students.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseTeacher:
    """Natural-log, untempered probabilities of the k likeliest tokens; what they leave is one tail category.

    Ids of a row differ. A slot with log-probability -inf, or with an id beyond the student's vocabulary, is
    unused.
    """

    ids: Tensor  # (N, k) integers
    logprobs: Tensor  # (N, k)

    def rows(self, part: slice) -> SparseTeacher:
        return SparseTeacher(self.ids[part], self.logprobs[part])


@dataclass(frozen=True, slots=True)
class SampledTeacher:
    """Tokens drawn from the teacher at temperature 1, with importance weights that sum to 1 a row: an
    unbiased estimate of its distribution, without a tail (random-sampling KD, arXiv 2503.16870).

    Unused slots have log-weight -inf; a token drawn several times may stand in several slots.
    """

    ids: Tensor  # (N, k) integers
    logweights: Tensor  # (N, k), natural logarithm

    def rows(self, part: slice) -> SampledTeacher:
        return SampledTeacher(self.ids[part], self.logweights[part])


@dataclass(frozen=True, slots=True)
class DenseTeacher:
    """Full teacher logits. A token that either side gives -inf is outside the common vocabulary."""

    logits: Tensor  # (N, V_teacher)

    def rows(self, part: slice) -> DenseTeacher:
        return DenseTeacher(self.logits[part])


@dataclass(frozen=True, slots=True)
class HiddenTeacher:
    """The teacher's last hidden states and its output matrix: exact logits, rebuilt a chunk at a time."""

    hidden: Tensor  # (N, d_teacher), after the final norm
    head: Tensor  # (V_teacher, d_teacher)

    def rows(self, part: slice) -> HiddenTeacher:
        return HiddenTeacher(self.hidden[part], self.head)


@dataclass(frozen=True, slots=True)
class MixtureTeacher:
    """The weighted average of several teachers' probabilities, rebuilt a chunk at a time."""

    parts: tuple[HiddenTeacher, ...]
    weights: tuple[float, ...]  # sum to 1

    def rows(self, part: slice) -> MixtureTeacher:
        return MixtureTeacher(tuple(one.rows(part) for one in self.parts), self.weights)


Teacher = SparseTeacher | SampledTeacher | DenseTeacher | HiddenTeacher | MixtureTeacher
