"""An error analysis as Markdown, pictures and JSON. Knows nothing of how it was made."""

from __future__ import annotations

import json
import re
from pathlib import Path

from contracts.config import write_atomic
from distill_jobs.studies.errors import plots
from distill_jobs.studies.errors.analysis import Analysis
from distill_jobs.studies.errors.features import last_user_text
from distill_jobs.studies.errors.slices import Slice

_SHOWN_CHARS = 600


def write_report(analysis: Analysis, folder: Path) -> Path:
    """Write report.md, report.json and the pictures into a folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"# Where the {analysis.model} loses to the {analysis.against}", "", *_counts(analysis), ""]
    text += ["## Slices", "", *_slices(analysis, folder), ""]
    if any(c is not None for c in analysis.answers.classes):
        text += ["## Confusion", "", *_confusion(analysis, folder), ""]
    text += ["## Data to collect", "", *_suggested(analysis), ""]
    text += ["## Worst examples", "", *_examples(analysis)]
    write_atomic(folder / "report.json", json.dumps(_facts(analysis), indent=1, ensure_ascii=False) + "\n")
    write_atomic(folder / "report.md", "\n".join(text) + "\n")
    return folder / "report.md"


def headline(analysis: Analysis) -> str:
    """The comparison in one sentence."""
    total, lost, gained = len(analysis.lost), int(analysis.lost.sum()), int(analysis.gained.sum())
    sure = "no chance" if analysis.p < 0.05 else "may be chance"
    return (
        f"Of {total:,} graded requests the {analysis.model} loses {lost:,} ({lost / total:.1%}) that the"
        f" {analysis.against} gets right, and gains {gained:,} that it gets wrong (McNemar p ="
        f" {analysis.p:.2g}: {sure})."
    )


def _counts(analysis: Analysis) -> list[str]:
    both = int((analysis.answers.right[analysis.model] & analysis.answers.right[analysis.against]).sum())
    lost, gained = int(analysis.lost.sum()), int(analysis.gained.sum())
    neither = len(analysis.lost) - both - lost - gained
    return [
        headline(analysis),
        "",
        f"| | {analysis.model} right | {analysis.model} wrong |",
        "|---|---:|---:|",
        f"| {analysis.against} right | {both} | **{lost}** |",
        f"| {analysis.against} wrong | {gained} | {neither} |",
    ]


def _slices(analysis: Analysis, folder: Path) -> list[str]:
    found = analysis.found
    looked = f"{found.tested:,} slices of one or two predicates were looked at"
    if not found.slices:
        return [f"{looked}; none loses surely more than the rest (q ≤ 0.05 after Benjamini and Hochberg)."]
    plots.write_slices(found.slices, float(analysis.lost.mean()), folder / "slices.png")
    lines = [
        f"{looked}; these lose more than the rest (Fisher's exact test, q after Benjamini and Hochberg).",
        "",
        "![Share lost by slice](slices.png)",
        "",
        "| | slice | requests | lost | share | elsewhere | q |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    return lines + [
        f"| {i} | {_cell(s.name)} | {s.requests} | {s.lost} | {s.share:.0%} | {s.elsewhere:.1%} | {s.q:.2g} |"
        for i, s in enumerate(found.slices, start=1)
    ]


def _confusion(analysis: Analysis, folder: Path) -> list[str]:
    predicted = analysis.answers.predicted[analysis.model]
    rows, columns, counts = plots.confusion(analysis.answers.classes, predicted)
    title = f"the {analysis.model}'s classes"
    plots.write_confusion(rows, columns, counts, title, folder / "confusion.png")
    wrong = [
        (int(counts[i, j]), r, c)
        for i, r in enumerate(rows)
        for j, c in enumerate(columns)
        if r != c and counts[i, j]
    ]
    lines = ["![Confusion matrix](confusion.png)", ""]
    if not wrong:
        return [*lines, "Every answer has the reference's class."]
    lines += ["| reference | taken for | times |", "|---|---|---:|"]
    return lines + [f"| {_cell(r)} | {_cell(c)} | {n} |" for n, r, c in sorted(wrong, reverse=True)[:10]]


def _suggested(analysis: Analysis) -> list[str]:
    if not analysis.suggestions:
        return ["No slice stands out: more data of every kind, if any. `stillhouse study` says whether."]
    lines = [
        "So many more rows would bring each slice's losses down to the others', if they fall with its rows as"
        f" they usually do (the student learned from {analysis.training_rows:,} rows in all). Slices overlap:"
        " do not add the counts.",
        "",
        "| slice | rows it learned from | collect more | because |",
        "|---|---:|---:|---|",
    ]
    return lines + [
        f"| {_cell(s.slice.name)} | {s.have:,} | {s.more:,} | {s.why} |" for s in analysis.suggestions
    ]


def _examples(analysis: Analysis) -> list[str]:
    """Side by side: what was asked, what the reference is, what both answered."""
    if not analysis.worst:
        return ["None was lost."]
    answers, lines = analysis.answers, []
    for number, i in enumerate(analysis.worst, start=1):
        kind = f", class {_cell(answers.classes[i] or '')}" if answers.classes[i] else ""
        lines += [f"### {number}. Sure by {answers.confidence[i]:.0%}{kind}", ""]
        parts = [("Asked", last_user_text(answers.requests[i]))]
        if answers.references[i] != answers.texts[analysis.against][i]:
            parts.append(("Reference", answers.references[i] or ""))
        parts += [(name.capitalize(), answers.texts[name][i]) for name in (analysis.against, analysis.model)]
        for title, text in parts:
            lines += [f"{title}:", "", *_block(text), ""]
    return lines


def _block(text: str) -> list[str]:
    """A fenced block that no text can end."""
    shown = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + f"… ({len(text):,} characters)"
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + "text", shown or "(empty)", fence]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _facts(analysis: Analysis) -> dict[str, object]:
    return {
        "model": analysis.model,
        "against": analysis.against,
        "requests": len(analysis.lost),
        "lost": int(analysis.lost.sum()),
        "gained": int(analysis.gained.sum()),
        "mcnemar_p": analysis.p,
        "tested": analysis.found.tested,
        "slices": [_slice(s) for s in analysis.found.slices],
        "collect": [{"slice": s.slice.name, "have": s.have, "more": s.more} for s in analysis.suggestions],
    }


def _slice(one: Slice) -> dict[str, object]:
    return {
        "predicates": [list(p) for p in one.predicates],
        "requests": one.requests,
        "lost": one.lost,
        "elsewhere": one.elsewhere,
        "p": one.p,
        "q": one.q,
    }
