"""A candidate's tokens/s by the real engine, on an artifact of its shape and precision.

Speed does not depend on what the weights are, so students that are not trained yet are timed on their start.
Knows nothing about what is fast enough.
"""

from __future__ import annotations

import json
from pathlib import Path

from contracts.config import write_atomic
from distill_jobs.config import EngineConfig
from distill_jobs.engine import run_engine, write_lines
from distill_jobs.quantize import make
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.search.config import Precision, SpeedConfig
from distill_jobs.search.space import Candidate, group_of
from distill_jobs.training.data import Rows
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.packed import pack_checkpoint

_PROMPTS = 64


def artifact_of(student: Path, precision: Precision, out: Path, threads: int) -> Path:
    """The checkpoint as it would be served, rounded to nearest; `out` appears whole and then stays."""
    if precision == "bf16":
        return student
    group = group_of(precision)
    artifact = out / "artifact"
    if not (artifact / "config.json").is_file():
        if group is not None:
            pack_checkpoint(student, artifact, FakeQuantConfig(bits=4, group_size=group))  # type: ignore[arg-type]
        else:
            config = QuantizeConfig(scheme="W8A8", algorithm="rtn", threads=threads)
            make(config, student, [{"ids": [0, 1]}], out, lambda *_: None)
    return artifact


def tokens_per_s(
    one: Candidate, student: Path, rows: Rows, folder: Path, speed: SpeedConfig, threads: int
) -> float:
    """Tokens a second of `speed.batch` requests, measured once; kept in `folder/<candidate>`.

    Raises: EngineError with the end of vLLM's log.
    """
    at = folder / one.name
    file = at / "speed.json"
    if not file.is_file():
        artifact = artifact_of(student, one.precision, at, threads)
        prompts = _prompts(rows)
        write_lines(at / "prompts.jsonl", [{"id": i, "ids": ids} for i, ids in enumerate(prompts)])
        job = {
            "model": str(artifact.resolve()), "out": str((at / "engine").resolve()),
            "speed": {
                "prompts": str((at / "prompts.jsonl").resolve()), "batch": speed.batch,
                "tokens": speed.answer_tokens, "ttft": 1,
            },
        }  # fmt: skip
        longest = max(map(len, prompts)) + speed.answer_tokens + 1
        engine = EngineConfig(max_model_len=max(64, longest), max_num_seqs=speed.batch, threads=threads)
        write_atomic(file, json.dumps(run_engine(job, engine)["speed"]) + "\n")
    return float(json.loads(file.read_text(encoding="utf-8"))["tokens_per_s"])


def _prompts(rows: Rows) -> list[list[int]]:
    """The first rows' prompts."""
    found = []
    for start, size in zip(rows.starts[:_PROMPTS], rows.prompt_len[:_PROMPTS], strict=True):
        found.append(rows.flat_ids[start : start + size].tolist())
    return found
