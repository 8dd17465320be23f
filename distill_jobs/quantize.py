"""quantize: a bf16 student in, a quantized artifact that vLLM loads out, calibrated on logged traffic.

llm-compressor runs as a subprocess in its own environment; this side prepares its rows, checks what can be
checked beforehand, and believes only a result file. Knows nothing about quality: evaluate.py measures it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import QuantizationError
from distill_jobs.engine import engine_name, write_lines
from distill_jobs.keys import output_file
from distill_jobs.progress import Progress
from distill_jobs.quantizing.calibration import calibration_rows
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.quantizing.mixed import Part, make_plan
from distill_jobs.quantizing.traps import check_artifact, check_plain, check_served, check_shapes
from distill_jobs.stage import Result
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.worker_process import OnProgress, run_worker

PYTHON_ENV = "STILLHOUSE_COMPRESS_PYTHON"


@dataclass(frozen=True)
class Made:
    """One quantized artifact."""

    artifact: Path
    seconds: float
    versions: dict[str, str]
    plan: list[Part] | None
    """MIXED: which layers are how."""


def run(
    config: QuantizeConfig, student: Path, collected: dict[str, Path], folder: Path, progress: Progress
) -> Result:
    """Quantize `student` into `folder/artifact`."""
    check(config, student)
    rows = calibration_rows(ChatTokenizer(str(student)), collected, config.samples, config.max_tokens)
    made = make(config, student, rows, folder, progress.update)
    notes = {"format": config.precision, "versions": json.dumps(made.versions)}
    outputs = {"artifact": output_file(made.artifact)}
    return Result(outputs, {"calibration": len(rows)}, {"compress_s": made.seconds}, notes)


def check(config: QuantizeConfig, student: Path) -> Path:
    """Everything that can be known before the work. The compression environment's interpreter."""
    python = compress_python()
    check_served(config, engine_name())
    check_plain(student)
    check_shapes(student, config)
    return python


def make(
    config: QuantizeConfig, student: Path, rows: list[dict[str, Any]], folder: Path, tell: OnProgress
) -> Made:
    """Quantize `student` into `folder/artifact` on rows {"ids"}. Raises: QuantizationError with the end of
    llm-compressor's log.
    """
    python = compress_python()
    folder.mkdir(parents=True, exist_ok=True)
    calibration, artifact, result = (folder / n for n in ("calibration.jsonl", "artifact", "result.json"))
    write_lines(calibration, rows)
    plan = make_plan(config, student, calibration, folder, tell) if config.scheme == "MIXED" else None
    job = {
        "model": str(student.resolve()),
        "out": str(artifact.resolve()),
        "rows": str(calibration.resolve()),
        "result": str(result.resolve()),
        "algorithm": config.method,
        "shares": config.shares,
        "plan": None if plan is None else [part.model_dump() for part in plan],
        **config.model_dump(include={"scheme", "group_size", "format", "max_tokens", "ignore"}),
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    env = {
        "OMP_NUM_THREADS": str(config.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    argv = [str(python), "-m", "distill_jobs.compress.worker", str(folder / "job.json")]
    log = folder / "compress.log"
    run_worker(argv, result, log, env, config.timeout_s, QuantizationError, on_progress=tell)
    check_artifact(artifact)
    done: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return Made(artifact, done["seconds"], done["versions"], plan)


def compress_python() -> Path:
    """The interpreter of the compression environment. Raises: QuantizationError with the command that makes
    it.
    """
    given = os.environ.get(PYTHON_ENV)
    python = (
        Path(given) if given else Path(__file__).resolve().parents[1] / ".venv-compress" / "bin" / "python"
    )
    if not (python.is_file() or shutil.which(str(python))):
        raise QuantizationError(
            f"There is no compression environment: {python} does not exist. Run `make setup`, or point"
            f" {PYTHON_ENV} at the Python of an environment with llmcompressor."
        )
    return python
