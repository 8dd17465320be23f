"""Pictures of commands, as SVG text that is the same for the same figures. Knows nothing about what is drawn.

matplotlib is imported when something is drawn: it takes a second, and drawing is the last thing that a
command does.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure() -> tuple[Figure, Axes]:
    """A figure for SVG, without a display."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def text_of(figure: Figure) -> str:
    """The SVG; without a date, so that it changes only with the figures."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
