"""What each route's latest run is doing, read from its workdir: stage, finished stages, losses.

A run keeps these files anyway (progress.json, manifests, the training's curve), so they are right whoever
started or killed it. Knows the pipeline's files; nothing about processes or budgets.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from distill_jobs.flywheel.store import Run, Store
from distill_jobs.stage import ORDER

STAGES = (ORDER[0], "augment", *ORDER[1:])
_LOOK_BACK = 200
"""Runs among which a route's latest is looked for."""
_TAIL_BYTES = 8192
"""Of a curve: some dozens of lines, however long the training."""
LOSSES = ("kd", "ce", "validation_loss", "validation_kd", "validation_ce")
"""Figures of the curve that are exported: divergence and cross entropy, and the same of held-out rows."""


class WorkMetrics:
    """Gauges of the latest run of every route; a route without a run has no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"stillhouse_flywheel_{name}", text, ["route", *labels], registry=registry)

        self._stage = gauge(
            "stage", "1 for the stage that the route's active run is in, 0 for the others.", "stage"
        )
        self._seconds = gauge(
            "stage_seconds", "How long a finished stage of the route's latest run took.", "stage"
        )
        self._loss = gauge(
            "loss", "Latest losses of the route's latest run (of: kd, ce, validation_loss, …).", "of"
        )
        self._step = gauge("train_step", "Step of the latest run's training.")
        self._steps = gauge("train_steps", "Steps that the latest run's training will have.")

    def write(self, store: Store) -> None:
        """Bring every gauge up to date."""
        latest: dict[str, Run] = {}
        for run in store.latest(_LOOK_BACK):
            latest.setdefault(run.route, run)
        for run in latest.values():
            self._write(run)

    def _write(self, run: Run) -> None:
        workdir = Path(run.workdir)
        now = _stage(workdir) if run.state.active else ""
        for stage in STAGES:
            self._stage.labels(run.route, stage).set(stage == now)
            seconds = _seconds(workdir, stage)
            if seconds is not None:
                self._seconds.labels(run.route, stage).set(seconds)
        point = _last_point(workdir)
        for name in LOSSES:
            if name in point:
                self._loss.labels(run.route, name).set(point[name])
        if "step" in point:
            self._step.labels(run.route).set(point["step"])
            self._steps.labels(run.route).set(point.get("steps", point["step"]))


def _stage(workdir: Path) -> str:
    """The stage that progress.json names; empty before there is one."""
    try:
        return str(json.loads((workdir / "progress.json").read_text(encoding="utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError):  # not begun, or not this pipeline
        return ""


def _seconds(workdir: Path, stage: str) -> float | None:
    """How long a finished stage took, from its manifest; None when it is not finished."""
    for file in workdir.glob(f"{stage}-*/manifest.json"):
        try:
            return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):  # somebody else's file
            continue
    return None


def _last_point(workdir: Path) -> dict[str, float]:
    """The last finite value of each figure of the training's curve; empty before the training."""
    files = sorted(workdir.glob("train-*/*.run/*/progress.jsonl"), key=lambda f: f.stat().st_mtime)
    found: dict[str, float] = {}
    for line in _tail(files[-1]) if files else ():
        try:
            figures = json.loads(line)
        except ValueError:  # the first line of the tail, or one that a kill tore
            continue
        if isinstance(figures, dict):
            numbers = {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
            found |= {k: v for k, v in numbers.items() if math.isfinite(v)}
    return found


def _tail(file: Path) -> list[str]:
    with file.open("rb") as source:
        source.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        return source.read().decode("utf-8", "replace").splitlines()
