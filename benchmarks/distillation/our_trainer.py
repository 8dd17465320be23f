"""A few steps of our own training loop on given rows, as `python -m …our_trainer SPEC.json`.

The loop, the live teacher and the prefixes are those of a training job, without Ray. Prints tokens, seconds
and peak memory as JSON, as `peer_trainer.py` does. Knows nothing about peers.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.distillation.op import peak, reset_peak
from distill_jobs.training.attention import register
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.models import load_model


def config(spec: dict[str, Any]) -> TrainConfig:
    """The same run as the peers': one pass, a live dense teacher, JSD without labels."""
    prefix = {"student": [(0.0, 1.0)], "max_new_tokens": spec["max_new_tokens"]}
    return TrainConfig.model_validate(
        {
            "batch_rows": spec["batch"],
            "max_steps": spec["steps"],
            "max_length": spec["max_length"],
            "micro_tokens": spec["pass_tokens"],
            "dtype": spec["dtype"],
            "optimizer": {"lr": spec["lr"]},
            "loss": {"divergence": "jsd", "beta": spec["beta"], "hard_weight": 0.0},
            "teacher": {
                "models": [{"model": spec["teacher"], "dtype": spec["dtype"]}],
                "cache_rows": 0,
                "read_tokens": spec["read_tokens"],
            },
            "prefix": prefix if spec["own_answers"] else {},
        }
    )


def write_rows(spec: dict[str, Any], folder: Path) -> Path:
    """The specification's rows in the form of the teach stage."""
    folder.mkdir()
    given = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    table = {
        "sample_digest": [str(i) for i in range(len(given))],
        "input_ids": pa.array([row["input_ids"] for row in given], pa.list_(pa.int32())),
        "prompt_len": pa.array(np.array([row["prompt_len"] for row in given]), pa.int32()),
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    return folder


def main() -> None:
    """Train and print the figures."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    for name in spec["imports"]:  # libraries are no part of what is counted
        importlib.import_module(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = reset_peak(device)
    losses, ends = [], []
    with tempfile.TemporaryDirectory(prefix="stillhouse-trainer-") as folder:
        one = config(spec)
        model = load_model(spec["student"], None, 0).to(device)
        model.set_attn_implementation(register())
        rows = Rows(write_rows(spec, Path(folder) / "rows"), one.max_length, with_teacher=False)
        for metrics in Trainer(model, rows, one).run():
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), int(metrics["tokens"])))
            losses.append(metrics["kd"])
    (start, before), (end, after) = ends[spec["skip"] - 1], ends[-1]
    figures = {"tokens": after - before, "seconds": end - start, "losses": losses}
    print(json.dumps({**figures, "peak_bytes": peak(device) - held}))


if __name__ == "__main__":
    main()
