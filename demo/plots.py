"""The demo's pictures: a rollout over time, latency and quality by arm, what compression bought.

Takes plain numbers, returns SVG text. Knows nothing of where they came from.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

ARM_COLOURS = {"stable": "#2563eb", "canary": "#d97706"}
METRIC_COLOURS = {"errors": "#7c3aed", "ttft": "#0891b2", "e2e": "#16a34a", "quality": "#dc2626"}


@dataclass(frozen=True)
class Look:
    """One look of the controller: seconds since start, weight, and log e-values by metric."""

    t: float
    weight: float
    log_harm: dict[str, float]
    log_noninferior: dict[str, float]


@dataclass(frozen=True)
class Evidence:
    """A rollout's looks and the thresholds they are held against (natural logs)."""

    looks: list[Look]
    log_harm_at: float
    log_promote_at: float
    phases: list[tuple[float, str]] = field(default_factory=list)
    """When each phase began."""


def rollout(title: str, evidence: Evidence) -> str:
    """Weight over time, and evidence for harm and for non-inferiority against its threshold."""
    figure, (top, harm, promote) = plt.subplots(
        3, 1, figsize=(9, 7.2), sharex=True, height_ratios=(1, 1.3, 1.3)
    )
    times = [look.t for look in evidence.looks]
    top.step(times, [look.weight * 100 for look in evidence.looks], where="post", color="#0f172a")
    top.fill_between(times, [look.weight * 100 for look in evidence.looks], step="post", alpha=0.12)
    top.set_ylabel("canary, % of traffic")
    top.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for at, phase in evidence.phases:
        top.axvline(at, color="#94a3b8", linewidth=0.7, linestyle=":")
        top.annotate(
            phase, (at, top.get_ylim()[1]), fontsize=7, rotation=90, va="top", ha="right", color="#475569"
        )
    _evidence(
        harm, times, [k.log_harm for k in evidence.looks], evidence.log_harm_at, "harm: roll back above"
    )
    label = "non-inferior: promote above"
    _evidence(promote, times, [k.log_noninferior for k in evidence.looks], evidence.log_promote_at, label)
    promote.set_xlabel("seconds since the first look")
    return _svg(figure)


def latency(values: dict[str, dict[str, Sequence[float]]]) -> str:
    """Empirical distribution of each latency by arm; log axis, so ratios are distances."""
    figure, axes = plt.subplots(1, len(values), figsize=(4.2 * len(values), 3.2), squeeze=False)
    for axis, (name, arms) in zip(axes[0], values.items(), strict=True):
        for arm, seconds in arms.items():
            ordered = sorted(seconds)
            if not ordered:
                continue
            share = [(i + 1) / len(ordered) for i in range(len(ordered))]
            axis.plot(
                [1000 * s for s in ordered],
                share,
                label=f"{arm} (n={len(ordered):,})",
                color=ARM_COLOURS[arm],
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"{name}, ms")
        axis.set_ylabel("share of requests")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def quality(points: dict[str, list[tuple[float, float, float]]]) -> str:
    """Share of right answers by arm over time: (seconds, share, half width of its 95 % interval)."""
    figure, axis = plt.subplots(figsize=(9, 3))
    for arm, rows in points.items():
        if rows:
            times, share, half = zip(*rows, strict=True)
            axis.errorbar(
                times,
                share,
                yerr=half,
                label=arm,
                color=ARM_COLOURS[arm],
                marker="o",
                markersize=3,
                capsize=2,
            )
    axis.set_ylim(-0.02, 1.04)
    axis.set_xlabel("seconds since the rollout began")
    axis.set_ylabel("right answers")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def compression(rows: list[tuple[str, float, float, float, float]]) -> str:
    """Bars relative to the teacher: accuracy, parameters, bytes, served tokens a second."""
    names = ("accuracy", "parameters", "bytes", "tokens/s")
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    for index, (axis, name) in enumerate(zip(axes, names, strict=True)):
        values = [row[1 + index] for row in rows]
        bars = axis.bar([r[0] for r in rows], values, color=["#64748b", "#60a5fa", "#d97706"][: len(rows)])
        axis.bar_label(bars, [f"{v:.3g}×" for v in values], fontsize=8)
        axis.set_title(f"{name} / teacher's", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(0, max(values) * 1.18)
        axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _evidence(
    axis: plt.Axes, times: list[float], logs: list[dict[str, float]], at: float, label: str
) -> None:
    for metric in logs[0] if logs else ():
        values = [row.get(metric, 0.0) / math.log(10) for row in logs]
        axis.plot(times, values, label=metric, color=METRIC_COLOURS.get(metric))
    axis.axhline(
        at / math.log(10), color="#111827", linestyle="--", linewidth=1, label=f"{label} {math.exp(at):.0f}"
    )
    axis.set_ylim(max(axis.get_ylim()[0], -4), max(axis.get_ylim()[1], at / math.log(10) * 1.25))
    axis.set_ylabel("log₁₀ e-value")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, ncols=5, loc="upper left")


def _svg(figure: Figure) -> str:
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg")
    plt.close(figure)
    return out.getvalue().split("?>", 1)[-1].split('.dtd">', 1)[-1]
