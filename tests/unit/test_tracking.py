"""Tracking: what a workdir says, one MLflow run a job, and jobs that never hear of a server's troubles."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from contracts.config import parse_config
from contracts.dataset import Manifest, OutputFile
from contracts.errors import ConfigError, GateError, StateError
from contracts.gates import GateReport
from distill_jobs import publish
from distill_jobs.config import DistillConfig
from distill_jobs.tracking.environment import environment
from distill_jobs.tracking.state import Curve, Sent, read_sent, tracking_run, write_sent
from distill_jobs.tracking.sync import sync, sync_workdir
from distill_jobs.tracking.tracker import tracked
from distill_jobs.tracking.workdir import figures_of, flat, manifests_of, new_points, samples_of
from registry.mlflow_store import MlflowRegistry
from tests.integration.pipeline_world import config_of


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    """A job's configuration, tracked, its workdir made."""
    data = config_of(tmp_path, tracking={"every_s": 0.02, "flush_s": 5})
    made = parse_config(data, DistillConfig)
    made.workdir.mkdir()
    (made.workdir / "config.json").write_text(made.model_dump_json())
    return made


def finish(
    config: DistillConfig, stage: str, outputs: dict[str, Path] | None = None, **fields: Any
) -> Manifest:
    """Write a finished stage's manifest."""
    folder = config.workdir / f"{stage}-0123456789ab"
    folder.mkdir(exist_ok=True)
    files = {n: OutputFile(path=str(p), digest="d" * 64, bytes=1, rows=5) for n, p in (outputs or {}).items()}
    manifest = Manifest(stage=stage, key=f"key-{stage}", outputs=files, **fields)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def progress(config: DistillConfig, steps: list[int], tail: str = "") -> Path:
    """Append steps to the trainer's progress file."""
    file = config.workdir / "train-0123456789ab" / "student.run" / "run-1" / "progress.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write("".join(json.dumps({"step": s, "steps": 9, "kd": 1 / s}) + "\n" for s in steps) + tail)
    return file


def test_a_configuration_becomes_flat_parameters() -> None:
    """Dotted names; lists of sections by their number, plain lists whole; long text is cut."""
    assert flat({"a": {"b": 1, "c": None}, "l": [1, 2], "e": {}, "s": "x"}) == {
        "a.b": "1",
        "a.c": "null",
        "l": "[1, 2]",
        "e": "{}",
        "s": "x",
    }
    assert flat({"gates": [{"metric": "m"}]}) == {"gates.0.metric": "m"}
    assert len(flat({"t": "x" * 10_000})["t"]) == 6000


def test_a_curve_is_read_once_whatever_the_trainer_repeats(config: DistillConfig) -> None:
    """A torn last line waits; steps that a resumed trainer repeats are left out; a figure that is no number
    does not stop the rest.
    """
    file = progress(config, [1, 2, 3], tail='{"step": 4, "kd"')
    points, place = new_points(file, Curve())
    assert points == [(1, {"kd": 1.0}), (2, {"kd": 0.5}), (3, {"kd": 1 / 3})]
    assert new_points(file, place) == ([], place)
    with file.open("a") as out:
        out.write(': 0.25, "lr": NaN, "note": "x"}\n')
    progress(config, [3, 4, 5])
    points, place = new_points(file, place)
    assert points == [(4, {"kd": 0.25}), (5, {"kd": 0.2})]
    assert place.step == 5


def test_a_stages_figures_are_counts_metrics_and_time() -> None:
    """Evaluation's metrics keep their names; what was not measured, or is no number, is no metric."""
    collected = Manifest(
        stage="collect", key="k", counts={"train": 9}, metrics={"log_from": 1.0}, seconds=2.0
    )
    assert figures_of(collected) == {
        "collect.seconds": 2.0,
        "collect.rows.train": 9.0,
        "collect.log_from": 1.0,
    }
    metrics = {"quantized.accuracy": 0.9, "none": None, "nan": float("nan")}
    evaluated = Manifest(stage="evaluate", key="k", metrics=metrics)
    assert figures_of(evaluated) == {"evaluate.seconds": 0.0, "quantized.accuracy": 0.9}


