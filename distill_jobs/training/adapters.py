"""LoRA students through peft: wrapping before training, merged weights or an adapter after it.

Only the adapters' parameters require gradients, so the optimizer's masters are theirs alone. The chunked op
calls the decoder directly, which is right for LoRA (its layers sit inside) and would bypass prompt learning;
that is why nothing but LoRA is offered.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from contracts.model import AdapterBase
from distill_jobs.keys import model_folder
from distill_jobs.training.loop import writing
from distill_jobs.training.method_config import LoraConfig
from distill_jobs.training.models import save_model
from registry.adapter import write_base
from registry.digest import digest_folder


def add_lora(model: Any, config: LoraConfig, base_model: str) -> Any:
    """The model with frozen weights and trainable low-rank adapters; `base_model` goes into the adapter's
    card."""
    import peft

    modules = config.target_modules
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=modules if isinstance(modules, str) else list(modules),
        ),
    )
    wrapped.peft_config["default"].base_model_name_or_path = base_model
    return wrapped


def save_student(
    model: Any,
    tokenizer: str,
    folder: Path,
    lora: LoraConfig | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """The checkpoint that leaves the run: a plain model, or with `export: adapter` the adapter's folder.
    `weights` is the state dict of a model that holds only shards; adapters are never sharded."""
    if lora is None:
        save_model(model, tokenizer, folder, weights)
    elif lora.export == "merged":
        save_model(merged(model), tokenizer, folder)
    else:
        save_adapter(model, tokenizer, folder)


def merged(model: Any) -> Any:
    """A plain model with the adapters' products added to its weights, in fp32; the run's own is untouched."""
    return copy.deepcopy(model).float().merge_and_unload()


def save_adapter(model: Any, tokenizer: str, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in bf16, whole or not at all; beside them the
    base's folder and digest."""
    from peft import get_peft_model_state_dict

    trained = get_peft_model_state_dict(model)
    state = {name: one.detach().to(torch.bfloat16).contiguous() for name, one in trained.items()}
    with writing(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        _say_base(model.peft_config["default"], temporary)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb") as written:
                os.fsync(written.fileno())


def _say_base(config: Any, folder: Path) -> None:
    base = model_folder(str(config.base_model_name_or_path))
    write_base(folder, AdapterBase(ref=str(base), digest=digest_folder(base), rank=int(config.r)))
