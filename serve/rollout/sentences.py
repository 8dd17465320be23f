"""Plain sentences with the numbers in them: why a rollout is where it is.

Read by people in status, history, watch and the report, and stored in the audit trail. Decides nothing.
"""

from __future__ import annotations

import math

from contracts.gates import Verdict
from contracts.metrics import PAIR, ArmCounts, MetricKind, Role
from contracts.rollout import MetricStatus, RolloutSpec, RolloutStatus, WatchStatus
from serve.rollout.evidence import mean_score, windows_of
from serve.rollout.stats import two_sample
from serve.rollout.stats.combine import Family

_WHAT = {
    MetricKind.ERRORS: "failed {c} against {b} on stable",
    MetricKind.QUALITY: "got {c} graded answers wrong against {b} on stable",
    MetricKind.TTFT: "took longer than {t:g} s to the first token in {c} against {b} on stable",
    MetricKind.E2E: "took longer than {t:g} s to the last token in {c} against {b} on stable",
    MetricKind.QUERY: "had {c} bad against {b} on stable",
}


def number(log_e: float) -> str:
    """An e-value for people: 0.3, 41, 1.2e+07."""
    if abs(log_e) > 600:
        return f"1e{log_e / math.log(10):+.0f}"
    value = math.exp(log_e)
    if 0.995 <= value < 10_000:
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return f"{value:.2g}"


def percent(weight: float) -> str:
    """A weight for people."""
    return f"{100 * weight:g} %"


def step_name(spec: RolloutSpec, index: int) -> str:
    """Where in the ladder, e.g. 'step 2 of 5 (5 %)'."""
    return f"step {index + 1} of {len(spec.steps)} ({percent(spec.steps[index].weight)})"


def compared(spec: RolloutSpec, metric: MetricStatus, counts: dict[str, ArmCounts]) -> str:
    """What both arms did on one metric; for latency at the threshold where the canary looks worst."""
    wanted = next(m for m in spec.metrics if m.key == metric.name)
    stable, canary = (counts.get(arm, ArmCounts()) for arm in ("stable", "canary"))
    if wanted.kind is MetricKind.SCORE:
        c, b = (_scored(arm.scores.get(wanted.grader, ())) for arm in (canary, stable))
        return f"canary scored {c} against {b} on stable"
    if wanted.kind is MetricKind.PAIRS:
        z = counts.get(PAIR, ArmCounts()).scores.get(wanted.grader, ())
        half = len(z) // 2
        won, lost = sum(z[half + 1 :]), sum(z[:half])
        return f"canary was better in {won} and worse in {lost} of {sum(z)} pairs, {_scored(z)}"
    if "value" in metric.state:
        assert wanted.query is not None
        edges = (("at least", wanted.query.at_least), ("at most", wanted.query.at_most))
        bounds = ", ".join(f"{word} {edge:g}" for word, edge in edges if edge is not None)
        return f"canary's value is {metric.state['value'][0]:g} ({bounds})"
    windows = windows_of(wanted, stable, canary)
    if wanted.kind is MetricKind.QUERY:
        windows = [two_sample.Window(*(int(v) for v in metric.state.get("counts", [0.0] * 4)))]
    index = max(range(len(windows)), key=lambda i: _excess(windows[i]))
    w = windows[index]
    threshold = wanted.thresholds_s[index] if wanted.thresholds_s else 0.0
    return "canary " + _WHAT[metric.kind].format(c=_share(w.k_c, w.n_c), b=_share(w.k_b, w.n_b), t=threshold)


def harm(spec: RolloutSpec, family: Family, counts: dict[str, ArmCounts]) -> str:
    """Why it is rolled back."""
    worst = family.worst
    assert worst is not None, "harm is only ever shown on a guardrail"
    said = compared(spec, worst, counts)
    if "value" in worst.state:
        return f"{worst.name}: {said}: out of its bounds on {worst.state['row'][0]:.0f} looks in a row"
    if worst.log_harm >= family.log_harm_each_at:
        tests = sum(m.role is Role.GUARDRAIL for m in spec.metrics)
        bound = f"{number(family.log_harm_each_at)} ({tests} guardrails / alpha {spec.alpha_harm:g})"
        return f"{worst.name}: {said}: harm e-value {number(worst.log_harm)} >= {bound}"
    bound = f"{number(family.log_harm_mean_at)} (1 / alpha {spec.alpha_harm:g})"
    return f"{worst.name}: {said}: mean harm e-value {number(family.log_mean_harm)} >= {bound}"