def test_manifests_are_read_in_the_pipelines_order_and_others_passed_by(config: DistillConfig) -> None:
    """A folder that is no stage's, or a torn file, stops nothing."""
    finish(config, "train")
    finish(config, "collect")
    (config.workdir / "x-1").mkdir()
    (config.workdir / "x-1" / "manifest.json").write_text("{")
    assert list(manifests_of(config.workdir)) == ["collect", "train"]


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    """The last message, the reference, every model's answer and whether it was right; the first ones only."""
    rows = [
        {
            "request": {"messages": [{"role": "user", "content": f"q{n}"}]},
            "reference": "a",
            "models": {"teacher": {"text": "a", "right": True}, "quantized": {"text": "b", "right": False}},
        }
        for n in range(3)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = OutputFile(path=str(file), digest="d", bytes=1)
    table = samples_of(Manifest(stage="evaluate", key="k", outputs={"requests": out}), 2)
    assert table["columns"] == [
        "request",
        "reference",
        "teacher",
        "quantized",
        "teacher is right",
        "quantized is right",
    ]
    assert table["data"] == [["q0", "a", "a", "b", True, False], ["q1", "a", "a", "b", True, False]]
    assert samples_of(Manifest(stage="evaluate", key="k"), 2)["columns"] == []


def test_the_environment_names_versions_and_hardware() -> None:
    """What a figure may depend on."""
    found = environment()
    assert found["packages"]["torch"][0].isdigit()
    assert found["cpus"] >= 1
    assert found["memory_gb"] > 0
    assert found["git_revision"]


def test_cursors_survive_and_torn_ones_begin_again(tmp_path: Path) -> None:
    """A job's id is made once; what cannot be read is made anew rather than failing the job."""
    first = read_sent(tmp_path)
    assert read_sent(tmp_path).job == first.job
    assert tracking_run(tmp_path) is None
    write_sent(tmp_path, Sent(run_id="r1"))
    assert tracking_run(tmp_path) == "r1"
    (tmp_path / "tracking" / "state.json").write_text("{")
    assert read_sent(tmp_path).run_id is None


def test_the_published_record_names_its_tracking_run(config: DistillConfig) -> None:
    """From a version one gets to its curves; an untracked job's record says so."""
    out = OutputFile(path="x", digest="d", bytes=1)
    manifests = {
        "collect": Manifest(
            stage="collect", key="c", notes={"segments": "{}"}, metrics={"log_from": 1.0, "log_to": 2.0}
        ),
        "quantize": Manifest(stage="quantize", key="q", outputs={"artifact": out}, notes={"format": "f"}),
        "evaluate": Manifest(
            stage="evaluate",
            key="e",
            metrics={"quantized.params": 1.0},
            counts={"samples": 1},
            notes={"dataset_digest": "d", "engine": "e"},
        ),
    }
    assert publish.make_record(config, "t", manifests, GateReport()).lineage.tracking_run is None
    write_sent(config.workdir, Sent(run_id="r1"))
    assert publish.make_record(config, "t", manifests, GateReport()).lineage.tracking_run == "r1"


def test_a_server_that_fails_is_told_once_and_costs_the_job_nothing(config: DistillConfig) -> None:
    """The job ends as it would have; what is missing, and how to send it, is said."""
    said: list[str] = []
    tries: list[str] = []

    def broken(config: DistillConfig, status: str) -> str:
        tries.append(status)
        raise StateError("MLflow refused: it is down\nand out")

    with tracked(config, said.append, broken):
        deadline = time.monotonic() + 30
        while len(tries) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert tries[:2] == ["RUNNING", "RUNNING"]
    assert tries[-1] == "FINISHED"
    assert said[0].startswith("tracking: StateError: MLflow refused: it is down (the job goes on")
    assert said[1] == (
        "tracking: MLflow does not have all of this job yet; send the rest with"
        f" `stillhouse models track {config.workdir}`."
    )
    assert len(said) == 2


def test_a_server_that_hangs_is_waited_for_no_longer_than_allowed(config: DistillConfig) -> None:
    """The thread is left behind; the job's own error is what comes out."""
    hang = threading.Event()
    impatient = config.model_copy(update={"tracking": config.tracking.model_copy(update={"flush_s": 0.05})})
    said: list[str] = []

    def hangs(config: DistillConfig, status: str) -> str:
        hang.wait(60)
        return "r"

    try:
        with pytest.raises(ValueError, match="the job's own"):
            job_that_fails(impatient, said, hangs)
        assert "does not have all of this job" in said[0]
    finally:
        hang.set()


def job_that_fails(config: DistillConfig, said: list[str], send: Any) -> None:
    """A tracked job that works for a while first."""
    with tracked(config, said.append, send):
        time.sleep(0.1)
        raise ValueError("the job's own")


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, "FINISHED"),
        (GateError("no"), "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
        (OSError(), "FAILED"),
    ],
)
def test_the_runs_status_says_how_the_job_ended(
    config: DistillConfig, raised: BaseException | None, status: str
) -> None:
    """A refused student is a job that did its work."""
    seen: list[str] = []

    def send(config: DistillConfig, status: str) -> str:
        seen.append(status)
        return "r"

    try:
        with tracked(config, print, send):
            time.sleep(0.05)
            if raised is not None:
                raise raised
    except (GateError, KeyboardInterrupt, OSError):
        pass
    assert seen[-1] == status


