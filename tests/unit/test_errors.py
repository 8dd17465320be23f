"""Error analysis: predicates, slices with a planted weakness, suggested data, and the report on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import fisher_exact
from typer.testing import CliRunner

from cli.main import app
from contracts.config import write_atomic
from contracts.dataset import Manifest
from contracts.errors import ConfigError, DataError, NotFoundError
from distill_jobs.engine import write_lines
from distill_jobs.keys import output_file
from distill_jobs.studies.errors.analysis import analyse
from distill_jobs.studies.errors.features import last_user_text, length_bin, predicates, script_of
from distill_jobs.studies.errors.plots import NOTHING, OTHER, confusion
from distill_jobs.studies.errors.report import write_report
from distill_jobs.studies.errors.slices import Slice, find
from distill_jobs.studies.errors.suggest import suggestions


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("refund please", "latin"), ("我要退款 A-1", "cjk"), ("верните деньги", "cyrillic"),
        ("退款 refund now", "mixed"), ("12345 !!", "none"), ("", "none"),
    ],
)  # fmt: skip
def test_scripts_are_told_apart(text: str, script: str) -> None:
    """A stray Latin order number does not make a Chinese request mixed; a quarter of the words does."""
    assert script_of(text) == script


def test_predicates_of_odd_requests() -> None:
    """Missing, malformed and multi-part messages have lengths and words like any others; a tag that names
    requests one by one is none.
    """
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "Caf\u00e9 order"}, {"type": "image_url"}, 7],
    }
    odd: list[dict[str, Any]] = [
        {"messages": [parts], "metadata": {"plan": "gold", "case": "0"}},
        {"messages": None},
        {"messages": ["x", {"role": "user", "content": None}], "metadata": "none"},
        {"messages": [{"role": "user", "content": "order"}] * 2, "tools": [{}], "metadata": {"plan": 1}},
    ]
    assert [last_user_text(r) for r in odd] == ["Café order ", "", "", "order"]
    found = predicates(odd, [None, "a", "b", "c" * 60], [None, "k", "k", None], 1)
    assert found["word", "order"].tolist() == [True, False, False, True]
    assert found["word", "café"].tolist() == [True, False, False, False]
    assert found["metadata.plan", "gold"].tolist() == [True, False, False, False]
    assert found["metadata.plan", "1"].tolist() == [False, False, False, True]
    assert found["class", "k"].tolist() == [False, True, True, False]
    assert found["tools", "with"].tolist() == [False, False, False, True]
    assert found["turns", "several"].tolist() == [False, False, False, True]
    assert found["answer length", "50-99"].tolist() == [False, False, False, True]
    assert length_bin(10_000) == "6400+"
    many = [{"messages": [], "metadata": {"case": str(i)}} for i in range(60)]
    assert not any(a == "metadata.case" for a, _ in predicates(many, ["x"] * 60, [None] * 60, 1))


def planted(size: int = 600, seed: int = 0) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray]:
    """Three attributes of no meaning, and losses of 4 % but for (colour red and shape round): 60 %."""
    rng = np.random.default_rng(seed)
    known = {}
    for attribute, values in (("colour", "red green blue"), ("shape", "round flat"), ("size", "s m l xl")):
        column = rng.choice(values.split(), size)
        known |= {(attribute, v): column == v for v in values.split()}
    weak = known["colour", "red"] & known["shape", "round"]
    return known, rng.random(size) < np.where(weak, 0.6, 0.04)


def test_a_planted_weakness_is_found_and_is_first() -> None:
    """The pair that fails, with Fisher's p; neither half alone is as bad, so the pair is told."""
    known, lost = planted()
    found = find(known, lost, least=10)
    pairs = [s for s in found.slices if s.predicates == (("colour", "red"), ("shape", "round"))]
    assert len(pairs) == 1
    one = pairs[0]
    assert found.slices[0] is one
    outside = len(lost) - one.requests
    table = [[one.lost, one.requests - one.lost], [lost.sum() - one.lost, outside - (lost.sum() - one.lost)]]
    assert one.p == pytest.approx(fisher_exact(table, alternative="greater").pvalue)
    assert one.share > 0.4 > one.elsewhere
    assert one.p <= one.q <= 0.05
    assert found.tested == 9 + 3 * 2 + 3 * 4 + 2 * 4


