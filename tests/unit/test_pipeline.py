"""The pipeline's mechanics: order, skipping, going on, the lock, the gate (quantize and evaluate faked)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from contracts.config import parse_config
from contracts.errors import ConfigError, ConflictError, DataError, GateError
from distill_jobs import pipeline
from distill_jobs.config import DistillConfig
from distill_jobs.keys import key_config, output_file
from distill_jobs.pipeline import plan, run_pipeline
from distill_jobs.progress import Event, Progress
from distill_jobs.stage import ORDER, Job, Result, locked
from registry.fake import FakeRegistry
from tests.integration.pipeline_world import config_of, write_logs, write_model
from tests.unit.fake_openai import FakeOpenAI, serving

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Trained:
    """What a trainer hands back."""

    checkpoint_dir: Path
    metrics: dict[str, float] = field(default_factory=lambda: {"step": 1.0})


@dataclass
class World:
    """A job over small files, with the heavy stages replaced and their calls counted."""

    root: Path
    calls: list[str] = field(default_factory=list)
    accuracy: float = 0.99
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    subjects: list[Any] = field(default_factory=list)

    def config(self, **changes: Any) -> DistillConfig:
        """The job's configuration."""
        gates = [{"metric": "quantized.accuracy", "relative_to": "teacher.accuracy", "at_least": 0.98}]
        data = config_of(self.root, gates=gates)
        data["collect"]["executor"] = "local"
        data["evaluate"] |= {"dataset_args": {"size": 4}}
        for dotted, value in changes.items():
            section, _, name = dotted.partition("__")
            data[section] = data[section] | {name: value} if name else value
        return parse_config(data, DistillConfig)

    def train(self, config: Any, data: Path, base: str, out: Path, on_progress: Any) -> Trained:
        """A trainer that trains nothing."""
        self.calls.append("train")
        shutil.copytree(base, out, dirs_exist_ok=True)
        on_progress({"step": 1.0, "steps": 1.0})
        return Trained(out)

    def quantize(self, config: Any, student: Path, splits: Any, folder: Path, progress: Progress) -> Result:
        """A quantizer that copies."""
        self.calls.append("quantize")
        shutil.copytree(student, folder / "artifact", dirs_exist_ok=True)
        return Result({"artifact": output_file(folder / "artifact")}, notes={"format": "copied"})

    def evaluate(self, config: Any, subjects: Any, folder: Path, progress: Progress) -> Result:
        """An evaluation that knows the answer."""
        self.calls.append("evaluate")
        self.subjects.append(subjects)
        (folder / "report.json").write_text("{}")
        metrics = {"quantized.accuracy": self.accuracy, "teacher.accuracy": 1.0, "quantized.params": 5.0}
        if "champion" in subjects.models:
            metrics["champion.accuracy"] = 0.99
        notes = {"engine": "none", "dataset_digest": "d"}
        return Result({"report": output_file(folder / "report.json")}, {"samples": 4}, metrics, notes)

    def run(self, config: DistillConfig | None = None, **more: Any) -> pipeline.PipelineResult:
        """Run the pipeline quietly."""
        return run_pipeline(
            config or self.config(), registry=self.registry, trainer=self.train, say=lambda text: None, **more
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Sixty logged requests and two tiny checkpoints."""
    write_logs(tmp_path / "logs", 60, per_segment=30)
    write_model(tmp_path / "teacher", hidden=64, layers=1, seed=0)
    write_model(tmp_path / "student", hidden=32, layers=1, seed=1)
    made = World(tmp_path)
    monkeypatch.setattr(pipeline.quantize, "run", made.quantize)
    monkeypatch.setattr(pipeline.evaluate, "run", made.evaluate)
    return made


def test_a_job_goes_from_logs_to_a_version(world: World) -> None:
    """All stages in order, their manifests linked by keys, the result published as challenger."""
    events: list[Event] = []
    result = world.run(listener=events.append)
    assert result.ref == "support-student:1"
    assert list(result.manifests) == list(ORDER)
    assert result.manifests["train"].parents == {"teach": result.manifests["teach"].key}
    assert world.registry.aliases("support-student") == {"challenger": 1}
    assert [e.stage for e in events if e.state == "done"] == list(ORDER)
    last = json.loads((world.root / "job" / "progress.json").read_text())
    assert (last["stage"], last["state"]) == ("publish", "done")


def test_finished_stages_are_skipped(world: World) -> None:
    """The same command again does no work and makes no second version."""
    first = world.run()
    events: list[Event] = []
    again = world.run(listener=events.append)
    assert world.calls == ["train", "quantize", "evaluate"]
    assert {e.state for e in events} == {"skipped"}
    assert again.manifests == first.manifests
    assert [r.version for r in world.registry.history("support-student")] == [1]


def test_a_failed_stage_is_the_only_one_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before a crash is kept; the job says that it failed."""

    def crash(*args: Any) -> Result:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.evaluate, "run", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            world.run()
    assert json.loads((world.root / "job" / "progress.json").read_text())["state"] == "failed"
    assert world.run().ref == "support-student:1"
    assert world.calls == ["train", "quantize", "evaluate"]


def test_the_next_student_is_held_against_the_champion(world: World) -> None:
    """The first student passes because the gate says so; the second is measured beside the first, by the
    champion's own artifact, and the one that is worse is stopped.
    """
    gates = [
        {
            "metric": "quantized.accuracy",
            "relative_to": "champion.accuracy",
            "at_least": 1.0,
            "when_no_champion": "skip",
        }
    ]
    config = world.config(gates=gates)
    first = world.run(config)
    assert first.gates is not None
    assert "no champion yet" in first.gates.results[0].reason
    world.registry.set_alias("support-student", "champion", 1, "test", "promoted")
    assert world.run(config).ref == "support-student:1", "the finished job stays finished"
    world.accuracy = 0.9
    worse = world.config(gates=gates, workdir=str(world.root / "second"), quantize__samples=8)
    with pytest.raises(GateError, match=r"accuracy = 0\.9091 is below 1"):
        world.run(worse)
    artifact = world.registry.download("support-student:1")
    assert world.subjects[-1].models["champion"] == artifact
    assert world.subjects[-1].champion_digest == world.registry.get("support-student:1").artifact.digest
    assert "champion" not in world.subjects[0].models


def test_a_changed_setting_redoes_what_depends_on_it(world: World) -> None:
    """Quantizing otherwise leaves the trained student; how the work is done (OPERATIONAL) redoes nothing."""
    world.run()
    world.run(world.config(quantize__samples=8))
    assert world.calls == ["train", "quantize", "evaluate", "quantize"], (
        "the same artifact needs no new evaluation"
    )
    world.run(world.config(quantize__samples=8, teach__batch_tokens=64))
    assert len(world.calls) == 4
    world.run(world.config(quantize__samples=8, teach__k=4))
    assert world.calls[4:] == ["train"], "the same copied checkpoint comes out, so nothing after it is redone"


def test_logs_that_grow_during_a_job_change_nothing(world: World) -> None:
    """Serving goes on: a resumed job sees the window of its first start."""
    world.run()
    write_logs(world.root / "logs" / "more", 5)
    (world.root / "logs" / "more" / "requests-00000.jsonl").rename(
        world.root / "logs" / "requests-55555.jsonl"
    )
    world.run()
    assert world.calls == ["train", "quantize", "evaluate"]


def test_a_bad_student_is_not_published(world: World) -> None:
    """The gate stops it; an override publishes it with the reason in its record."""
    world.accuracy = 0.5
    with pytest.raises(GateError, match=r"0\.5 is below 0\.98"):
        world.run()
    assert world.registry.list_models() == []
    result = world.run(override_gate="ann: to show the rollback")
    assert result.ref == "support-student:1"
    evaluation = world.registry.get("support-student").evaluation
    assert evaluation is not None
    assert evaluation.gates.overridden_by == "ann: to show the rollback"
    assert world.calls == ["train", "quantize", "evaluate"]


def test_one_stage_alone(world: World) -> None:
    """A stage runs alone over finished ones, and says which one it misses."""
    with pytest.raises(ConflictError, match="'teach' needs 'collect'"):
        world.run(only="teach")
    assert list(world.run(only="collect").manifests) == ["collect"]
    assert list(world.run(only="teach").manifests) == ["collect", "teach"]
    with pytest.raises(ConfigError, match="no stage 'deploy'"):
        world.run(only="deploy")


def test_the_plan_says_what_is_finished(world: World) -> None:
    """A dry run does nothing, and stages behind an unfinished one wait for it."""
    assert [(n, s) for n, s, _ in plan(world.config())] == [
        ("collect", "to do"),
        *((n, "waits") for n in ORDER[1:]),
    ]
    world.run(only="collect")
    assert [s for _, s, _ in plan(world.config())] == [
        "finished",
        "to do",
        "waits",
        "waits",
        "waits",
        "waits",
    ]
    world.run()
    assert {s for _, s, _ in plan(world.config())} == {"finished"}
    assert len(world.calls) == 3


def test_an_output_that_was_tampered_with_is_not_used(world: World) -> None:
    """A finished stage whose files changed is an error with the folder to remove, not a silent wrong
    input.
    """
    result = world.run(only="collect")
    (part,) = result.manifests["collect"].output("train").iterdir()
    with part.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"Remove .*collect-"):
        world.run()


