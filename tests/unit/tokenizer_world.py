"""Tiny tokenizers on disk for tests that need text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer_folder(folder: Path, merges: tuple[tuple[str, str], ...] = (), bos: bool = False) -> Path:
    """A byte-level BPE tokenizer with the given merges; `bos` puts <s> before every text."""
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<end>", "<s>", *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", bos_token="<s>" if bos else None
    )
    tokenizer.save_pretrained(folder)
    return folder
