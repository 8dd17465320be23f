"""Texts of the demo's world as token rows: what the demo's student base was trained on, drawn apart.

Whole texts are scored, requests and notes, after their first tokens: a perplexity of a language, not of a
format. Knows nothing about models but their tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo.base_text import base_pair

CALIBRATION, SCORED = 2_000_000, 3_000_000
"""First texts; the student base was trained on lower ones."""
_GIVEN = 8
"""Tokens that are not scored. One alone, as a prompt, ended vLLM's worker with SIGILL on a CPU with AMX."""


def token_rows(model: Path, first: int, count: int) -> list[list[int]]:
    """Token ids of whole texts, as the student base was trained on them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    pairs = [base_pair(number) for number in range(first, first + count)]
    return [[user, *tokenizer(q)["input_ids"], assistant, *tokenizer(a)["input_ids"], end] for q, a in pairs]


def scored_rows(model: Path, count: int) -> list[dict[str, Any]]:
    """Rows {"id", "ids", "completion"}: everything after the first few tokens is scored."""
    rows = token_rows(model, SCORED, count)
    return [{"id": i, "ids": ids[:_GIVEN], "completion": ids[_GIVEN:]} for i, ids in enumerate(rows)]


def calibration_rows(model: Path, count: int) -> list[dict[str, Any]]:
    """Rows {"ids"}."""
    return [{"ids": ids} for ids in token_rows(model, CALIBRATION, count)]
