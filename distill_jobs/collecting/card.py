"""CARD.md: what a dataset is, for the person who has to decide whether to train on it.

Knows nothing about how it was made beyond what the manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contracts.config import write_atomic
from contracts.dataset import OutputFile
from distill_jobs.collecting.window import Segment
from distill_jobs.config import CollectConfig

_BAR = 40
_SHOWN = 30
_READ = (
    "segments",
    "torn_tail",
    "judgements",
    "feedback_malformed",
    "read",
    "malformed",
    "corrected",
    "redacted",
)
_KEPT = ("kept", "samples", "train", "calibration", "validation", "pruned", "balance_repeated")

_MEANING = {
    "not_chat": "not a chat completion",
    "other_route": "another route",
    "outside_window": "before `since` or after `until`",
    "texts_not_logged": "logged without texts",
    "not_text": "images, audio or no messages",
    "too_long": "longer than `max_chars`",
    "other_upstream": "answered by somebody else than the teacher",
    "bad_feedback": "a user called the answer bad",
    "not_ok": "the request failed",
    "not_finished": "the answer was cut off",
    "failed_grade": "an online grader scored it 0",
    "no_text": "no answer",
    "not_json": "the answer is not JSON",
    "schema": "the answer breaks `rules.answer_schema`",
    "refusal": "the answer is a refusal",
    "exact_duplicate": "the same conversation again",
    "held_out": "resembles a held-out request",
    "low_score": "not in the best share by `rank.score`",
    "near_duplicate": "resembles a sample that was kept",
    "over_max_rows": "beyond `max_rows`",
    "balance_dropped": "its class was too frequent",
}


def write_card(
    path: Path,
    config: CollectConfig,
    window: list[Segment],
    counts: Mapping[str, int],
    notes: Mapping[str, str],
    summary: Mapping[str, Any],
    outputs: Mapping[str, OutputFile],
) -> None:
    """Write the card."""
    sections = [
        _head(counts, summary),
        _outputs(outputs),
        _counts(counts),
        _classes(notes, summary),
        _lengths(summary),
        _prompts(config, notes),
        _examples(summary),
        _sources(config, window, summary),
        _rebuild(config, notes),
    ]
    write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")


def _head(counts: Mapping[str, int], summary: Mapping[str, Any]) -> str:
    when = "files without times"
    if summary["times"]:
        first, last = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in summary["times"])
        when = f"requests of {first} to {last} UTC"
    routes = ", ".join(f"`{name}`" for name in sorted(summary["by"].get("route", {})) if name) or "none named"
    return (
        f"# Dataset card\n\n{counts['samples']:,} samples of {counts.get('read', 0):,} rows read: {when};"
        f" routes: {routes}. Answers are the logged teacher's, a person's correction where there was one, and"
        " empty where the teacher is still to answer."
    )


def _outputs(outputs: Mapping[str, OutputFile]) -> str:
    rows = [(name, f"{o.rows:,}", f"{o.bytes:,}", f"`{o.digest[:16]}…`") for name, o in outputs.items()]
    return "## Parts\n\n" + _table(("side", "samples", "bytes", "sha256"), rows)


def _counts(counts: Mapping[str, int]) -> str:
    dropped = sorted((n for n in counts if n not in _READ + _KEPT and n != "near_unchecked_pairs"), key=str)
    rows = [("read", f"{counts.get('read', 0):,}", "")]
    rows += [(n, f"{counts[n]:,}", "a line that is no row") for n in ("malformed",) if counts.get(n)]
    rows += [(f"− {n}", f"{counts[n]:,}", _MEANING.get(n, f"`rules.{n}`")) for n in dropped if counts[n]]
    rows += [(f"= {n}" if n == "samples" else n, f"{counts.get(n, 0):,}", "") for n in _KEPT[1:5]]
    text = "## Counts\n\n" + _table(("rule", "rows", "what it means"), rows)
    changed = [
        (n, counts[n]) for n in ("corrected", "redacted", "pruned", "balance_repeated") if counts.get(n)
    ]
    if changed:
        text += "\n\nChanged: " + ", ".join(f"{name} {number:,}" for name, number in changed) + "."
    if counts.get("near_unchecked_pairs"):
        text += f"\n\n{counts['near_unchecked_pairs']:,} pairs in very large buckets were not compared."
    return text


def _classes(notes: Mapping[str, str], summary: Mapping[str, Any]) -> str:
    if "classes_before" not in notes:
        return ""
    by = summary["by"]
    before, after, weights = (
        json.loads(notes["classes_before"]),
        by.get("class", {}),
        by.get("class_weight", {}),
    )
    names = sorted(set(before) | set(after), key=lambda n: (-before.get(n, 0), n))
    rows = [
        (f"`{n}`", f"{before.get(n, 0):,}", _share(before, n), f"{after.get(n, 0):,}", _share(weights, n))
        for n in names[:_SHOWN]
    ]
    more = f"\n\n… and {len(names) - _SHOWN} more." if len(names) > _SHOWN else ""
    heads = ("class", "before balance", "share", "written", "weighted share")
    return "## Classes of the training samples\n\n" + _table(heads, rows) + more


def _share(counts: Mapping[str, int], name: str) -> str:
    return f"{counts.get(name, 0) / max(1, sum(counts.values())):.1%}"


def _lengths(summary: Mapping[str, Any]) -> str:
    parts = ["## Lengths"]
    for name, title in (("request_chars", "Request"), ("answer_chars", "Answer")):
        found = {int(k): v for k, v in summary["by"].get(name, {}).items()}
        if found:
            most = max(found.values())
            lines = [
                f"≤ {k:>6}  {'█' * max(1, round(_BAR * v / most))} {v:,}" for k, v in sorted(found.items())
            ]
            parts.append(f"{title}, characters:\n\n```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _prompts(config: CollectConfig, notes: Mapping[str, str]) -> str:
    parts = []
    constant = json.loads(notes.get("constant_prompts", "{}"))
    for route, texts in constant.items():
        where = f"on route `{route}`" if route else "of rows without a route"
        for of, text in texts.items():
            parts.append(f"Taken out of the students' {of} message {where}:\n\n{_quoted(text)}")
    if "difficulty" in notes:
        hard = json.loads(notes["difficulty"])
        edges = ", ".join(f"{e:.3g}" for e in hard["edges"])
        parts.append(f"Difficulty is measured by {hard['measure']}; bins end at {edges}.")
    return "## Prompts and difficulty\n\n" + "\n\n".join(parts) if parts else ""


def _examples(summary: Mapping[str, Any]) -> str:
    parts = ["## Examples\n\nThe first training samples by digest, shortened."]
    for example in summary["examples"]:
        answer = example["answer"] if example["answer"] is not None else "(the teacher is to answer)"
        parts.append(f"`{example['sample_digest'][:16]}` from `{example['source']}`")
        parts.append(f"{_quoted(example['messages'])}\n\n→\n\n{_quoted(answer)}")
    return "\n\n".join(parts) if summary["examples"] else ""


def _sources(config: CollectConfig, window: list[Segment], summary: Mapping[str, Any]) -> str:
    licence = {"log": config.licence} | {s.name: s.licence for s in config.sources}
    used = summary["by"].get("source", {})
    names = sorted({s.source for s in window} | set(used))
    rows = []
    for name in names:
        files = [s for s in window if s.source == name]
        size = sum(s.bytes for s in files)
        rows.append((name, f"{used.get(name, 0):,}", len(files), f"{size:,}", licence.get(name, "unknown")))
    text = "## Sources\n\n" + _table(("source", "samples", "files", "bytes", "licence"), rows)
    listed = [(s.name, s.kind, f"{s.bytes:,}", f"`{s.digest[:16]}…`") for s in window[:_SHOWN]]
    more = f"\n\n… and {len(window) - _SHOWN} more, all in the manifest." if len(window) > _SHOWN else ""
    return text + "\n\n" + _table(("file", "kind", "bytes", "sha256"), listed) + more


def _rebuild(config: CollectConfig, notes: Mapping[str, str]) -> str:
    given = json.dumps(config.model_dump(mode="json", exclude_defaults=True), indent=2, ensure_ascii=False)
    return (
        "## How to rebuild it\n\nRun `stillhouse distill CONFIG --stage collect` with this `collect` section"
        " in a workdir whose `window.json` names the files above; the same bytes give the same digests"
        f" (seed {notes['seed']}).\n\n```json\n{given}\n```"
    )


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _quoted(text: str) -> str:
    fence = "```" if "```" not in text else "`````"
    return f"{fence}\n{text}\n{fence}"
