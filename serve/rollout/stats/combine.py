"""Putting e-values together: means, e-Bonferroni, strata, and the family of a rollout's metrics by role.

Works on logs, because e-values grow without bound. Knows nothing about where an e-value comes from, nor what
is done once harm or non-inferiority is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contracts.metrics import Role
from contracts.rollout import MetricStatus


def log_mean_exp(logs: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Log of the (weighted) mean of exponentials, without overflow.

    The mean of e-values is an e-value whatever their dependence, and essentially the only symmetric merging
    function that is (Vovk & Wang, Annals of Statistics 49(3), 2021, prop. 3.1); weights must be fixed before
    the data and sum to 1.
    """
    if len(logs) == 1:
        return logs[0]
    top, exp = max(logs), math.exp
    if weights is None:
        return top + math.log(math.fsum([exp(v - top) for v in logs]) / len(logs))
    return top + math.log(math.fsum([w * exp(v - top) for v, w in zip(logs, weights, strict=True)]))


def log_over_strata(logs: Sequence[float], shares: Sequence[float] | None = None) -> float:
    """One e-value from those of disjoint strata (tasks, tenants, languages) of one metric.

    The null is "harmful (or good enough) in no stratum". The mean, not the product: one stratum that is hurt
    must not be cancelled by nine that are fine. `shares` are each stratum's weight, fixed before the rollout.
    """
    return log_mean_exp(logs, shares)


def log_each_at(alpha: float, tests: int) -> float:
    """e-Bonferroni: what one of several e-values must reach alone, ln(J/alpha).

    Reaching it implies that the mean of the J e-values reaches 1/alpha, so rejecting the global null by it
    costs nothing on top of the mean; it names the test that did it (Vovk & Wang 2021, section 4).
    """
    return math.log(max(tests, 1) / alpha)


@dataclass(frozen=True)
class Family:
    """All metrics of a rollout taken together, by role."""

    harm: bool
    """Shown on the guardrails."""
    objective_harm: bool
    """Shown on the objectives: no reason to roll back, but a person decides."""
    noninferior: bool
    """Every guardrail and objective is shown no worse (better, where asked)."""
    log_mean_harm: float
    """Log of the mean of the guardrails' harm e-values; harm when it reaches `log_harm_mean_at`."""
    log_harm_mean_at: float
    """Log of 1/alpha_harm."""
    log_harm_each_at: float
    """Log of J/alpha_harm: e-Bonferroni over the J guardrails."""
    log_objective_each_at: float
    """Log of K/alpha_harm over the K objectives, whose harm only holds."""
    log_promote_at: float
    """Log of 1/alpha_promote, which every guardrail and objective must reach."""
    worst: MetricStatus | None
    """The guardrail with the most evidence of harm; None without guardrails."""
    worst_objective: MetricStatus | None
    """The objective with the most evidence of harm."""
    weakest: MetricStatus
    """The guardrail or objective with the least evidence of non-inferiority."""


def family(
    metrics: Sequence[MetricStatus], roles: Mapping[str, Role], alpha_harm: float, alpha_promote: float
) -> Family:
    """Harm: any E_j >= J/alpha_harm, or mean E_j >= 1/alpha_harm, over the guardrails. Info decides nothing.

    Objectives are a family of their own, at the same alpha: their harm never throws a student back. Promotion
    is an intersection-union test (all must reach 1/alpha_promote), so each test runs at the full alpha.

    Raises: ValueError when no metric is a guardrail or an objective: nothing could ever be promoted.
    """
    guardrails = [m for m in metrics if roles[m.name] is Role.GUARDRAIL]
    objectives = [m for m in metrics if roles[m.name] is Role.OBJECTIVE]
    if not guardrails and not objectives:
        raise ValueError("at least one metric must be a guardrail or an objective")
    mean_at = math.log(1.0 / alpha_harm)
    each_at, objective_at = (log_each_at(alpha_harm, len(ms)) for ms in (guardrails, objectives))
    promote_at = math.log(1.0 / alpha_promote)
    weakest = min((*guardrails, *objectives), key=lambda m: m.log_noninferior)
    mean = _log_mean_harm(guardrails)
    return Family(
        harm=_shown(guardrails, mean, mean_at, each_at),
        objective_harm=_shown(objectives, _log_mean_harm(objectives), mean_at, objective_at),
        noninferior=weakest.log_noninferior >= promote_at,
        log_mean_harm=mean,
        log_harm_mean_at=mean_at,
        log_harm_each_at=each_at,
        log_objective_each_at=objective_at,
        log_promote_at=promote_at,
        worst=max(guardrails, key=lambda m: m.log_harm, default=None),
        worst_objective=max(objectives, key=lambda m: m.log_harm, default=None),
        weakest=weakest,
    )


def _log_mean_harm(metrics: Sequence[MetricStatus]) -> float:
    return log_mean_exp([m.log_harm for m in metrics]) if metrics else 0.0


def _shown(metrics: Sequence[MetricStatus], log_mean: float, mean_at: float, each_at: float) -> bool:
    return bool(metrics) and (log_mean >= mean_at or max(m.log_harm for m in metrics) >= each_at)
