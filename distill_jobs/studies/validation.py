"""The cheap measure of a student: cross entropy and KL on the validation rows, without an engine.

Always the untempered divergence from the cached teacher, whatever the student was trained with, so that
settings of the loss can be compared. Knows nothing about training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from contracts.errors import DataError

if TYPE_CHECKING:
    import torch

_FLOOR = 1e-9
_TOKENS = 4096
"""Padded tokens in one forward pass."""


def validation_losses(student: Path, rows: Path) -> dict[str, float | None]:
    """`validation.ce` and, where the rows hold a top k, `validation.kl`: nats a completion token.

    The KL is over the teacher's top k and one bucket for the rest, as in training. Raises: DataError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    about = json.loads((rows / "manifest.json").read_text(encoding="utf-8"))
    with_teacher = about.get("scheme", "topk") == "topk"
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.inference_mode():
        for batch in _batches(rows, with_teacher):
            logprobs = _logprobs(model, batch)
            for row, own in zip(batch, logprobs, strict=True):
                sums += _row(row, own, with_teacher)
    if not sums[0]:
        raise DataError(f"{rows} holds no validation rows. Raise collect.validation.")
    kl = float(sums[2] / sums[0]) if with_teacher else None
    return {"validation.ce": float(sums[1] / sums[0]), "validation.kl": kl}


def _batches(rows: Path, with_teacher: bool) -> Iterator[list[dict[str, Any]]]:
    """Rows of all parts, shortest first within a part, as many as fit a forward pass."""
    columns = ["input_ids", "prompt_len", *(["topk_ids", "topk_logprobs"] if with_teacher else [])]
    for part in sorted(rows.glob("part-*.parquet")):
        batch: list[dict[str, Any]] = []
        for row in sorted(
            pq.read_table(part, columns=columns).to_pylist(), key=lambda r: len(r["input_ids"])
        ):
            if batch and (len(batch) + 1) * len(row["input_ids"]) > _TOKENS:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def _logprobs(model: Any, batch: list[dict[str, Any]]) -> list[torch.Tensor]:
    """[completion, vocabulary] log-probabilities of each row; right padding changes nothing."""
    import torch

    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    for i, row in enumerate(batch):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    logits = model(input_ids=ids, use_cache=False).logits
    return [
        logits[i, row["prompt_len"] - 1 : len(row["input_ids"]) - 1].log_softmax(-1)
        for i, row in enumerate(batch)
    ]


def _row(row: dict[str, Any], own: torch.Tensor, with_teacher: bool) -> torch.Tensor:
    """[tokens, sum of cross entropies, sum of divergences] of one row."""
    import torch

    labels = torch.tensor(row["input_ids"][row["prompt_len"] :])
    entropy = -own.gather(1, labels[:, None]).sum()
    divergence = torch.zeros(())
    if with_teacher:
        ids = torch.tensor(row["topk_ids"]).reshape(len(labels), -1)
        teacher = torch.tensor(row["topk_logprobs"], dtype=torch.float32).reshape(len(labels), -1)
        listed, mine = teacher.exp(), own.gather(1, ids)
        rest = (1 - listed.sum(1)).clamp(_FLOOR, 1)
        mine_rest = (1 - mine.exp().sum(1)).clamp(_FLOOR, 1)
        divergence = (listed * (teacher - mine)).sum() + (rest * (rest.log() - mine_rest.log())).sum()
    return torch.stack([torch.tensor(float(len(labels))), entropy, divergence]).double()
