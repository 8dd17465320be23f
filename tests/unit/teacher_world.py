"""Tiny live teachers, and a student and rows to go with them; shared by the tests of what runs in a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_jobs.training.attention import register

VOCAB, STOP = 40, 1


def model(seed: int, layers: int = 2, width: int = 16, heads: int = 2, tied: bool = True) -> Qwen3ForCausalLM:
    """A model of a few thousand parameters with our attention, the same for the same arguments."""
    torch.manual_seed(seed)
    made = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=32,
            num_attention_heads=heads,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            eos_token_id=STOP,
            initializer_range=0.3,
        )
    )
    made.set_attn_implementation(register())
    return made


def teacher_folder(folder: Path, seed: int = 5, layers: int = 3, width: int = 24) -> Path:
    """A teacher on disk, deeper and wider than the student, in fp32."""
    model(seed, layers, width, heads=3).save_pretrained(folder)
    return folder


def rows_folder(folder: Path, count: int = 16, seed: int = 3, **columns: object) -> Path:
    """Rows without a cached teacher, of 5 to 16 tokens."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = rng.integers(5, 17, count)
    table = {
        "input_ids": pa.array([rng.integers(2, VOCAB, n).tolist() for n in lengths], pa.list_(pa.int32())),
        "prompt_len": pa.array([int(rng.integers(2, n - 1)) for n in lengths], pa.int32()),
        **columns,
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    return folder
