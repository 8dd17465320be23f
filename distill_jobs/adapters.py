"""LoRA students where the pipeline expects checkpoints: what takes the place of quantizing them.

An adapter is not quantized; the base that serves it may be. What is published is the adapter's folder saying
that base's digest, and all that is measured of it is measured on that base. Knows nothing about training.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from distill_jobs.keys import model_folder, output_file
from distill_jobs.stage import Result
from distill_jobs.training.loop import writing
from distill_jobs.training.method_config import LoraConfig
from registry.adapter import read_adapter, write_base
from registry.digest import digest_folder

PRECISION = "lora-bf16"


def run(lora: LoraConfig, student: Path, folder: Path) -> Result:
    """The quantize stage of an adapter: `folder/artifact`, for the base that will serve it."""
    said = read_adapter(student)
    if lora.served_base is not None:
        base = model_folder(lora.served_base)
        said = said.model_copy(update={"ref": str(base), "digest": digest_folder(base)})
    artifact = folder / "artifact"
    with writing(artifact) as temporary:
        shutil.copytree(student, temporary, dirs_exist_ok=True)
        write_base(temporary, said)
    notes = {"format": PRECISION, "base": f"served beside {said.ref}, digest {said.digest[:12]}"}
    return Result({"artifact": output_file(artifact)}, notes=notes)
