"""Adapters that differ: random ones of a base, written as a training run exports them.

Their answers are noise; memory and speed do not depend on what weights say. Knows nothing about engines.
"""

from __future__ import annotations

from pathlib import Path

from distill_jobs.training.method_config import LoraConfig

RANK = 8
SCALE = 0.05
"""Standard deviation of B's elements, which peft starts at zero."""


def make_adapter(base: Path, folder: Path, seed: int) -> Path:
    """Write an adapter of rank 8 on all linear layers that changes what the base says."""
    import torch
    from transformers import AutoModelForCausalLM

    from distill_jobs.training.adapters import add_lora, save_student

    torch.manual_seed(seed)
    lora = LoraConfig(r=RANK, alpha=2 * RANK, export="adapter")
    model = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora, str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, SCALE)
    save_student(model, str(base), folder, lora)
    return folder
