"""What a route's latest run is doing, as the flywheel tells Prometheus: from its files, whole or torn."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from distill_jobs.flywheel.admit import State
from distill_jobs.flywheel.store import Run, Store
from distill_jobs.flywheel.work_metrics import STAGES, WorkMetrics
from distill_jobs.progress import Progress
from distill_jobs.stage import Job, Result
from distill_jobs.training.progress import append


class World:
    """A store with one run and the gauges that read it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.store.know_routes(["support"], 1.0)
        self.registry = CollectorRegistry()
        self.gauges = WorkMetrics(self.registry)
        self.folder = folder

    def queue(self) -> Run:
        """A run that is waiting."""
        run = self.store.queue("support", "rows", "enough", self.folder, "20261126", "/", time.time())
        Path(run.workdir).mkdir(parents=True, exist_ok=True)
        return run

    def value(self, name: str, **labels: str) -> float | None:
        """A gauge after a look at the files."""
        self.gauges.write(self.store)
        return self.registry.get_sample_value(f"stillhouse_flywheel_{name}", {"route": "support", **labels})

    def at(self) -> list[str]:
        """The stages that say 1."""
        return [stage for stage in STAGES if self.value("stage", stage=stage) == 1.0]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A route that never had a run."""
    return World(tmp_path)


def test_the_stage_is_that_of_the_active_run(world: World) -> None:
    """None before a run and after its end; one at a time between; finished stages keep how long they took."""
    assert world.value("stage", stage="collect") is None
    run = world.queue()
    assert world.at() == []
    job = Job(Path(run.workdir), Progress(Path(run.workdir) / "progress.json"))
    done = job.stage("collect", {}, {}, lambda at: Result(outputs={}))
    job.progress.begin("teach")
    assert world.at() == ["teach"]
    assert world.value("stage_seconds", stage="collect") == done.seconds
    assert world.value("stage_seconds", stage="teach") is None
    world.store.move(run, State.CANCELLED, "no", time.time())
    assert world.at() == []


def test_losses_are_the_curves_last_finite_ones(world: World) -> None:
    """Training and validation lines alternate and each leaves the other's figures; NaN, a torn line and one
    that is no object change nothing."""
    run = world.queue()
    curve = Path(run.workdir) / "train-abc" / "student.run" / "0" / "progress.jsonl"
    for step in range(1, 400):
        append(curve, {"step": step, "steps": 400, "kd": 4.0 / step, "ce": 2.0})
    append(curve, {"step": 399, "steps": 400, "validation_loss": 1.5})
    with curve.open("a") as out:
        out.write('{"step": 400, "steps": 400, "kd": NaN}\n[1]\n{"step": 401, "kd": 9')
    assert world.value("loss", of="kd") == 4.0 / 399
    assert world.value("loss", of="validation_loss") == 1.5
    assert (world.value("train_step"), world.value("train_steps")) == (400.0, 400.0)


def test_somebody_elses_files_are_no_stage(world: World) -> None:
    """A route's own command may write what it likes: it has no stage and no loss, and the daemon lives."""
    workdir = Path(world.queue().workdir)
    (workdir / "progress.json").write_text("[1, 2]")
    (workdir / "collect-x").mkdir()
    (workdir / "collect-x" / "manifest.json").write_text(json.dumps({"seconds": "long"}))
    assert world.at() == []
    assert world.value("stage_seconds", stage="collect") is None
    assert world.value("loss", of="kd") is None
