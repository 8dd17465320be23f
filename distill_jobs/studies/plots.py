"""A study's pictures: the learning curve with its fit, and each knob's values. PNG files.

Takes a summary; knows nothing of trials.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill_jobs.studies.config import StudyConfig
from distill_jobs.studies.summary import Line, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _BLUE, _AMBER, _GREY = "#0f172a", "#2563eb", "#d97706", "#94a3b8"


def learning_curve(study: StudyConfig, summary: Summary, file: Path) -> None:
    """Metric by training rows, log axis: every trial, means with intervals, the fit and its extrapolation."""
    figure, axis = new_figure(7.2, 4.2)
    curve, lines = summary.curve, summary.shares
    assert curve is not None
    most = lines[-1].rows
    fine = np.geomspace(lines[0].rows, 2 * most, 200)
    known = fine <= most
    band = curve.band(fine, study.level)
    if band is not None:
        axis.fill_between(
            fine, *band, color=_BLUE, alpha=0.12, linewidth=0, label=f"{study.level:.0%} of the fit"
        )
    way = "+" if curve.sign > 0 else "-"
    shown = f"{curve.sign * curve.a:.3g} {way} {curve.b:.3g} (n/{most:,})^-{curve.c:.2g}"
    axis.plot(fine[known], curve.at(fine[known]), color=_BLUE, label=shown)
    axis.plot(fine[~known], curve.at(fine[~known]), color=_BLUE, linestyle="--", label="extrapolated")
    for line in lines:
        axis.plot([line.rows] * len(line.values), line.values, "o", color=_GREY, markersize=3, zorder=5)
    axis.plot([], [], "o", color=_GREY, markersize=4, label="a trial (one seed)")
    _means(axis, [float(line.rows) for line in lines], lines)
    axis.set_xscale("log")
    _few_ticks(axis, [line.rows for line in lines] + [2 * most])
    axis.set_xlabel("training rows")
    axis.set_ylabel(_label(study))
    axis.set_title("Size of the data", loc="left", fontsize=11, fontweight="bold")
    axis.legend(fontsize=8, frameon=False)
    write_figure(figure, file)


def knob(study: StudyConfig, name: str, lines: list[Line], base: Line, file: Path) -> None:
    """Metric by a knob's value; a log axis for numbers that span a decade, even places for anything else."""
    figure, axis = new_figure(6.0, 3.6)
    values = [line.setting.value for line in lines]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    places = [float(v) for v in values] if numeric else [float(i) for i in range(len(values))]
    for place, line in zip(places, lines, strict=True):
        axis.plot([place] * len(line.values), line.values, "o", color=_GREY, markersize=3, zorder=5)
    _means(axis, places, lines)
    axis.axhline(base.mean, color=_AMBER, linewidth=1, linestyle="--", label=f"base {base.mean:.4g}")
    if numeric and min(places) > 0 and max(places) >= 10 * min(places):
        axis.set_xscale("log")
        _few_ticks(axis, places)
    else:
        axis.set_xticks(places, [str(v) for v in values])
        if len(places) > 1:
            room = (max(places) - min(places)) * 0.08
            axis.set_xlim(min(places) - room, max(places) + room)
    axis.set_xlabel(name)
    axis.set_ylabel(_label(study))
    axis.set_title(name, loc="left", fontsize=11, fontweight="bold")
    axis.legend(fontsize=8, frameon=False)
    write_figure(figure, file)


def _means(axis: Axes, places: list[float], lines: list[Line]) -> None:
    means = [line.mean for line in lines]
    halves = [0.0 if line.interval is None else line.interval[1] - line.mean for line in lines]
    axis.errorbar(
        places,
        means,
        yerr=halves,
        fmt="s",
        color=_INK,
        markersize=5,
        capsize=3,
        zorder=4,
        label="mean, interval",
    )


def _few_ticks(axis: Axes, at: list[float] | list[int]) -> None:
    """The places that were measured, not powers of ten."""
    from matplotlib.ticker import NullLocator

    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(at, [f"{v:,}" if isinstance(v, int) else f"{v:g}" for v in at], fontsize=8)


def _label(study: StudyConfig) -> str:
    return f"{study.metric} ({'less' if study.minimise else 'more'} is better)"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own canvas: no window system, no state shared with other code's pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def write_figure(figure: Figure, file: Path) -> None:
    """Save as PNG, atomically."""
    out = io.BytesIO()
    figure.tight_layout()
    figure.savefig(out, format="png", dpi=150)
    tmp = file.with_name(f".{file.name}.tmp")
    tmp.write_bytes(out.getvalue())
    tmp.replace(file)