def test_chance_is_not_a_finding() -> None:
    """Of 40 data sets without any weakness, about the allowed share names a slice; uncorrected tests of so
    many slices would nearly always.
    """
    named, uncorrected = 0, 0
    for seed in range(40):
        known, _ = planted(seed=seed)
        lost = np.random.default_rng(1000 + seed).random(600) < 0.1
        found = find(known, lost, least=10)
        named += bool(found.slices)
        uncorrected += bool(find(known, lost, least=10, level=1.0).slices[:1])
    assert named <= 5
    assert uncorrected > 30


def test_one_finding_is_told_once() -> None:
    """A second name of the same losses, and a pair that adds nothing, are left out; no losses, no slices."""
    known, _ = planted()
    red = known["colour", "red"]
    lost = red & (np.arange(600) % 2 == 0)
    known["word", "crimson"] = red.copy()
    known["word", "reddish"] = red & (np.arange(600) % 50 != 0)
    assert [s.predicates for s in find(known, lost, 10).slices] == [(("colour", "red"),)]
    assert find(known, np.zeros(600, dtype=bool), 10).slices == []
    assert find({}, lost, 10).tested == 0


def test_suggested_rows_follow_the_learning_curve() -> None:
    """Four times the losses of the others need 16 times the rows under n^-1/2, capped at ten times; a slice
    with hardly any rows gets some in any case.
    """

    def one(value: str, share: float) -> Slice:
        return Slice((("class", value),), 100, round(100 * share), 0.1, 0.001, 0.01)

    training = {("class", "a"): np.arange(500) < 100, ("class", "b"): np.arange(500) < 200}
    found = suggestions([one("a", 0.2), one("b", 0.4), one("c", 0.2)], training, 500)
    assert [(s.have, s.more) for s in found] == [(100, 300), (200, 1800), (0, 50)]
    assert found[2].why == "hardly any rows"
    assert suggestions([one("a", 0.2)], training, 500, exponent=1.0)[0].more == 100


def test_confusion_counts_with_many_classes() -> None:
    """The commonest classes by name, the rest as one; answers without a class have a column of their own."""
    actual = ["a", "a", "b", None, "c"]
    rows, columns, counts = confusion(actual, ["a", "b", None, "a", "zzz"])
    assert (rows, columns) == (["a", "b", "c"], ["a", "b", "c", OTHER, NOTHING])
    assert counts.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]
    names = [f"c{i:02d}" for i in range(30)] + ["c00"]
    rows, columns, counts = confusion(names, names)
    assert rows[-1] == OTHER
    assert len(rows) == 25
    assert counts.sum() == 31


