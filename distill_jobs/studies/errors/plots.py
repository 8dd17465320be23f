"""Error analysis in two pictures: who is taken for whom, and how much each slice loses. PNG files.

Takes an analysis; knows nothing of files it came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.font_manager import findfont, get_font
from scipy.stats import beta

from distill_jobs.studies.errors.slices import Slice
from distill_jobs.studies.plots import new_figure, write_figure

OTHER, NOTHING = "(other)", "(none)"
_MOST_CLASSES = 24
_BLUE, _RED = "#2563eb", "#dc2626"


def confusion(
    actual: Sequence[str | None], predicted: Sequence[str | None]
) -> tuple[list[str], list[str], np.ndarray]:
    """Actual names, predicted names and counts [actual, predicted], over requests with an actual class.

    The most common classes by name, the rest together; an answer without a class is a column of its own.
    """
    pairs = [(a, p) for a, p in zip(actual, predicted, strict=True) if a is not None]
    common = {name for name, _ in Counter(a for a, _ in pairs).most_common(_MOST_CLASSES)}
    rows = sorted(common) + ([OTHER] if any(a not in common for a, _ in pairs) else [])
    named = [(_name(a, common), _name(p, common)) for a, p in pairs]
    columns = rows + [
        extra for extra in (OTHER, NOTHING) if extra not in rows and any(p == extra for _, p in named)
    ]
    counts = np.zeros((len(rows), len(columns)), dtype=int)
    for a, p in named:
        counts[rows.index(a), columns.index(p)] += 1
    return rows, columns, counts


def _name(value: str | None, common: set[str]) -> str:
    if value is None:
        return NOTHING
    return value if value in common else OTHER


def write_confusion(rows: list[str], columns: list[str], counts: np.ndarray, title: str, file: Path) -> None:
    """Shares of each actual class as colour, counts as numbers; the diagonal is what is right."""
    size = max(4.0, 0.34 * len(columns) + 2.4)
    figure, axis = new_figure(size + 0.6, max(3.4, 0.3 * len(rows) + 2.2))
    axis.grid(visible=False)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in zip(*np.nonzero(counts), strict=True):
        right = rows[i] == columns[j]
        colour = "white" if share[i, j] > 0.55 else "#0f172a" if right else _RED
        axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(columns)), [_short(c) for c in columns], rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), [_short(r) for r in rows], fontsize=7)
    axis.set_xlabel("class of its answer")
    axis.set_ylabel("class of the reference")
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    write_figure(figure, file)


def write_slices(slices: list[Slice], overall: float, file: Path) -> None:
    """Share lost in each slice with Clopper and Pearson's 95 % interval, against the share lost overall."""
    figure, axis = new_figure(7.6, 0.34 * len(slices) + 1.6)
    places = np.arange(len(slices))[::-1]
    shares = np.array([s.share for s in slices])
    low = beta.ppf(0.025, [s.lost for s in slices], [s.requests - s.lost + 1 for s in slices])
    high = beta.ppf(0.975, [s.lost + 1 for s in slices], [max(1e-9, s.requests - s.lost) for s in slices])
    axis.errorbar(
        shares, places, xerr=[shares - low, high - shares], fmt="o", color=_RED, capsize=3, markersize=4
    )
    axis.axvline(overall, color=_BLUE, linestyle="--", linewidth=1, label=f"all requests {overall:.1%}")
    axis.set_yticks(
        places,
        [f"{i}. {_short(s.name, 48)}  ({s.lost}/{s.requests})" for i, s in enumerate(slices, start=1)],
        fontsize=7,
    )
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.6, len(slices) - 0.4)
    axis.set_xlabel("share of the slice's requests that is lost")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    write_figure(figure, file)


def _short(text: str, most: int = 26) -> str:
    """A label that fits and can be drawn: what the font has no sign for (it has no CJK) is spelt as a code,
    and dollar signs are no formulas.
    """
    font = get_font(findfont("DejaVu Sans"))
    plain = "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):X} " for c in text).strip()
    return (plain if len(plain) <= most else plain[: most - 1] + "…").replace("$", r"\$")