def objective_harm(spec: RolloutSpec, family: Family, counts: dict[str, ArmCounts]) -> str:
    """Why it holds: an objective got worse, which is no reason to throw the student back."""
    worst = family.worst_objective
    assert worst is not None
    return (
        f"objective {worst.name} got worse: {compared(spec, worst, counts)}: e-value {number(worst.log_harm)}"
    )


def sample_ratio(spec: RolloutSpec, status: RolloutStatus) -> str:
    """Why the evidence of this step cannot be trusted."""
    stable, canary = (status.step_counts.get(arm, ArmCounts()).n for arm in ("stable", "canary"))
    share = _share(canary, stable + canary)
    intended = status.weight if status.srm_block is None else status.srm_block.share
    return (
        f"sample-ratio mismatch: the canary got {share} requests of this step instead of "
        f"{percent(intended)}: e-value {number(status.log_srm)} >= {1 / spec.alpha_srm:g} "
        f"(1 / alpha_srm {spec.alpha_srm:g}); assignment or counting is broken"
    )


def watching(spec: RolloutSpec, watch: WatchStatus, now: float) -> str:
    """How the watch goes."""
    return (
        f"promoted; watched for late harm for another {max(0.0, watch.until - now):.0f} s, the former stable "
        f"keeps {percent(spec.holdback)}: strongest detector {watch.worst or 'none yet'} at "
        f"{number(watch.log_alarm)} of {spec.watch_arl:.0f}"
    )


def watched(spec: RolloutSpec, watch: WatchStatus) -> str:
    """Why the watch is over."""
    n = watch.counts.get("canary", ArmCounts()).n
    return f"no late harm in {spec.watch_s:g} s of watch and {n} requests: the former stable goes"


def late_harm(spec: RolloutSpec, watch: WatchStatus) -> str:
    """Why the former stable comes back."""
    metric = next(m for m in watch.metrics if m.name == watch.worst)
    return (
        f"late harm on {watch.worst}: {compared(spec, metric, watch.counts)}: detector "
        f"{number(watch.log_alarm)} >= {spec.watch_arl:.0f} (looks between false alarms)"
    )


def promoted(spec: RolloutSpec, family: Family, counts: dict[str, ArmCounts]) -> str:
    """Why it is promoted."""
    weakest = family.weakest
    margin = next(m.margin for m in spec.metrics if m.key == weakest.name)
    return (
        f"every metric is shown to be no worse than stable by its margin; weakest was {weakest.name} "
        f"(margin {percent(margin)}): {compared(spec, weakest, counts)}: "
        f"e-value {number(weakest.log_noninferior)} >= {number(family.log_promote_at)} "
        f"(1 / alpha {spec.alpha_promote:g})"
    )


def weak(spec: RolloutSpec, metric: MetricStatus, counts: dict[str, ArmCounts], needed: float) -> str:
    """Why a step is not left although its time is over."""
    if metric.verdict is Verdict.NO_DATA:
        return f"no canary data on {metric.name} yet"
    if "value" in metric.state:
        return f"{metric.name}: {compared(spec, metric, counts)}: out of its bounds"
    return (
        f"{metric.name}: {compared(spec, metric, counts)}: "
        f"non-inferiority e-value {number(metric.log_noninferior)} of {needed:.3g} needed"
    )


def waiting(spec: RolloutSpec, status: RolloutStatus, now: float) -> str:
    """What the current step still waits for besides evidence."""
    step = spec.steps[status.step]
    seen = status.step_counts.get("canary", ArmCounts()).n
    dwell = max(0.0, now - status.step_since)
    return (
        f"{step_name(spec, status.step)}: {seen} of {step.min_samples} canary requests, "
        f"{dwell:.0f} of {step.min_dwell_s:g} s"
    )


def _share(k: int, n: int) -> str:
    return f"{k} of {n}" + (f" ({100 * k / n:.1f} %)" if n else "")


def _scored(counts: tuple[int, ...]) -> str:
    mean = mean_score(counts)
    return "nothing" if mean is None else f"{mean:.3f} on average of {sum(counts)}"


def _excess(w: two_sample.Window) -> float:
    return w.k_c / max(1, w.n_c) - w.k_b / max(1, w.n_b)