def write_job(folder: Path, grade: bool = True) -> Path:
    """A finished job whose student takes Chinese refunds for cancellations, half of the time."""
    rng = random.Random(0)
    rows, samples = [], []
    for i in range(400):
        tool = rng.choice(["refund", "cancel", "track"])
        chinese = rng.random() < 0.3
        text = {"refund": "退款", "cancel": "取消", "track": "查询"}[tool] if chinese else f"please {tool} it"
        request = {"messages": [{"role": "user", "content": f"{text} {i}"}]}
        right = json.dumps({"tool": tool})
        wrong = chinese and tool == "refund" and rng.random() < 0.6
        mine = json.dumps({"tool": "cancel"}) if wrong else right
        answer = {"class": tool, "confidence": 0.9}
        rows.append(
            {
                "id": i,
                "request": request,
                "reference": right,
                "models": {
                    "teacher": answer | {"text": right, "right": 1.0 if grade else None},
                    "student": answer
                    | {
                        "text": mine,
                        "right": float(not wrong) if grade else None,
                        "class": json.loads(mine)["tool"],
                        "confidence": 0.5 + 0.4 * wrong,
                    },
                },
            }
        )
        if i < 200:
            samples.append({"request": json.dumps(request), "messages": None, "answer": right})
    at, collected = folder / "evaluate-abc", folder / "collect-abc"
    collected.mkdir(parents=True)
    write_lines(at / "requests.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(samples), collected / "train.parquet")
    finished = [
        (
            at,
            Manifest(
                stage="evaluate",
                key="e",
                config={"classes": "json:tool"},
                outputs={"requests": output_file(at / "requests.jsonl")},
            ),
        ),
        (
            collected,
            Manifest(stage="collect", key="c", outputs={"train": output_file(collected / "train.parquet")}),
        ),
    ]
    for place, manifest in finished:
        write_atomic(place / "manifest.json", manifest.model_dump_json())
    return folder


def test_a_jobs_errors_become_a_report(tmp_path: Path) -> None:
    """The planted weakness is the first slice; confusion, the rows to collect and the surest mistakes are
    told, in Markdown, JSON and two pictures.
    """
    job = write_job(tmp_path / "job")
    analysis = analyse(job)
    lost = int(analysis.lost.sum())
    assert lost > 10
    top = analysis.found.slices[0]
    assert set(top.predicates) == {("class", "refund"), ("script", "cjk")} or top.predicates == (
        ("word", "退款"),
    )
    assert analysis.p < 1e-3
    assert all(analysis.lost[i] for i in analysis.worst)
    text = write_report(analysis, tmp_path / "out").read_text()
    assert f"Of 400 graded requests the student loses {lost}" in text
    assert f"| refund | cancel | {lost} |" in text
    assert "Sure by 90%, class refund" in text
    assert "McNemar p =" in text
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["lost"] == lost
    assert facts["collect"][0]["more"] > 0
    for picture in ("confusion.png", "slices.png"):
        assert f"({picture})" in text
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_examples_cannot_break_the_page(tmp_path: Path) -> None:
    """Backticks, pipes, tags and dollar signs in answers stay text."""
    job = write_job(tmp_path / "job")
    file = job / "evaluate-abc" / "requests.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["models"]["student"]["text"] = "````\n# not a heading $x$ | <b>"
        row["models"]["student"]["class"] = "a|b $x$"
    write_lines(file, rows)
    manifest = Manifest(
        stage="evaluate", key="e", config={"classes": "json:tool"}, outputs={"requests": output_file(file)}
    )
    write_atomic(file.parent / "manifest.json", manifest.model_dump_json())
    text = write_report(analyse(job), tmp_path / "out").read_text()
    assert "`````text\n````\n# not a heading $x$ | <b>\n`````" in text


def test_what_cannot_be_analysed_says_what_to_do(tmp_path: Path) -> None:
    """No folder, no evaluation, a model that was not measured, nothing graded."""
    with pytest.raises(NotFoundError, match="Give a job's workdir"):
        analyse(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="stillhouse distill"):
        analyse(tmp_path / "empty")
    job = write_job(tmp_path / "job")
    with pytest.raises(ConfigError, match="It measured: student, teacher"):
        analyse(job, model="quantized")
    with pytest.raises(DataError, match=r"evaluate\.grader"):
        analyse(write_job(tmp_path / "ungraded", grade=False))


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    """`stillhouse errors WORKDIR` ends with the headline, the slices and where the report lies."""
    job = write_job(tmp_path / "job")
    result = CliRunner().invoke(app, ["errors", str(job), "--examples", "1"])
    assert result.exit_code == 0, result.output
    assert "the student loses" in result.output
    assert (job / "errors" / "report.md").is_file()
    told = CliRunner().invoke(app, ["errors", "--help"])
    assert "Find where a student loses to its teacher" in told.output
