"""evaluate: which jobs the engine gets, what is cached, and the metrics made of what it wrote (engine
faked).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import ConfigError, ConflictError, DataError, EngineError
from contracts.plugins import load_function
from distill_jobs import evaluate
from distill_jobs.config import EngineConfig, EvaluateConfig
from distill_jobs.engine import read_lines, write_lines
from distill_jobs.evaluate import Subjects
from distill_jobs.evaluation_set import pin_dataset, read_requests
from distill_jobs.progress import Progress
from distill_jobs.stage import locked
from tests.integration.pipeline_world import write_model

WORLD = "tests.integration.pipeline_world"
LOGPROB = {"teacher": math.log(0.9), "student": math.log(0.5), "quantized": math.log(0.45)}


class FakeEngine:
    """Writes what vLLM would: right answers of the teacher, a wrong one of the student's, two wrong
    quantized.
    """

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []

    def __call__(self, job: dict[str, Any], engine: EngineConfig, on_progress: Any) -> dict[str, Any]:
        self.jobs.append(job)
        name = Path(job["model"]).name
        out = Path(job["out"])
        prompts = read_lines(out / "prompts.jsonl")
        wrong = {"teacher": 0, "student": 1, "quantized": 2}[name]
        answers = [
            {"id": p["id"], "ids": p["ids"], "completion": [5, 2], "text": "no" if p["id"] < wrong else "yes"}
            for p in prompts
        ]
        write_lines(out / "answers.jsonl", answers)
        rows = answers if job["score"]["rows"] is None else read_lines(Path(job["score"]["rows"]))
        rows = rows[: job["score"]["limit"]]
        write_lines(out / "rows.jsonl", rows)
        logprob = LOGPROB[name]
        rest = math.log(1 - math.exp(logprob))
        first = 5 if name != "quantized" else 6
        scores = [
            {
                "id": r["id"],
                "actual": [logprob] * 2,
                "topk_ids": [5, 1, first, 1],
                "topk_logprobs": [logprob, rest] * 2,
            }
            for r in rows
        ]
        pq.write_table(pa.Table.from_pylist(scores), out / "scores.parquet")
        on_progress(len(rows), len(rows), "scores")
        return {"speed": {"tokens_per_s": 100.0 * (wrong + 1)}}


def grade(request: dict[str, Any], text: str) -> bool:
    """Everything but "no" is right."""
    return text != "no"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints."""
    root = tmp_path_factory.mktemp("models")
    for name, hidden in (("teacher", 128), ("student", 64), ("quantized", 64)):
        write_model(root / name, hidden=hidden, layers=1, seed=0)
    return root


CONFIG = EvaluateConfig(
    dataset=f"{WORLD}:evaluation",
    dataset_args={"size": 10},
    grader="tests.unit.test_evaluate:grade",
    score_samples=4,
    topk=2,
    answer_tokens=16,
)


def measure(tmp: Path, models: Path, config: EvaluateConfig, engine: FakeEngine) -> evaluate.Result:
    """Run the stage in `tmp`."""
    dataset, digest = pin_dataset(config, tmp)
    subjects = Subjects(
        teacher=models / "teacher",
        teacher_digest="t",
        student=models / "student",
        quantized=models / "quantized",
        dataset=dataset,
        dataset_digest=digest,
        cache_dir=tmp / "cache",
    )
    (tmp / "evaluate").mkdir(exist_ok=True)
    return evaluate.run(config, subjects, tmp / "evaluate", Progress(tmp / "p.json"), engine)


def test_metrics_are_made_of_what_the_engine_wrote(tmp_path: Path, models: Path) -> None:
    """Accuracy, perplexity, KL, agreement, speed and sizes of each model, by their published names."""
    metrics = measure(tmp_path, models, CONFIG, FakeEngine()).metrics
    assert [metrics[f"{m}.accuracy"] for m in evaluate.MODELS] == [1.0, 0.9, 0.8]
    assert metrics["student.perplexity"] == pytest.approx(2.0)
    assert metrics["quantized.perplexity"] == pytest.approx(1 / 0.45)
    assert metrics["student.agreement"] == 1.0
    assert metrics["quantized.agreement"] == 0.5
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert metrics["student.kl_to_teacher"] == pytest.approx(expected)
    assert metrics["quantized.tokens_per_s"] == 300.0
    assert metrics["quantized.params"] == metrics["student.params"]
    assert metrics["teacher.params"] == pytest.approx(4 * metrics["student.params"], rel=0.5)
    assert metrics["teacher.bytes"] == sum(f.stat().st_size for f in (models / "teacher").iterdir())


