"""The divergences between two rows of log-probabilities, and their gradients in the student's logits.

p is the teacher, q the student, both over the same categories: a vocabulary, or k tokens and a tail. Knows
nothing of where the categories come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from contracts.errors import TrainingError

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]

NEVER = -1e4
"""Log-probability of a category that neither side can take: exp(NEVER) is 0, and 0 * NEVER is not NaN."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence, with its parameters.

    - forward_kl: KL(p || q)
    - reverse_kl: KL(q || p)
    - jsd: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, as TRL
      has it). At beta 0 and 1 it is the forward and the reverse KL, as in TRL, although the formula tends to
      zero there; `over_beta` divides by beta (1 - beta), which makes those the limits.
    - skew_kl: KL(p || alpha p + (1 - alpha) q), skew_reverse_kl: KL(q || (1 - alpha) p + alpha q) (DistiLLM,
      arXiv 2402.03898; the gradient goes through the mixture)
    - total_variation: half the sum of |p - q|

    `temperature` T divides both sides' logits; `t_squared` multiplies the divergence by T^2 (Hinton 2015).
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    t_squared: bool = True
    over_beta: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise TrainingError(f"divergence '{self.kind}' is unknown; choose one of {get_args(Kind)}.")
        if not self.temperature > 0:
            raise TrainingError(f"temperature must be above 0, not {self.temperature}.")

    @property
    def scale(self) -> float:
        """What the divergence is multiplied with."""
        return self.temperature**2 if self.t_squared else 1.0


def _mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log1p(-share_of_p))


def _forward(log_p: Tensor, log_q: Tensor, _: Divergence) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (log_p - log_q).mul_(p).sum(-1), p.neg_()


def _reverse(log_p: Tensor, log_q: Tensor, _: Divergence) -> tuple[Tensor, Tensor]:
    slope = (log_q - log_p).mul_(log_q.exp())
    return slope.sum(-1), slope


def _jsd(log_p: Tensor, log_q: Tensor, one: Divergence) -> tuple[Tensor, Tensor]:
    if one.beta in (0.0, 1.0):
        return (_reverse if one.beta else _forward)(log_p, log_q, one)
    log_m = _mixture(log_p, log_q, one.beta)
    slope = (log_q - log_m).mul_(log_q.exp()).mul_(1 - one.beta)
    loss = one.beta * (log_p - log_m).mul_(log_p.exp()).sum(-1) + slope.sum(-1)
    over = one.beta * (1 - one.beta) if one.over_beta else 1.0
    return loss / over, slope.div_(over)


def _skew(log_p: Tensor, log_q: Tensor, one: Divergence) -> tuple[Tensor, Tensor]:
    if one.alpha == 0:
        return _forward(log_p, log_q, one)
    log_m = _mixture(log_p, log_q, one.alpha)
    loss = (log_p - log_m).mul_(log_p.exp()).sum(-1)
    return loss, log_m.neg_().add_(log_p).add_(log_q).exp_().mul_(one.alpha - 1)


def _skew_reverse(log_p: Tensor, log_q: Tensor, one: Divergence) -> tuple[Tensor, Tensor]:
    if one.alpha == 0:
        return _reverse(log_p, log_q, one)
    q, ratio = log_q.exp(), log_q - _mixture(log_p, log_q, 1 - one.alpha)
    loss = (q * ratio).sum(-1)
    return loss, ratio.sub_(ratio.exp(), alpha=one.alpha).mul_(q)


def _total_variation(log_p: Tensor, log_q: Tensor, _: Divergence) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    gap = q - log_p.exp()
    return gap.abs().sum(-1) / 2, gap.sign_().mul_(q).div_(2)


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Divergence], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "jsd": _jsd,
    "skew_kl": _skew,
    "skew_reverse_kl": _skew_reverse,
    "total_variation": _total_variation,
}


def divergence(log_p: Tensor, log_q: Tensor, one: Divergence) -> tuple[Tensor, Tensor]:
    """(rows,) values and s_i = q_i * dL/dq_i, (rows, categories); neither is scaled by T.

    Both arguments are tempered, normalised and finite (`NEVER` for a category without mass). The gradient in
    the student's untempered logits is (s_i - q_i * sum(s)) / T.
    """
    return _FORMULAS[one.kind](log_p, log_q, one)
