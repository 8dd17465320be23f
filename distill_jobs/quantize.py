"""quantize: a bf16 student in, a quantized artifact that vLLM loads out, calibrated on logged traffic.

llm-compressor runs as a subprocess in its own environment; this side prepares its rows, checks what can be
checked beforehand, and believes only a result file. Knows nothing about quality: evaluate.py measures it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

from contracts.errors import DataError, QuantizationError
from distill_jobs.config import QuantizeConfig
from distill_jobs.engine import write_lines
from distill_jobs.keys import output_file
from distill_jobs.progress import Progress
from distill_jobs.samples import each
from distill_jobs.stage import Result
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.worker_process import run_worker

PYTHON_ENV = "STILLHOUSE_COMPRESS_PYTHON"
_SCRIPT = Path(__file__).parent / "compress" / "awq.py"


def run(
    config: QuantizeConfig, student: Path, collected: dict[str, Path], folder: Path, progress: Progress
) -> Result:
    """Quantize `student` into `folder/artifact`."""
    python = compress_python()
    check_shapes(student, config)
    rows = calibration_rows(config, student, collected)
    write_lines(folder / "calibration.jsonl", rows)
    artifact, result = folder / "artifact", folder / "result.json"
    job = {
        "model": str(student.resolve()),
        "out": str(artifact.resolve()),
        "rows": str((folder / "calibration.jsonl").resolve()),
        "result": str(result.resolve()),
        **config.model_dump(include={"scheme", "group_size", "max_tokens", "ignore"}),
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    env = {
        "OMP_NUM_THREADS": str(config.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "",
    }
    argv = [str(python), str(_SCRIPT), str(folder / "job.json")]
    run_worker(
        argv,
        result,
        folder / "compress.log",
        env,
        config.timeout_s,
        QuantizationError,
        on_progress=progress.update,
    )
    check_artifact(artifact)
    done: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    notes = {"format": precision(config), "versions": json.dumps(done["versions"])}
    outputs = {"artifact": output_file(artifact)}
    return Result(outputs, {"calibration": len(rows)}, {"compress_s": done["seconds"]}, notes)


def precision(config: QuantizeConfig) -> str:
    """The artifact's precision, e.g. 'awq-w4a16-g128'."""
    return f"awq-{config.scheme.lower().replace('_', '-')}-g{config.group_size}"


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


def calibration_rows(
    config: QuantizeConfig, student: Path, collected: dict[str, Path]
) -> list[dict[str, Any]]:
    """Token ids of logged requests with their answers; from the training split when calibration is too
    small.
    """
    tokenizer = ChatTokenizer(str(student))
    rows: list[dict[str, Any]] = []
    for split in ("calibration", "train"):
        for sample in each(collected[split]):
            if len(rows) == config.samples:
                return rows
            answer = [] if sample["answer"] is None else tokenizer.answer(sample["answer"])
            ids = tokenizer.prompt(sample["request"], sample["messages"]) + answer
            rows.append({"ids": ids[: config.max_tokens]})
    if not rows:
        raise DataError("There is nothing to calibrate on: collect kept no sample.")
    return rows


def check_shapes(student: Path, config: QuantizeConfig) -> None:
    """Every linear layer's columns must be whole groups, or the packed kernel cannot take them."""
    bad = {}
    for name, (_, shape) in tensors(student).items():
        linear = len(shape) == 2 and name.endswith(".weight") and "embed" not in name
        if linear and not any(part in name for part in config.ignore) and shape[1] % config.group_size:
            bad[name] = shape[1]
    if bad:
        some = ", ".join(f"{n} has {c}" for n, c in list(bad.items())[:3])
        fits = [g for g in (128, 64, 32) if all(c % g == 0 for c in bad.values())]
        fix = (
            f"Set quantize.group_size to {fits[0]}."
            if fits
            else "Choose a student whose widths are multiples of 32."
        )
        raise QuantizationError(
            f"{len(bad)} linear layers of {student.name} have in-features that are no multiple of"
            f" quantize.group_size = {config.group_size} ({some}). {fix}"
        )


def check_artifact(artifact: Path) -> None:
    """A checkpoint that says how it is quantized and holds packed weights."""
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    packed = [n for n in tensors(artifact) if n.endswith("weight_packed")]
    if "quantization_config" not in config or not packed:
        raise QuantizationError(
            f"{artifact} holds no packed weights: llm-compressor quantized nothing. See compress.log."
        )


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name → (dtype, shape), from the safetensors headers (nothing is loaded)."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
        found |= {n: (t["dtype"], t["shape"]) for n, t in header.items() if n != "__metadata__"}
    if not found:
        raise DataError(
            f"{folder} holds no *.safetensors file, so it is not a checkpoint that can be used here."
        )
    return found


def params_of(folder: Path) -> int:
    """Parameters of an unquantized checkpoint; tied matrices are stored, and counted, once."""
    return sum(prod(shape) for _, shape in tensors(folder).values())