def test_everybody_is_scored_on_the_teachers_answers(tmp_path: Path, models: Path) -> None:
    """One engine start a model; the student's rows are the file the teacher wrote."""
    engine = FakeEngine()
    measure(tmp_path, models, CONFIG, engine)
    assert [Path(j["model"]).name for j in engine.jobs] == ["teacher", "student", "quantized"]
    assert engine.jobs[0]["score"]["rows"] is None
    assert {j["score"]["rows"] for j in engine.jobs[1:]} == {str(Path(engine.jobs[0]["out"]) / "rows.jsonl")}


def test_a_killed_evaluation_measures_only_what_is_left(tmp_path: Path, models: Path) -> None:
    """A model whose measurement is finished is not loaded again; the teacher's outlives the job."""
    measure(tmp_path, models, CONFIG, FakeEngine())
    (tmp_path / "evaluate" / "quantized" / "done.json").unlink()
    engine = FakeEngine()
    measure(tmp_path, models, CONFIG, engine)
    assert [Path(j["model"]).name for j in engine.jobs] == ["quantized"]
    alone = FakeEngine()
    measure(tmp_path, models, CONFIG.model_copy(update={"cache_teacher": False}), alone)
    assert [Path(j["model"]).name for j in alone.jobs] == ["teacher"]


def test_without_a_grader_there_is_no_accuracy(tmp_path: Path, models: Path) -> None:
    """An accuracy gate then finds no data, and no data never passes."""
    metrics = measure(tmp_path, models, CONFIG.model_copy(update={"grader": None}), FakeEngine()).metrics
    assert "quantized.accuracy" not in metrics
    assert metrics["quantized.perplexity"] is not None


def test_requests_that_do_not_fit_are_told_before_the_engine_starts(tmp_path: Path, models: Path) -> None:
    """The error says which setting to raise, and to what."""
    engine = FakeEngine()
    config = CONFIG.model_copy(update={"engine": EngineConfig(max_model_len=64)})
    with pytest.raises(EngineError, match=r"evaluate\.engine\.max_model_len"):
        measure(tmp_path, models, config, engine)
    assert engine.jobs == []


def test_two_jobs_do_not_write_one_teacher_evaluation(tmp_path: Path, models: Path) -> None:
    """The shared cache is locked while it is filled."""
    dataset, digest = pin_dataset(CONFIG, tmp_path)
    subjects = Subjects(
        models / "teacher", "t", models / "student", models / "quantized", dataset, digest, tmp_path / "cache"
    )
    with locked(evaluate._teacher_folder(CONFIG, subjects, tmp_path)), pytest.raises(ConflictError):
        measure(tmp_path, models, CONFIG, FakeEngine())


def test_generated_datasets_are_written_once(tmp_path: Path) -> None:
    """The file is the dataset from then on, whatever the function does later; its size is
    evaluate.samples.
    """
    file, digest = pin_dataset(CONFIG.model_copy(update={"samples": 3}), tmp_path)
    assert len(read_requests(file, 99)) == 3
    assert pin_dataset(CONFIG.model_copy(update={"samples": 3}), tmp_path) == (file, digest)
    assert pin_dataset(CONFIG, tmp_path)[0] != file


def test_dataset_files_are_read_and_refused_with_reasons(tmp_path: Path) -> None:
    """Rows may be a request or {"request": ...}; anything else names the line."""
    file = tmp_path / "d.jsonl"
    body = {"messages": [{"role": "user", "content": "x"}]}
    file.write_text(json.dumps(body) + "\n\n" + json.dumps({"request": body}) + "\n")
    assert read_requests(file, 9) == [body, body]
    file.write_text('{"request": 1}\n')
    with pytest.raises(DataError, match="messages"):
        read_requests(file, 9)
    file.write_text("")
    with pytest.raises(DataError, match="no requests"):
        read_requests(file, 9)
    with pytest.raises(ConfigError, match="no file"):
        pin_dataset(CONFIG.model_copy(update={"dataset": str(tmp_path / "none.jsonl")}), tmp_path)


@pytest.mark.parametrize("name", ["nocolon", "no.such.module:f", f"{WORLD}:nothing", f"{WORLD}:WORDS"])
def test_wrong_function_names_name_their_field(name: str) -> None:
    """A typo in a grader's name is found before anything is measured."""
    with pytest.raises(ConfigError, match=r"evaluate\.grader"):
        load_function(name, "evaluate.grader")
