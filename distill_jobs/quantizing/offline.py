"""Scores rows without an engine: the bf16 checkpoint, and the artifact as its files say it is.

`python -m distill_jobs.quantizing.offline JOB.json`: {"reference": bf16 folder, "artifact": folder or null,
"rows": JSON lines {"id", "ids", "completion"}, "out": folder}. Writes `reference.json` and `artifact.json`,
by id the log-probabilities of the completion's tokens (natural log), and `result.json` last. A process of
its own (torch); knows nothing about verdicts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from contracts.config import write_atomic
from contracts.errors import QuantizationError
from distill_jobs.lines import stream_lines
from distill_jobs.quantizing.dequantize import activation_hooks, dequantized
from distill_jobs.worker_process import die_with_parent, run_worker
from registry.adapter import folders_of

_CHUNK = 256
_TIMEOUT_S = 3600.0

Scores = dict[int, list[float]]
"""Log-probabilities of each row's completion, by the row's id."""


def score_offline(reference: Path, artifact: Path | None, rows: Path, folder: Path, threads: int = 1) -> None:
    """The caller's side: score in a process of its own, unless `folder` has it already.

    Raises: QuantizationError with the end of the log.
    """
    result = folder / "result.json"
    if result.is_file():
        return
    job = {
        "reference": str(reference.resolve()),
        "artifact": None if artifact is None else str(artifact.resolve()),
        "rows": str(rows.resolve()),
        "out": str(folder.resolve()),
    }
    write_atomic(folder / "job.json", json.dumps(job) + "\n")
    root = str(Path(__file__).resolve().parents[2])
    env = {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
    }  # fmt: skip
    argv = [sys.executable, "-m", "distill_jobs.quantizing.offline", str(folder / "job.json")]
    run_worker(argv, result, folder / "offline.log", env, _TIMEOUT_S, QuantizationError)


def read_scores(folder: Path, name: str) -> Scores:
    """What was written about "reference" or "artifact"."""
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return {int(key): values for key, values in found.items()}


def main(job_file: str) -> None:
    """Score both, in bf16, which is what engines compute in."""
    die_with_parent()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    out = Path(job["out"])
    rows = list(stream_lines(Path(job["rows"])))
    reference = Path(job["reference"])
    with torch.inference_mode():
        _write(out / "reference.json", _score(_model(reference, None), rows))
        if job["artifact"] is not None:
            _write(out / "artifact.json", _score(_model(reference, Path(job["artifact"])), rows))
    write_atomic(out / "result.json", json.dumps({"rows": len(rows)}) + "\n")


def _model(reference: Path, artifact: Path | None) -> Any:
    """The reference; with an artifact, what that one's files say instead. An adapter is put on its base."""
    base, *adapter = folders_of(reference)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    if artifact is not None:
        packed, *adapter = folders_of(artifact)
        _load(model, dequantized(packed))
        activation_hooks(model, packed)
    for folder in adapter:
        from peft import PeftModel

        PeftModel.from_pretrained(model, folder)  # puts its layers into `model`
    return model


def _load(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put the artifact's weights into the reference's model; tied matrices are stored once."""
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    )
    if unknown or set(missing) - tied:
        raise QuantizationError(
            f"The artifact's tensors are not the reference's: unknown {unknown[:3]}, missing {missing[:3]}."
        )


def _score(model: Any, rows: list[dict[str, Any]]) -> Scores:
    """One row at a time: padding would change nothing, and rows are short."""
    found: Scores = {}
    head = model.get_output_embeddings()
    for row in rows:
        ids = row["ids"] + row["completion"]
        seen = model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        hidden = seen[0, len(row["ids"]) - 1 : -1]
        targets = torch.tensor(row["completion"])
        logprobs = [
            head(h).float().log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1)
            for h, t in zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True)
        ]
        found[row["id"]] = torch.cat(logprobs).tolist()
    return found


def _write(file: Path, scores: Scores) -> None:
    write_atomic(file, json.dumps(scores) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
