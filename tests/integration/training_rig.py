"""What the trainer's integration tests share: a tiny checkpoint, and the root of the project."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.unit.test_training_loop import tiny_model

ROOT = Path(__file__).parents[2]


def base_model(folder: Path) -> Path:
    """A tiny checkpoint with a tokenizer, as any Hugging Face folder."""
    tiny_model().save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(40)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
    ).save_pretrained(folder)
    return folder