def test_switched_off_it_does_nothing(config: DistillConfig) -> None:
    """No thread, no import of MLflow."""
    off = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    with tracked(off, print, lambda *_: pytest.fail("sent")):
        time.sleep(0.05)


def test_a_folder_that_is_no_job_is_refused(tmp_path: Path) -> None:
    """`stillhouse models track` on a mistyped path."""
    with pytest.raises(ConfigError, match="no job's workdir"):
        sync_workdir(tmp_path)


@pytest.mark.integration
def test_one_mlflow_run_a_job_with_all_of_it(config: DistillConfig, tmp_path: Path) -> None:
    """Real MLflow on SQLite: a job is synced while it runs, killed between making its run and writing that
    down, resumed with another batch size, and finished. One run holds parameters, curves without repeats,
    figures, the dataset by its digest, answers side by side, and artifacts; sending again adds nothing.
    """
    progress(config, [1, 2])
    train = tmp_path / "train.parquet"
    train.write_text("rows")
    finish(config, "collect", {"train": train}, counts={"train": 5})
    run_id = sync(config)
    forgotten = read_sent(config.workdir).model_copy(update={"run_id": None})
    write_sent(config.workdir, forgotten)
    changed = config.model_copy(update={"cache_dir": Path("elsewhere")})
    (config.workdir / "config.json").write_text(changed.model_dump_json())
    progress(config, [2, 3])
    (config.workdir / "gates.json").write_text('{"results": []}')
    requests = tmp_path / "requests.jsonl"
    answers = {"teacher": {"text": "a", "right": True}, "quantized": {"text": "b", "right": False}}
    asked = {"messages": [{"role": "user", "content": "q"}]}
    requests.write_text(json.dumps({"request": asked, "reference": "a", "models": answers}) + "\n")
    notes = {"dataset_digest": "e" * 64}
    metrics = {"quantized.accuracy": 0.9}
    finish(config, "evaluate", {"requests": requests}, metrics=metrics, counts={"samples": 1}, notes=notes)
    finish(config, "publish", notes={"ref": "support-student:1"})
    assert sync(changed, "FINISHED") == run_id
    assert sync_workdir(config.workdir) == run_id

    registry = MlflowRegistry(config.publish.tracking_uri)
    with registry.client() as client:
        (run,) = client.search_runs([registry.experiment(client)])
        assert run.info.status == "FINISHED"
        assert run.data.params["train.epochs"] == "1.0"
        assert run.data.params["gates.0.metric"] == "quantized.perplexity"
        assert json.loads(run.data.tags["stillhouse.changed_on_resume"]) == {"cache_dir": "elsewhere"}
        assert run.data.tags["stillhouse.ref"] == "support-student:1"
        assert run.data.tags["version.torch"]
        assert run.data.metrics["quantized.accuracy"] == 0.9
        curve = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/kd")]
        assert curve == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        inputs = {i.dataset.name: (i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs}
        assert inputs == {
            "support-student-train": ("d" * 36, "training"),
            "evaluation-requests": ("e" * 36, "evaluation"),
        }
        names = {f.path for f in client.list_artifacts(run_id)}
        assert names == {"config.json", "environment.json", "gates.json", "samples.json"}
        table = json.loads(mlflow_text(run.info.artifact_uri, "samples.json"))
        assert table["data"] == [["q", "a", "a", "b", True, False]]
        # what MLflow's own log_table writes, so that its pages show a table
        assert run.data.tags["mlflow.loggedArtifacts"] == '[{"path": "samples.json", "type": "table"}]'


def mlflow_text(uri: str, name: str) -> str:
    """A text artifact of a run on this machine."""
    return (Path(uri.removeprefix("file://")) / name).read_text(encoding="utf-8")
