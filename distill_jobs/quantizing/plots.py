"""The picture of a comparison: bytes against loss of perplexity, the front joined. Takes measurements; knows
nothing about how they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill_jobs.quantizing.candidates import Measured, front
from distill_jobs.studies.plots import new_figure, write_figure

_INK, _BLUE, _AMBER, _GREY = "#0f172a", "#2563eb", "#d97706", "#94a3b8"


def draw_front(base: Measured, measured: Sequence[Measured], chosen: Measured | None, file: Path) -> None:
    """Each candidate at its size and its loss in percent; a marker's area is its tokens/s against bf16."""
    figure, axis = new_figure(7.2, 4.4)
    kept = {one.name for one in front([base, *measured])}
    whole = [m for m in (base, *measured) if m.refused is None]
    for one in whole:
        speed = (one.tokens_per_s or 0.0) / (base.tokens_per_s or 1.0)
        colour = _AMBER if chosen is not None and one.name == chosen.name else _BLUE
        axis.scatter(
            (one.bytes or 0) / 1e6, 100 * (one.loss or 0.0), s=70 * speed, zorder=4,
            color=colour if one.name in kept else _GREY,
        )  # fmt: skip
        axis.annotate(
            f"{one.name} ({speed:.2f}×)", ((one.bytes or 0) / 1e6, 100 * (one.loss or 0.0)), fontsize=7,
            xytext=(4, 4), textcoords="offset points", color=_INK,
        )  # fmt: skip
    joined = sorted(((m.bytes or 0) / 1e6, 100 * (m.loss or 0.0)) for m in whole if m.name in kept)
    axis.plot([x for x, _ in joined], [y for _, y in joined], color=_BLUE, linewidth=1, alpha=0.5)
    axis.margins(x=0.18)
    axis.set_xlabel("weights, MB (front in blue, chosen in amber; area: tokens/s against bf16)")
    axis.set_ylabel("loss of perplexity, %")
    axis.set_title("Quantized candidates, served", loc="left", fontsize=11, fontweight="bold")
    write_figure(figure, file)
