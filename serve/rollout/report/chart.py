"""Line charts as SVG text: axes, rules, bands and lines that are labelled where they end.

Colours are CSS classes of the page, so a chart follows light, dark and print; every line also has a dash of
its own. Takes plain numbers. Knows nothing about rollouts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

_MOST_POINTS = 500
"""More are thinned out; the first and the last always stay."""
_LINE = 15.0
"""Height of a label in the chart's units."""
_TOP, _BOTTOM, _LEFT = 12.0, 40.0, 58.0


@dataclass(frozen=True)
class Axis:
    """A range with its ticks. Values outside are clipped."""

    low: float
    high: float
    label: str
    ticks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Line:
    """Points in order; `step` holds each value until the next, `dots` marks the points."""

    points: Sequence[tuple[float, float]]
    style: str
    """CSS class that gives the colour, e.g. 'c1'."""
    label: str = ""
    """Written where the line ends."""
    step: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """What lies between two lines: (x, low, high)."""

    points: Sequence[tuple[float, float, float]]
    style: str


@dataclass(frozen=True)
class Rule:
    """A level, or with `vertical` a moment, that lines are read against."""

    at: float
    label: str = ""
    style: str = "rule"
    vertical: bool = False


@dataclass(frozen=True)
class Stretch:
    """A named stretch of the x axis, drawn as a ribbon above the chart."""

    start: float
    end: float
    label: str
    style: str


@dataclass(frozen=True)
class Chart:
    """Everything on one chart."""

    name: str
    """Unique on the page: ids hang on it."""
    title: str
    about: str
    """What a reader who cannot see it is told."""
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    rules: Sequence[Rule] = ()
    ribbon: Sequence[Stretch] = field(default=())
    width: float = 940.0
    height: float = 260.0
    labels: float = 150.0
    """Room for labels on the right."""


def draw(chart: Chart) -> str:
    """The chart as an <svg> element."""
    top = _TOP + (26.0 if chart.ribbon else 0.0)
    plot = _Plot(chart, _LEFT, top, chart.width - chart.labels, chart.height - _BOTTOM)
    clip = f"clip-{chart.name}"
    inner = "".join((
        *(_band(plot, b) for b in chart.bands),
        *(_rule(plot, r) for r in chart.rules),
        *(_line(plot, line) for line in chart.lines),
    ))  # fmt: skip
    title = f"{chart.name}-title"
    return (
        f'<svg viewBox="0 0 {chart.width:g} {chart.height:g}" role="img" '
        f'aria-labelledby="{title} {chart.name}-about">'
        f'<title id="{title}">{html.escape(chart.title)}</title>'
        f'<desc id="{chart.name}-about">{html.escape(chart.about)}</desc>'
        f'<clipPath id="{clip}"><rect x="{plot.left:g}" y="{plot.top - 3:g}" '
        f'width="{plot.right - plot.left:g}" height="{plot.bottom - plot.top + 6:g}"/></clipPath>'
        f'{_axes(plot)}<g clip-path="url(#{clip})">{inner}</g>{_ribbon(plot)}{_labels(plot)}</svg>'
    )


def time_ticks(low: float, high: float, most: int = 8) -> list[tuple[float, str]]:
    """Round times between two numbers of seconds."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
    span = max(high - low, 1e-9)
    step = next((s for s in steps if span / s <= most), 86400 * math.ceil(span / 86400 / most))
    name, per = next((n, p) for n, p in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)) if step >= p)
    first = math.ceil(low / step) * step
    count = int((high - first) / step + 1e-9) + 1
    return [(first + i * step, f"{(first + i * step) / per:g} {name}") for i in range(count)]


def ticks(low: float, high: float, write: Callable[[float], str], most: int = 5) -> list[tuple[float, str]]:
    """Round numbers between two numbers: 1, 2 or 5 times a power of ten apart."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0, 20.0) if span / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [(i * step, write(i * step)) for i in range(first, int(high / step + 1e-9) + 1)]


class _Plot:
    """Where values land."""

    def __init__(self, chart: Chart, left: float, top: float, right: float, bottom: float) -> None:
        self.chart, self.left, self.top, self.right, self.bottom = chart, left, top, right, bottom

    def px(self, x: float) -> float:
        axis = self.chart.x
        return self.left + (x - axis.low) / max(axis.high - axis.low, 1e-12) * (self.right - self.left)

    def py(self, y: float) -> float:
        axis = self.chart.y
        share = (y - axis.low) / max(axis.high - axis.low, 1e-12)
        return self.bottom - share * (self.bottom - self.top)


