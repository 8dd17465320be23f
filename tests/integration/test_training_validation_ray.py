"""A run that validates beside its training, stops early and keeps its checkpoints on S3 (a real API: moto's
server)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from transformers import AutoModelForCausalLM

from contracts.errors import DataError
from distill_jobs.ray_session import ray_session
from distill_jobs.training import EarlyStopConfig, OptimizerConfig, TrainConfig, run_training
from distill_jobs.training.attention import register
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.validation import exhausted, rows_loss
from tests.integration.training_driver import config
from tests.integration.training_rig import base_model
from tests.unit.test_training_loop import write_rows

pytestmark = pytest.mark.integration
EVERY = 10


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with a bucket; workers find it through the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": url,
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="runs")
    yield url
    server.stop()


@pytest.fixture
def session(bucket: str) -> Iterator[None]:
    with ray_session("local", cpus=2):
        yield


def early(**changes: object) -> TrainConfig:
    """Rows of random labels: what is learned is memorised, and validation gets worse soon."""
    return config(
        workers=1,
        cpus_per_worker=1,
        checkpoint_steps=1000,
        validate_steps=EVERY,
        early_stop=EarlyStopConfig(patience=2),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
        storage="s3://runs/team",
        **changes,
    )


def straight(folder: Path, base: Path) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Validation losses and weights at every validation, in this process, without stopping."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.set_attn_implementation(register())
    trainer = Trainer(model, Rows(folder / "train", 64, True), early())
    held_out, losses, weights = Rows(folder / "validation", 64, True), [], []
    for metrics in trainer.run():
        if metrics["step"] % EVERY == 0:
            losses.append(rows_loss(model, held_out, trainer.config)["validation_loss"])
            weights.append({name: one.clone() for name, one in trainer.weights().items()})
            model.train()
        if metrics["step"] == 100:
            break
    return losses, weights


def test_a_run_validates_aside_stops_early_and_exports_the_best(
    tmp_path: Path, session: None, bucket: str
) -> None:
    """The curve is that of validating in the loop; the run ends one validation after patience ran out; the
    exported weights are the best ones; S3 holds the best checkpoints and the last; called again, the finished
    run is found there and nothing is trained."""
    base = base_model(tmp_path / "base")
    write_rows(tmp_path / "rows" / "train")
    write_rows(tmp_path / "rows" / "validation", seed=8)
    losses, weights = straight(tmp_path / "rows", base)
    out = tmp_path / "student"
    seen: list[dict[str, float]] = []
    result = run_training(early(), tmp_path / "rows" / "train", str(base), out, seen.append)

    stop = next(i for i in range(1, len(losses)) if exhausted(losses[:i], early().early_stop))  # type: ignore[arg-type]
    best = min(range(stop + 1), key=lambda i: losses[i])
    (progress,) = (tmp_path / "student.run").glob("*/progress.jsonl")
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    curve = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert [line["step"] for line in lines if "kd" in line] == list(range(1, (stop + 1) * EVERY + 1))
    assert curve == pytest.approx(losses[: stop + 1], rel=0.01)  # the exported weights are bf16
    assert seen == lines

    assert result.metrics["step"] == (best + 1) * EVERY
    assert result.metrics["validation_loss"] == pytest.approx(losses[best], rel=0.01)
    student = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in weights[best].items():
        assert torch.equal(student[name].float(), tensor.bfloat16().float()), name

    client = boto3.client("s3", endpoint_url=bucket)
    keys = [one["Key"] for one in client.list_objects_v2(Bucket="runs")["Contents"]]
    states = [key for key in keys if key.endswith("state.pt")]
    assert len(states) == 3
    assert len([key for key in keys if "/validation/" in key]) == stop + 1

    again = run_training(early(), tmp_path / "rows" / "train", str(base), out)
    assert again.metrics == result.metrics
    assert len(progress.read_text().splitlines()) == len(lines)


def test_validation_without_rows_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """The message names the folder that is missing and the stage that makes it."""
    write_rows(tmp_path / "rows" / "train")
    with pytest.raises(DataError, match="validation; teach a validation split"):
        run_training(config(workers=1, validate_steps=5), tmp_path / "rows" / "train", "x", tmp_path / "out")