def test_two_jobs_cannot_share_a_workdir(world: World) -> None:
    """The second one is told which process holds it; the lock dies with its holder."""
    code = (
        "import sys, time; from pathlib import Path; from distill_jobs.stage import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(world.root / "job")], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError, match=f"process {holder.pid}"):
            world.run()
    finally:
        holder.kill()
        holder.wait()
    with locked(world.root / "job"):
        pass


def test_progress_estimates_from_what_this_run_did(tmp_path: Path) -> None:
    """Units of an earlier run are not counted as speed, and the file is always whole JSON."""
    seen: list[Event] = []
    progress = Progress(tmp_path / "progress.json", seen.append)
    progress.begin("teach")
    progress._started -= 10
    progress._written = 0
    progress.update(90, 100, "shards")
    progress._written = 0
    progress.update(95, 100, "shards")
    assert seen[-2].eta_s is None
    assert seen[-1].eta_s == pytest.approx(10, abs=0.5)
    assert seen[-1].note == "95/100 shards"
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 95


def test_progress_estimates_each_unit_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that counts samples and then part files: parts are neither as slow nor as many as samples."""
    seen: list[Event] = []
    clock = [1000.0]
    monkeypatch.setattr("distill_jobs.progress.time.time", lambda: clock[0])
    progress = Progress(tmp_path / "progress.json", seen.append)
    progress.begin("teach")
    for after, done, total, unit in (
        (50, 500, 1000, "samples"),
        (50, 1000, 1000, "samples"),
        (20, 1, 5, "shards"),
        (3, 2, 5, "shards"),
    ):
        clock[0] += after
        progress.update(done, total, unit)
    assert [e.eta_s for e in seen[1:]] == [None, 0.0, None, 9.0]
    assert seen[-1].seconds == 123


def test_keys_leave_out_how_the_work_is_done(world: World) -> None:
    """The list of operational settings names real fields, so a rename cannot quietly put one into a key."""
    config = world.config()
    for section in (config.collect, config.teach, config.quantize, config.train):
        assert set(type(section).model_fields) >= type(section).OPERATIONAL
    assert "threads" not in key_config(config.train)


def test_a_manifest_is_written_last(tmp_path: Path) -> None:
    """A stage that dies leaves no manifest, so it is never taken for finished."""
    job = Job(tmp_path, Progress(tmp_path / "progress.json"))

    def work(folder: Path) -> Result:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.stage("collect", {}, {}, work)
    (folder,) = tmp_path.glob("collect-*")
    assert [f.name for f in folder.iterdir()] == ["half"]


def test_augment_is_a_stage_only_where_it_is_configured(world: World) -> None:
    """Between collect and teach, with a manifest of its own; teach learns what it added, quantize and
    evaluate do not see it, and without the section nothing changes.
    """
    plain = world.run().manifests
    with serving(FakeOpenAI(chat=lambda body: ["an altogether different question"])) as fake:
        paraphrase = {"samples": 3, "keep_answer": True}
        config = world.config(
            augment={"paraphrase": paraphrase, "endpoint": {"url": fake.url, "model": "big"}}
        )
        assert [n for n, _, _ in plan(config)] == ["collect", "augment", *ORDER[1:]]
        world.run(config, only="augment")
        manifests = world.run(config, only="teach").manifests
    assert list(manifests) == ["collect", "augment", "teach"]
    assert manifests["augment"].counts["written"] == 3
    kept = manifests["augment"].counts["train"] - manifests["augment"].counts["logged"]
    assert kept == 1
    assert manifests["teach"].parents == {n: manifests[n].key for n in ("collect", "augment")}
    assert manifests["collect"].key == plain["collect"].key
    assert manifests["teach"].counts["train"] == plain["teach"].counts["train"] + 1
    with pytest.raises(ConfigError, match="no stage 'augment' in this job"):
        world.run(only="augment")


def test_distributions_that_nobody_keeps_cannot_be_learned(world: World) -> None:
    """teach.scheme: text with a divergence to minimise is refused before anything runs."""
    with pytest.raises(ConfigError, match=r"train\.loss\.kd_weight must be 0"):
        world.config(teach__scheme="text")
    assert world.config(teach__scheme="text", train__loss={"kd_weight": 0}).teach.scheme == "text"
