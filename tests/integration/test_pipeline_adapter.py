"""A student that stays an adapter, with nothing faked: trained on bf16, measured and published on W4A16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contracts.config import parse_config
from contracts.model import AdapterBase
from distill_jobs.config import DistillConfig
from distill_jobs.pipeline import run_pipeline
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.packed import pack_checkpoint
from registry.adapter import WEIGHTS_FILE, is_adapter, read_adapter
from registry.digest import digest_folder
from registry.mlflow_store import MlflowRegistry
from tests.integration.pipeline_world import config_of, write_world

pytestmark = pytest.mark.integration


def test_an_adapter_is_measured_on_the_base_that_will_serve_it_and_published(tmp_path: Path) -> None:
    """Distilled on the bf16 base and served beside its W4A16 file: vLLM's perplexity of the two together is
    the one computed from the files (and not the base's), sizes count the base, and the record says which one
    by its digest."""
    write_world(tmp_path, rows=120)
    packed = tmp_path / "w4a16"
    pack_checkpoint(tmp_path / "student", packed, FakeQuantConfig(group_size=32))
    settings = config_of(tmp_path)
    settings["train"] |= {"lora": {"r": 4, "alpha": 64, "export": "adapter", "served_base": str(packed)}}
    settings["train"] |= {"optimizer": {"lr": 0.01}}
    config = parse_config(settings, DistillConfig)
    done = run_pipeline(config, say=lambda _: None)

    record = MlflowRegistry(config.publish.tracking_uri).get("support-student@challenger")
    base = AdapterBase(ref=str(packed), digest=digest_folder(packed), rank=4)
    assert (record.ref, record.artifact.adapter) == (done.ref, base)
    assert (record.artifact.precision, record.artifact.bytes < 400_000) == ("lora-bf16", True)
    folder = MlflowRegistry(config.publish.tracking_uri).download("support-student:1")
    assert is_adapter(folder)
    assert read_adapter(folder) == base

    metrics = {name: value or 0.0 for name, value in done.manifests["evaluate"].metrics.items()}
    assert metrics["quantized.perplexity"] == pytest.approx(metrics["quantized.offline_perplexity"], rel=0.01)
    acted = metrics["student.perplexity"] / _untrained(tmp_path, config)
    assert abs(acted - 1) > 0.1, "an engine that ignores the adapter measures the base"
    assert metrics["quantized.perplexity"] == pytest.approx(metrics["student.perplexity"], rel=0.25)
    own = sum(f.stat().st_size for f in folder.iterdir())
    whole = sum(f.stat().st_size for f in packed.iterdir())
    assert metrics["quantized.bytes"] == pytest.approx(own + whole, rel=0.01)
    assert metrics["quantized.params"] > metrics["student.params"] * 0.99
    card = (done.manifests["publish"].output("card")).read_text()
    assert "an adapter of rank 4, served beside its base" in card
    assert (folder / WEIGHTS_FILE).read_bytes() == (
        done.manifests["train"].output("student") / WEIGHTS_FILE
    ).read_bytes()


def _untrained(root: Path, config: DistillConfig) -> float:
    """Perplexity of the base alone on what the student was scored on, computed from its files."""
    from math import exp

    from distill_jobs.quantizing.offline import read_scores, score_offline

    (scored,) = config.workdir.glob("evaluate-*/student/rows.jsonl")
    score_offline(root / "student", None, scored, root / "untrained")
    scores = [s for row in read_scores(root / "untrained", "reference").values() for s in row]
    assert len(json.loads(scored.read_text().splitlines()[0])["completion"]) > 0
    return exp(-sum(scores) / len(scores))
