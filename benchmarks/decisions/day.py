"""Equal arms for 24 hours, thousands of runs at once: which of them does the shipped decide() throw back?

2.9 million looks would take decide() half an hour, most of it spent on runs in which nothing happens. At
tolerance 0 its harm test has a closed form, so numpy screens all runs at once; every run in which the screen
reaches 1/alpha, or comes near it, and every REPLAYED-th of the others goes through decide() on the same
windows, look by look, and the day is decide()'s. A disagreement raises. The detector, likewise: every run in
which it alarms, or nearly, is the shipped detector's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.decisions.setting import BASE, DAY, HOUR, MARGIN, SEED, WEIGHT, Ended, spec
from benchmarks.decisions.traffic import Floats, Minute, Traffic
from contracts.metrics import ArmCounts
from serve.rollout.observation import SeenWindow
from serve.rollout.simulate import follow
from serve.rollout.stats import detector, two_sample
from serve.rollout.stats.two_sample import HARM_ALTERNATIVES, Window

REPLAYED = 50
_NEAR = 1e-6
"""Log units within which the screen does not decide."""


def days(seeds: Sequence[int]) -> list[tuple[Ended, float]]:
    """By run: how its day ended, and the minute of the detector's false alarm (0: none)."""
    return _follow(Traffic(len(seeds), 0.0, seed=(SEED, seeds[0])).minutes(DAY, WEIGHT), seeds)


def hours(seeds: Sequence[int]) -> list[Ended]:
    """The same for an hour, of other traffic: cheap, so there can be many and the error is small."""
    traffic = Traffic(len(seeds), 0.0, seed=(SEED, seeds[0], HOUR)).minutes(HOUR, WEIGHT)
    return [ended for ended, _ in _follow(traffic, seeds)]


def _follow(traffic: Minute, seeds: Sequence[int]) -> list[tuple[Ended, float]]:
    looks = len(traffic.n_c)
    harm, alarm = screen(traffic)
    of = spec(hold_final=True)
    found = []
    for i, seed in enumerate(seeds):
        mine = [Window(*(int(column[look, i]) for column in traffic)) for look in range(looks)]
        checked = seed % REPLAYED == 0
        end, alarm_at = Ended("", float(looks)), 0.0
        if checked or harm[:, i].max() >= math.log(1.0 / of.alpha_harm) - _NEAR:
            end = _decided(mine)
            _agree(end.decision == "rolled_back", harm[:, i].max(), math.log(1.0 / of.alpha_harm), seed)
        if checked or alarm[:, i].max() >= math.log(detector.ARL) - _NEAR:
            alarm_at = _detected(mine)
            _agree(alarm_at > 0, alarm[:, i].max(), math.log(detector.ARL), seed)
        found.append((end, alarm_at))
    return found


def screen(traffic: Minute) -> tuple[Floats, Floats]:
    """Logs of the harm e-process and of the detector, [look, run], as two_sample and detector define them."""
    excess, weights = (np.array(column)[:, None] for column in zip(*HARM_ALTERNATIVES, strict=True))
    late_weights = np.array(detector.HARM_WEIGHTS)[:, None]
    runs = traffic.n_c.shape[1]
    fresh = two_sample.start(BASE)
    base_n, base_k = np.full(runs, fresh.base_n), np.full(runs, fresh.base_k)
    done, watch = np.zeros((len(excess), runs)), np.zeros((len(excess), runs))
    harm, alarm = np.zeros(traffic.n_c.shape), np.zeros(traffic.n_c.shape)
    for look, (n_b, k_b, n_c, k_c) in enumerate(zip(*traffic, strict=True)):
        a = np.clip(base_k / base_n, two_sample.LOWEST, two_sample.HIGHEST)
        c = np.minimum(a + excess, two_sample.HIGHEST)
        with np.errstate(divide="ignore", invalid="ignore"):
            x = (n_b * a + n_c * c) / (n_b + n_c)
            gained = k_b * np.log(a / x) + (n_b - k_b) * np.log((1.0 - a) / (1.0 - x))
            gained += k_c * np.log(c / x) + (n_c - k_c) * np.log((1.0 - c) / (1.0 - x))
        gained = np.where((n_b > 0) & (n_c > 0), gained, 0.0)
        done, watch = done + gained, np.maximum(watch, 0.0) + gained
        harm[look] = np.log((weights * np.exp(done)).sum(axis=0))
        alarm[look] = np.log((late_weights * np.exp(watch)).sum(axis=0))
        keep = np.minimum(1.0, two_sample.MEMORY / (base_n + n_b))
        base_n, base_k = (base_n + n_b) * keep, (base_k + k_b) * keep
    return harm, alarm


def _decided(windows: list[Window]) -> Ended:
    """The day through decide()."""
    looks = iter(windows)

    def counts(_split: object, _t: float) -> SeenWindow:
        n_b, k_b, n_c, k_c = next(looks)
        stable, canary = ArmCounts(n=n_b, errors=k_b), ArmCounts(n=n_c, errors=k_c)
        return SeenWindow(split_version=2, stable=stable, canary=canary)

    run = follow(spec(hold_final=True), counts, len(windows) * 60.0)
    return Ended(run.status.decision or "", run.seconds / 60.0)


def _detected(windows: list[Window]) -> float:
    """The look of the shipped detector's alarm, or 0."""
    test, state = two_sample.start(BASE), detector.start()
    for look, window in enumerate(windows, 1):
        after = two_sample.look(test, window, 0.0, MARGIN)
        state, test = detector.look(state, detector.harm_increments(test, after)), after
        if detector.alarmed(state):
            return float(look)
    return 0.0


def _agree(shipped: bool, highest: float, bound: float, seed: int) -> None:
    if abs(highest - bound) > _NEAR and shipped != (highest >= bound):
        raise RuntimeError(
            f"seed {seed}: screen reached {highest:.9f} of {bound:.9f}, shipped says {shipped}"
        )
