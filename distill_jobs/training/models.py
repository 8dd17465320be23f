"""Making, loading and saving Hugging Face models for training. Knows nothing of losses or data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from distill_jobs.training.config import ShapeConfig
from distill_jobs.training.heads import check_head
from distill_jobs.training.loop import writing


def from_shape(shape: ShapeConfig, seed: int) -> Any:
    """A freshly initialised Qwen3 model of the given shape."""
    tokenizer = AutoTokenizer.from_pretrained(shape.tokenizer)
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_model(base_model: str, shape: ShapeConfig | None, seed: int) -> Any:
    """The model to train, in fp32: from scratch when a shape is given, else any Hugging Face causal LM."""
    if shape is not None:
        return from_shape(shape, seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    check_head(model, base_model)
    return model


def save_model(model: Any, tokenizer: str, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a plain HF checkpoint (bf16 safetensors and tokenizer) that appears whole or not at all.

    `weights` is the model's state dict where the model itself holds only shards.
    """
    weights = model.state_dict() if weights is None else weights
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in weights.items()}
    for tied in getattr(model, "_tied_weights_keys", None) or ():
        if getattr(model.config, "tie_word_embeddings", False):
            state.pop(tied, None)
    with writing(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
        _declare_bf16(temporary / "config.json")
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
            with file.open("rb") as written:
                os.fsync(written.fileno())


def _declare_bf16(path: Path) -> None:
    """transformers writes the dtype of the model in memory, not that of the saved weights."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")
