"""One look with traffic: counts become evidence, and harm, silence, the kill switch and the sample ratio are
judged, in every phase that has a canary. Knows nothing about what lets a step be left.
"""

from __future__ import annotations

import math
from typing import Any

from contracts.gates import Verdict
from contracts.metrics import PAIR, ArmCounts
from contracts.rollout import Phase, RolloutSpec, SrmBlock, SrmRule
from contracts.traffic import Arm
from serve.rollout import evidence, sentences
from serve.rollout.draft import Draft, roll_back
from serve.rollout.observation import SeenWindow
from serve.rollout.stats import srm

KILL_SWITCH_SAMPLES = 20


def look(d: Draft) -> None:
    """Consume the windows: each split version is a block of its own, so weights are never mixed."""
    assert d.seen.split is not None
    d.looked = True
    metrics, step, fresh = d.status.metrics, dict(d.status.step_counts), False
    for window in d.seen.windows:
        metrics = evidence.update(d.spec, metrics, window)
        fresh = fresh or window.canary.n > 0
        if window.split_version == d.seen.split.version:
            step = plus(step, window)
    last = d.status.last_canary_at or d.seen.now
    # Time in which no controller was watching is not time without data.
    unwatched = max(0.0, d.seen.now - d.status.next_look_at - 2 * d.spec.look_s)
    d.set(
        metrics=evidence.read(d.spec, metrics, d.seen.queries),
        step_counts=step,
        last_canary_at=d.seen.now if fresh else last + unwatched,
        next_look_at=d.seen.now + d.spec.look_s,
        **totals(d),
        **_sample_ratio(d, step),
    )


def totals(d: Draft) -> dict[str, Any]:
    """The windows added to the totals, and the cursor behind them."""
    total = dict(d.status.total_counts)
    for window in d.seen.windows:
        total = plus(total, window)
    return {"total_counts": total, "cursor": {**d.status.cursor, **d.seen.cursor}}


def plus(counts: dict[str, ArmCounts], window: SeenWindow) -> dict[str, ArmCounts]:
    """Counts by arm with a window's added."""
    seen = {Arm.STABLE.value: window.stable, Arm.CANARY.value: window.canary}
    if window.pairs.scores:
        seen[PAIR] = window.pairs
    return {**counts, **{arm: counts.get(arm, ArmCounts()).plus(new) for arm, new in seen.items()}}


def kill_switch(spec: RolloutSpec, now: tuple[int, int], step: tuple[int, int]) -> str | None:
    """Outside statistics, at every tick: did the candidate mostly fail since the last look, or in this step?

    Args:
        now: (requests, failures) of the candidate since the last look.
        step: the same before that, since the step began.
    """
    for (n, errors), since in ((now, "since the last look"), (_both(now, step), "in this step")):
        if n >= KILL_SWITCH_SAMPLES and errors >= spec.kill_switch_errors * n:
            limit = f"(limit {sentences.percent(spec.kill_switch_errors)})"
            return f"kill switch: canary failed {errors} of {n} requests {since} {limit}"
    return None


def _both(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def harm_or_silence(d: Draft) -> bool:
    """Roll back on shown harm, on a missing canary, and on a skewed split where the policy says so."""
    family = d.family
    if family.harm:
        roll_back(d, sentences.harm(d.spec, family, d.status.total_counts), blame=True)
        return True
    if d.status.srm is Verdict.FAIL and d.spec.srm is SrmRule.ROLLBACK:
        roll_back(d, sentences.sample_ratio(d.spec, d.status), blame=False)
        return True
    silent = d.seen.now - (d.status.last_canary_at or d.seen.now)
    if d.status.phase is not Phase.PAUSED and silent >= d.spec.no_data_deadline_s:
        why = f"no data: the canary got no counted request for {silent:.0f} s"
        roll_back(d, f"{why} (deadline {d.spec.no_data_deadline_s:g} s)", blame=False)
        return True
    return False


def _sample_ratio(d: Draft, step: dict[str, ArmCounts]) -> dict[str, Any]:
    """Does the canary get the share it was given? Latched within a step: the mismatch does not heal.

    Requests of one conversation are assigned together, so counts are divided by their design effect.
    Undivided, a sound split of conversations of 3 requests is said to be skewed in 12 % of all hours
    (simulated, 300 requests a minute), of geometric lengths in 35 %; divided by twice their mean in none.
    """
    assert d.seen.split is not None
    share, block = d.seen.split.share_of(d.spec.id), d.status.srm_block
    if d.spec.srm is SrmRule.IGNORE or not any(arm.n for arm in step.values()) or not 0.0 < share < 1.0:
        return {}
    if block is None or block.share != share:
        block = _next_block(d, share)
    log_e = max(d.status.log_srm, block.log_e + _mismatch(d.spec, block, step))
    shown = log_e >= math.log(1.0 / d.spec.alpha_srm)
    return {"log_srm": log_e, "srm": Verdict.FAIL if shown else Verdict.PASS, "srm_block": block}


def _next_block(d: Draft, share: float) -> SrmBlock:
    """Another share from here on; blocks multiply, as each one's e-value is one given the past."""
    last, step = d.status.srm_block, d.status.step_counts
    if last is None:
        return SrmBlock(share=share)
    canary, stable = (step.get(arm.value, ArmCounts()).n for arm in (Arm.CANARY, Arm.STABLE))
    return SrmBlock(
        share=share, canary=canary, stable=stable, log_e=last.log_e + _mismatch(d.spec, last, step)
    )


def _mismatch(spec: RolloutSpec, block: SrmBlock, step: dict[str, ArmCounts]) -> float:
    """Log e-value of a mismatch in what came under a block's share."""
    canary, stable = (step.get(arm.value, ArmCounts()).n for arm in (Arm.CANARY, Arm.STABLE))
    unit = spec.srm_unit_requests
    return srm.block_log_e(
        srm.Block(block.share, (canary - block.canary) / unit, (stable - block.stable) / unit)
    )
