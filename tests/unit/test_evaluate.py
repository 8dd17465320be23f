"""evaluate: which jobs the engine gets, what is cached, and the metrics made of what it wrote (engine
faked).
"""

from __future__ import annotations

import json
import math
import shutil
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
from distill_jobs.evaluation_set import pin_dataset, read_rows
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


def measure(
    tmp: Path, root: Path, config: EvaluateConfig, engine: FakeEngine, **changes: Any
) -> evaluate.Result:
    """Run the stage in `tmp`."""
    dataset, digest = pin_dataset(config, tmp)
    given: dict[str, Any] = {
        "models": {name: root / name for name in evaluate.MODELS},
        "cache_dir": tmp / "cache",
    }
    subjects = Subjects(teacher_digest="t", dataset=dataset, dataset_digest=digest, **given | changes)
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
    folders = {name: models / name for name in evaluate.MODELS}
    subjects = Subjects(folders, "t", dataset, digest, tmp_path / "cache")
    with locked(evaluate._folder(CONFIG, subjects, tmp_path, "teacher")), pytest.raises(ConflictError):
        measure(tmp_path, models, CONFIG, FakeEngine())


def test_generated_datasets_are_written_once(tmp_path: Path) -> None:
    """The file is the dataset from then on, whatever the function does later; its size is
    evaluate.samples.
    """
    file, digest = pin_dataset(CONFIG.model_copy(update={"samples": 3}), tmp_path)
    assert len(read_rows(file, 99)) == 3
    assert pin_dataset(CONFIG.model_copy(update={"samples": 3}), tmp_path) == (file, digest)
    assert pin_dataset(CONFIG, tmp_path)[0] != file


def test_dataset_files_are_read_and_refused_with_reasons(tmp_path: Path) -> None:
    """Rows may be a request or {"request": ...}; anything else names the line."""
    file = tmp_path / "d.jsonl"
    body = {"messages": [{"role": "user", "content": "x"}]}
    file.write_text(json.dumps(body) + "\n\n" + json.dumps({"request": body}) + "\n")
    assert read_rows(file, 9) == [{"request": body}, {"request": body}]
    file.write_text(json.dumps({"request": body, "answer": "да"}) + "\n")
    assert read_rows(file, 9) == [{"request": body, "answer": "да"}]
    file.write_text(json.dumps({"request": body, "answer": 3}) + "\n")
    with pytest.raises(DataError, match="answer must be a text"):
        read_rows(file, 9)
    file.write_text('{"request": 1}\n')
    with pytest.raises(DataError, match="messages"):
        read_rows(file, 9)
    file.write_text("")
    with pytest.raises(DataError, match="no requests"):
        read_rows(file, 9)
    with pytest.raises(ConfigError, match="no file"):
        pin_dataset(CONFIG.model_copy(update={"dataset": str(tmp_path / "none.jsonl")}), tmp_path)


@pytest.mark.parametrize("name", ["nocolon", "no.such.module:f", f"{WORLD}:nothing", f"{WORLD}:WORDS"])
def test_wrong_function_names_name_their_field(name: str) -> None:
    """A typo in a grader's name is found before anything is measured."""
    with pytest.raises(ConfigError, match=r"evaluate\.grader"):
        load_function(name, "evaluate.grader")


def test_every_metric_comes_with_its_interval(tmp_path: Path, models: Path) -> None:
    """Over the requests; figures of a machine have none. The report on disk holds both."""
    result = measure(tmp_path, models, CONFIG, FakeEngine())
    low, high = result.intervals["student.accuracy"]
    assert low < 0.9 < high
    assert "student.tokens_per_s" not in result.intervals
    report = json.loads((tmp_path / "evaluate" / "report.json").read_text())
    assert report["intervals"]["student.accuracy"] == [low, high]
    assert report["metrics"]["quantized.exact_match"] == 0.8


def test_the_champion_is_a_fourth_subject_kept_by_its_digest(tmp_path: Path, models: Path) -> None:
    """Measured after the others on the same requests, and only once for all jobs that meet it."""
    folders = {n: models / n for n in evaluate.MODELS} | {"champion": models / "student"}
    engine = FakeEngine()
    found = measure(tmp_path, models, CONFIG, engine, models=folders, champion_digest="c")
    assert found.metrics["champion.accuracy"] == 0.9
    assert [Path(j["out"]).name.split("-")[0] for j in engine.jobs] == [*evaluate.MODELS, "champion"]
    other = tmp_path / "other"
    other.mkdir()
    again = FakeEngine()
    measure(other, models, CONFIG, again, models=folders, champion_digest="c", cache_dir=tmp_path / "cache")
    assert [Path(j["out"]).name for j in again.jobs] == ["student", "quantized"]


def test_a_students_own_tokenizer_is_scored_on_its_own_tokens(tmp_path: Path, models: Path) -> None:
    """The teacher's text in the student's tokens; KL between two vocabularies does not exist."""
    odd = tmp_path / "quantized"
    shutil.copytree(models / "quantized", odd)
    for file in odd.glob("*.j*"):
        file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    engine = FakeEngine()
    folders = {n: models / n for n in evaluate.MODELS} | {"quantized": odd}
    found = measure(tmp_path, models, CONFIG, engine, models=folders).metrics
    rows = Path(engine.jobs[2]["score"]["rows"])
    assert rows.name == "own-rows.jsonl"
    assert len(read_lines(rows)[0]["completion"]) == len("yes") + 1
    assert found["student.agreement"] == 1.0
    assert "quantized.agreement" not in found
    assert found["quantized.bits_per_byte"] is not None


def test_a_readable_row_a_request_holds_all_answers(tmp_path: Path, models: Path) -> None:
    """What error analysis reads: the request, the reference and each model's answer with its judgement."""
    measure(tmp_path, models, CONFIG, FakeEngine())
    rows = read_lines(tmp_path / "evaluate" / "requests.jsonl")
    assert len(rows) == 10
    assert rows[0]["reference"] == "yes"
    assert {n: (m["text"], m["right"]) for n, m in rows[0]["models"].items()} == {
        "teacher": ("yes", 1.0),
        "student": ("no", 0.0),
        "quantized": ("no", 0.0),
    }
    assert rows[0]["request"]["messages"][0]["role"] == "user"
