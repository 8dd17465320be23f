"""What a calibration says: JSON for machines, a picture of the frontier, lines for a terminal.

Knows nothing about how thresholds are found.
"""

from __future__ import annotations

from pathlib import Path

from contracts.config import write_atomic
from serve.cascade.calibrate import Calibration, Frontier, Point
from serve.svg import new_figure, text_of

_COLOURS = ("#2563eb", "#d97706", "#16a34a", "#7c3aed", "#dc2626")
_SHOWN = 8


def write(found: Calibration, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `NAME.json` and `NAME.svg` into a folder; their paths."""
    data, picture = folder / f"{name}.json", folder / f"{name}.svg"
    write_atomic(data, found.model_dump_json(indent=2) + "\n")
    write_atomic(picture, plot(found))
    return data, picture


def plot(found: Calibration) -> str:
    """Share of the second's quality against share of calls of the second, as SVG."""
    figure, axes = new_figure()
    for colour, frontier in zip(_COLOURS, found.frontiers, strict=False):
        calls = [100 * p.calls for p in frontier.points]
        axes.plot(calls, [100 * p.kept for p in frontier.points], color=colour, label=str(frontier.signal))
    axes.axhline(100 * found.target, color="#6b7280", linestyle="--", linewidth=1, label="target")
    axes.plot([100 * found.best.calls], [100 * found.best.kept], "o", color="#111827", label="chosen")
    axes.plot([0], [100 * found.first / found.then], "s", color="#9ca3af", label="first alone")
    axes.set_xlabel("requests that the second answers, %")
    axes.set_ylabel("kept of the second's quality, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return text_of(figure)


def shown(frontier: Frontier) -> list[Point]:
    """A few of a frontier's points, the best one among them."""
    points, best = frontier.points, frontier.best()
    step = max(1, len(points) // _SHOWN)
    return [p for i, p in enumerate(points) if i % step == 0 or p is best]