def _axes(p: _Plot) -> str:
    parts = []
    for value, text in p.chart.y.ticks:
        y = p.py(value)
        parts.append(f'<line class="grid" x1="{p.left:g}" x2="{p.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(p.left - 7, y + 4, text, "tick end"))
    for value, text in p.chart.x.ticks:
        x = p.px(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{p.bottom:g}" y2="{p.bottom + 4:g}"/>'
        )
        parts.append(_text(x, p.bottom + 18, text, "tick middle"))
    parts.append(f'<line class="axis" x1="{p.left:g}" x2="{p.right:g}" y1="{p.bottom:g}" y2="{p.bottom:g}"/>')
    parts.append(_text((p.left + p.right) / 2, p.chart.height - 5, p.chart.x.label, "name middle"))
    middle = (p.top + p.bottom) / 2
    if p.chart.y.label:
        turned = f'transform="translate(13 {middle:g}) rotate(-90)"'
        parts.append(f'<text class="name middle" {turned}>{html.escape(p.chart.y.label)}</text>')
    return "".join(parts)


def _line(p: _Plot, line: Line) -> str:
    points = [(p.px(x), p.py(y)) for x, y in thin(line.points)]
    if not points:
        return ""
    if line.step:
        points = [points[0], *(q for a, b in pairwise(points) for q in ((b[0], a[1]), b))]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = "".join(f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points)
    single = len(points) == 1 and not line.dots
    return f'<path class="line {line.style}" d="{path}"/>' + (dots if line.dots or single else "")


def _band(p: _Plot, band: Band) -> str:
    points = thin(band.points)
    if not points:
        return ""
    upper = [f"{p.px(x):.1f} {p.py(high):.1f}" for x, _, high in points]
    lower = [f"{p.px(x):.1f} {p.py(low):.1f}" for x, low, _ in reversed(points)]
    return f'<path class="band {band.style}" d="M{"L".join([*upper, *lower])}Z"/>'


def _rule(p: _Plot, rule: Rule) -> str:
    if rule.vertical:
        x = p.px(rule.at)
        return f'<line class="{rule.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{p.top:g}" y2="{p.bottom:g}"/>'
    y = p.py(rule.at)
    return f'<line class="{rule.style}" x1="{p.left:g}" x2="{p.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _ribbon(p: _Plot) -> str:
    parts = []
    for s in p.chart.ribbon:
        x, width = p.px(s.start), p.px(s.end) - p.px(s.start)
        parts.append(
            f'<rect class="ribbon {s.style}" x="{x:.1f}" y="{_TOP - 6:g}" width="{max(width, 1.5):.1f}" '
            f'height="18" rx="2"><title>{html.escape(s.label)}</title></rect>'
        )
        if width > 6.6 * len(s.label) + 6:
            parts.append(_text(x + width / 2, _TOP + 7, s.label, f"ribbon-name middle {s.style}"))
    return "".join(parts)


def _labels(p: _Plot) -> str:
    """Labels of lines at their ends and of rules, pushed apart so that all can be read."""
    wanted = [
        (p.py(line.points[-1][1]), p.px(line.points[-1][0]), line.label, line.style)
        for line in p.chart.lines
        if line.label and line.points
    ]
    wanted += [(p.py(r.at), p.right, r.label, r.style) for r in p.chart.rules if r.label and not r.vertical]
    parts = []
    for y, (_, _, text, style) in zip(_apart([w[0] for w in wanted], p), wanted, strict=True):
        parts.append(_text(p.right + 8, y + 4, text, f"label {style}"))
    for r in p.chart.rules:
        if r.label and r.vertical:
            parts.append(_text(p.px(r.at), p.top - 3, r.label, f"label middle {r.style}"))
    return "".join(parts)


def _apart(wanted: list[float], p: _Plot) -> list[float]:
    """Heights at least a line apart, in the same order, inside the chart where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(w, p.top), p.bottom) for w in wanted]
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + _LINE)
    floor = p.bottom + 2.0
    for i in reversed(order):
        placed[i] = min(placed[i], floor)
        floor = placed[i] - _LINE
    return placed


def thin(points: Sequence[T]) -> list[T]:
    """At most 500 points, evenly spread."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stride = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(i * stride)] for i in range(_MOST_POINTS)]


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'
