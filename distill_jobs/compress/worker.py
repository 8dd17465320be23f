"""Quantizes a checkpoint through llm-compressor. Runs INSIDE the compression environment, whose pins cannot
share vLLM's.

`python -m distill_jobs.compress.worker JOB.json`; imports nothing of this repository but its own folder. The
job: {"model": bf16 checkpoint folder, "out": folder to make, "rows": JSON lines of {"ids"}, "algorithm",
"scheme", "shares", "group_size", "format", "max_tokens", "ignore", "plan": layers by scheme or null,
"result": FILE}. Prints `PROGRESS done total unit`; the folder appears whole (made beside, then renamed), the
result file last.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from distill_jobs.compress.literal import rewrite
from distill_jobs.compress.recipes import modifiers, needs_data

STEPS = 4
# What a server needs beside the weights, taken from the student so that both answer in the same format.
KEPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


def main(job_file: str) -> None:
    """Quantize the job's model."""
    die_with_parent()
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    out = Path(job["out"])
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    started = time.monotonic()
    report(0)
    model = load(job["model"])
    report(1)
    compress(model, job)
    report(2)
    save(model, Path(job["model"]), tmp)
    if job["format"] != "compressed-tensors":
        rewrite(tmp, job["format"])
    report(3)
    if out.exists():
        shutil.rmtree(out)
    tmp.rename(out)
    result = {
        "seconds": time.monotonic() - started,
        "samples": count_lines(job["rows"]),
        "versions": versions(),
    }
    write_atomic(Path(job["result"]), json.dumps(result))
    report(STEPS)


def load(folder: str) -> Any:
    """The student in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def compress(model: Any, job: dict[str, Any]) -> None:
    """Find the quantized weights of every linear layer, on the calibration rows where the algorithm reads
    any.
    """
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        # 0.14.0.1 pins its cache without asking whether there is an accelerator, and dies where there is
        # none.
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    data: dict[str, Any] = {}
    if needs_data(job):
        rows = calibration_rows(job["rows"], job["max_tokens"])
        data = {
            "dataset": rows,
            "max_seq_length": job["max_tokens"],
            "num_calibration_samples": len(rows),
        }
    oneshot(model=model, recipe=modifiers(job), **data)


def calibration_rows(path: str, max_tokens: int) -> Any:
    """The calibration rows as a dataset of token ids (so that no tokenizer is needed, and no network)."""
    from datasets import Dataset

    lines = Path(path).read_text(encoding="utf-8").splitlines()
    ids = [json.loads(line)["ids"][:max_tokens] for line in lines]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]})


def save(model: Any, student: Path, folder: Path) -> None:
    """Weights in the compressed-tensors format, and the student's tokenizer and generation files."""
    model.save_pretrained(folder, save_compressed=True)
    for name in KEPT_FILES:
        if (student / name).is_file():
            shutil.copyfile(student / name, folder / name)


def versions() -> dict[str, str]:
    """What made the artifact."""
    from importlib.metadata import version

    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}


def count_lines(path: str) -> int:
    """Rows of a JSON-lines file."""
    return len(Path(path).read_text(encoding="utf-8").splitlines())


def report(done: int) -> None:
    """Tell the caller how far this is."""
    print(f"PROGRESS {done} {STEPS} steps", flush=True)


def write_atomic(path: Path, text: str) -> None:
    """A reader sees the whole file or none."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


def die_with_parent() -> None:
    """A thread that ends this process's group when its parent is gone (SIGKILL of the pipeline)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
