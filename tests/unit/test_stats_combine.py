"""Combining e-values: means, e-Bonferroni, strata, and what each role may do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ville import evalues

from contracts.metrics import MetricKind, Role
from contracts.rollout import MetricStatus
from serve.rollout.stats import combine

LOGS = st.lists(st.floats(-30, 30), min_size=1, max_size=6)


def status(name: str, harm: float = 1.0, good: float = 1.0) -> MetricStatus:
    """Evidence made up, as e-values."""
    return MetricStatus(
        name=name, kind=MetricKind.ERRORS, log_harm=math.log(harm), log_noninferior=math.log(good)
    )


def family(**of: tuple[Role, float, float]) -> combine.Family:
    """Metrics by name: role, harm e-value, non-inferiority e-value; alphas 0.05."""
    made = [status(name, harm, good) for name, (_, harm, good) in of.items()]
    return combine.family(made, {name: role for name, (role, _, _) in of.items()}, 0.05, 0.05)


def test_log_mean_exp_neither_overflows_nor_loses_the_small_terms() -> None:
    """E-values grow without bound; their mean must not."""
    assert combine.log_mean_exp([2000.0, 0.0]) == pytest.approx(2000.0 - math.log(2))
    assert combine.log_mean_exp([0.0, math.log(3)], [0.25, 0.75]) == pytest.approx(math.log(2.5))
    assert combine.log_mean_exp([-3000.0, -3000.0]) == -3000.0


@given(LOGS)
def test_the_mean_is_that_of_an_independent_implementation(logs: list[float]) -> None:
    """Against ville's merging function, on any e-values."""
    expected = math.log(float(evalues.combine([math.exp(v) for v in logs])))
    assert combine.log_mean_exp(logs) == pytest.approx(expected, abs=1e-9)


@given(LOGS)
def test_bonferroni_never_rejects_what_the_mean_does_not(logs: list[float]) -> None:
    """max E >= J/alpha implies mean E >= 1/alpha: naming the culprit costs no further error."""
    if max(logs) >= combine.log_each_at(0.05, len(logs)):
        assert combine.log_mean_exp(logs) >= math.log(20) - 1e-9


def test_a_hurt_stratum_is_not_cancelled_by_healthy_ones() -> None:
    """Nine strata with falling e-values leave a tenth of the hurt one's; a product would leave nothing."""
    strata = [math.log(1e4), *[math.log(0.01)] * 9]
    assert combine.log_over_strata(strata) == pytest.approx(math.log((1e4 + 0.09) / 10))
    assert combine.log_over_strata(strata[:2], [0.9, 0.1]) == pytest.approx(math.log(9e3 + 1e-3))


@pytest.mark.parametrize(
    ("role", "harm", "objective"),
    [(Role.GUARDRAIL, True, False), (Role.OBJECTIVE, False, True), (Role.INFO, False, False)],
)
def test_only_guardrails_throw_back(role: Role, harm: bool, objective: bool) -> None:
    """Overwhelming harm: a guardrail rolls back, an objective holds for a person, info is only told."""
    found = family(errors=(Role.GUARDRAIL, 0.5, 30.0), other=(role, 1e6, 30.0))
    assert (found.harm, found.objective_harm) == (harm, objective)


def test_bonferroni_counts_the_guardrails_only() -> None:
    """Info metrics and objectives cost the guardrails nothing: two guardrails need 2/alpha each."""
    others = {f"info{i}": (Role.INFO, 1.0, 1.0) for i in range(8)}
    found = family(
        a=(Role.GUARDRAIL, 41.0, 1.0), b=(Role.GUARDRAIL, 0.0001, 1.0), c=(Role.OBJECTIVE, 1.0, 1.0), **others
    )
    assert found.log_harm_each_at == pytest.approx(math.log(40))
    assert found.log_objective_each_at == pytest.approx(math.log(20))
    assert found.harm
    assert found.worst is not None
    assert found.worst.name == "a"


@pytest.mark.parametrize(
    ("role", "passes"), [(Role.GUARDRAIL, False), (Role.OBJECTIVE, False), (Role.INFO, True)]
)
def test_guardrails_and_objectives_promote_and_info_does_not_stop_it(role: Role, passes: bool) -> None:
    """One metric short of 1/alpha_promote: it stops the promotion unless it is info."""
    found = family(errors=(Role.GUARDRAIL, 1.0, 21.0), other=(role, 1.0, 19.0))
    assert found.noninferior is passes
    assert found.weakest.name == ("errors" if passes else "other")


def test_without_guardrails_nothing_is_thrown_back() -> None:
    """Objectives alone can promote; their harm is none of a rollback's business."""
    found = family(score=(Role.OBJECTIVE, 1e9, 1e9))
    assert (found.harm, found.noninferior, found.worst) == (False, True, None)
    assert found.log_mean_harm == 0.0


def test_info_alone_is_no_family() -> None:
    """Nothing could ever be promoted by it."""
    with pytest.raises(ValueError, match="guardrail or an objective"):
        family(errors=(Role.INFO, 1.0, 1.0))
