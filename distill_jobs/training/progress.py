"""The run's curve: one line of metrics a reported step in `progress.jsonl`, and whoever follows it.

Lines of training hold its metrics; lines of validation hold step, steps and `validation_*`, and come later
than those of training at the same step. Knows files; nothing of Ray or models.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from distill_jobs.ticking import every

PROGRESS = "progress.jsonl"


def append(path: Path, metrics: Mapping[str, float]) -> None:
    """Add a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(metrics) + "\n")


def append_validations(path: Path, results: list[dict[str, float]]) -> None:
    """Add the validations that the file does not hold yet."""
    known = set()
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if '"validation_loss"' in line:
                known.add(json.loads(line)["step"])
    for result in results:
        if result["step"] not in known:
            append(path, result)


@contextlib.contextmanager
def following(path: Path, on_progress: Callable[[dict[str, float]], None] | None) -> Iterator[None]:
    """Hand every new line of the progress file to the callback while the run lasts."""
    if on_progress is None:
        yield
        return
    position = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        nonlocal position
        if not path.exists():
            return
        with path.open(encoding="utf-8") as lines:
            lines.seek(position)
            whole = lines.read()
        whole = whole[: whole.rfind("\n") + 1]
        position += len(whole.encode())
        for line in whole.splitlines():
            on_progress(json.loads(line))

    with every(0.5, follow, "training-progress"):
        yield
