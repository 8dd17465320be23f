"""What a study's trials say: means and intervals over seeds, and each knob's values against the base.

Pure arithmetic (Student's t over seeds). Knows nothing about how trials were run or are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student_t

from distill_jobs.studies.config import StudyConfig
from distill_jobs.studies.learning_curve import Curve, Gain, doubling, fit
from distill_jobs.studies.trials import Setting

Interval = tuple[float, float]
Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Line:
    """One setting over its seeds."""

    setting: Setting
    rows: int
    values: list[float]
    mean: float
    interval: Interval | None
    gain: float | None = None
    """Improvement over the base, mean over the seeds; more is better whatever the metric. None: the base."""
    gain_interval: Interval | None = None
    """At the study's level for all the values of a knob together (Bonferroni)."""

    @property
    def verdict(self) -> str:
        """Against the base, by the interval."""
        if self.gain is None:
            return "base"
        if self.gain_interval is None:
            return "one seed: unknown"
        if self.gain_interval[0] > 0:
            return "better"
        return "worse" if self.gain_interval[1] < 0 else "no clear difference"


@dataclass(frozen=True)
class Summary:
    """A finished study."""

    base: Line
    knobs: dict[str, list[Line]]
    shares: list[Line] = field(default_factory=list)
    """By rows, all of them last; empty without a data-size ablation."""
    curve: Curve | None = None
    gain: Gain | None = None


def summarise(study: StudyConfig, found: Mapping[Setting, Sequence[Metrics]]) -> Summary:
    """Put the trials' metrics (by setting, one a seed) together."""
    base = _line(study, Setting(), found[Setting()])
    knobs = {}
    for knob, values in study.knobs.items():
        settings = [Setting(knob=knob, value=v) for v in values]
        knobs[knob] = [_against(study, _line(study, s, found[s]), base, len(values)) for s in settings]
    if study.data is None:
        return Summary(base, knobs)
    shares = sorted({*study.data.shares} - {1.0})
    lines = [*(_line(study, s, found[s]) for s in (Setting(share=share) for share in shares)), base]
    rows = np.array([line.rows for line in lines for _ in line.values], dtype=np.float64)
    values = np.array([value for line in lines for value in line.values])
    curve = fit(rows, values, study.minimise)
    return Summary(base, knobs, lines, curve, doubling(curve, study.level, study.data.worth))


def interval_of(values: Sequence[float], level: float) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    half = float(student_t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    mean = float(np.mean(values))
    return mean - half, mean + half


def _line(study: StudyConfig, setting: Setting, metrics: Sequence[Metrics]) -> Line:
    values = [_value(m, study.metric) for m in metrics]
    rows = int(metrics[0]["rows"] or 0)
    return Line(setting, rows, values, float(np.mean(values)), interval_of(values, study.level))


def _against(study: StudyConfig, line: Line, base: Line, comparisons: int) -> Line:
    """The line with its improvement over the base, paired by seed."""
    sign = -1.0 if study.minimise else 1.0
    gains = [sign * (mine - theirs) for mine, theirs in zip(line.values, base.values, strict=True)]
    if not any(gains):
        return line  # the base's own value: the same trials
    interval = interval_of(gains, 1 - (1 - study.level) / comparisons)
    return Line(
        line.setting, line.rows, line.values, line.mean, line.interval, float(np.mean(gains)), interval
    )


def _value(metrics: Metrics, name: str) -> float:
    value = metrics.get(name)
    return math.nan if value is None else float(value)
