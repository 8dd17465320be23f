"""The teacher as a Hugging Face model in this process: what it thinks at every completion position.

Top-k or sampled distributions, or last hidden states; float32 log-softmax, untempered. Knows nothing about
files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.errors import DataError
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.teaching.rows import Row
from distill_jobs.teaching.sampled import draw, uniforms

if TYPE_CHECKING:
    import torch

Scored = dict[str, np.ndarray]
"""Values of one row by column, each (completion, width): topk_ids and topk_logprobs, or hidden."""


class LocalScorer:
    """A causal language model, in `config.dtype`, on the first GPU or on the CPU."""

    def __init__(self, folder: Path, config: TeachConfig, pad: int, salt: str = "") -> None:
        """`salt` (the teacher's digest) lets two teachers of a row draw differently."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(config.threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype))
        self._model = model.to(self._device).eval()
        self._config = config
        self._pad = pad
        self._salt = salt
        if config.scheme == "hidden":
            self._check_head()

    def score(self, rows: Sequence[Row]) -> Iterator[Scored]:
        """What the teacher thinks of every row, in order; rows sorted by length pad little."""
        import torch

        start = 0
        while start < len(rows):
            stop = start + 1
            while (
                stop < len(rows)
                and len(rows[stop].teacher_ids) * (stop - start + 1) <= self._config.batch_tokens
            ):
                stop += 1
            with torch.inference_mode():
                scored = self._batch(rows[start:stop])
            yield from scored
            start = stop

    def head(self) -> torch.Tensor:
        """(V, d) output head, on the CPU."""
        weight: torch.Tensor = self._model.get_output_embeddings().weight.detach().to("cpu").contiguous()
        return weight

    def _check_head(self) -> None:
        from distill_jobs.training.heads import rebuilds_logits

        head = self._model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise DataError(
                "teach.scheme: hidden needs a teacher whose head is one matrix. Use scheme: sampled."
            )
        if not rebuilds_logits(self._model):
            raise DataError(
                "teach.scheme: hidden: this teacher's logits are not its head times its last hidden state"
                " (they are scaled or capped). Use scheme: sampled or topk."
            )

    def _batch(self, rows: Sequence[Row]) -> list[Scored]:
        import torch

        width = max(len(r.teacher_ids) for r in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.teacher_ids)] = torch.from_numpy(row.teacher_ids)
            mask[i, : len(row.teacher_ids)] = 1
        # The prompt's logits are nobody's business: the head runs from the first completion's predecessor on.
        first = min(r.teacher_prompt_len for r in rows) - 1
        inputs = {
            "input_ids": ids.to(self._device),
            "attention_mask": mask.to(self._device),
            "use_cache": False,
        }
        values = self._values(inputs, first, width)
        spans = [slice(r.teacher_prompt_len - 1 - first, len(r.teacher_ids) - 1 - first) for r in rows]
        return [
            self._row(values[i, span], row) for i, (span, row) in enumerate(zip(spans, rows, strict=True))
        ]

    def _values(self, inputs: dict[str, Any], first: int, width: int) -> torch.Tensor:
        """Logits (B, positions, V), or under scheme hidden the states (B, positions, d) before the head."""
        import torch

        if self._config.scheme == "hidden":
            states: torch.Tensor = self._model.base_model(**inputs).last_hidden_state[:, first : width - 1]
            return states
        keep = torch.arange(first, width - 1, device=self._device)
        logits: torch.Tensor = self._model(**inputs, logits_to_keep=keep).logits
        return logits

    def _row(self, values: torch.Tensor, row: Row) -> Scored:
        config = self._config
        if config.scheme == "hidden":
            hidden = values.float().cpu().numpy().astype(np.float16)
            if not np.isfinite(hidden).all():
                raise DataError(
                    "teach.scheme: hidden: a state is outside of float16. Use scheme: sampled or topk."
                )
            return {"hidden": hidden}
        if config.scheme == "sampled":
            uniform = uniforms(self._salt + row.key, config.seed, len(values), config.draws)
            drawn, weights = draw(values, uniform, config.proposal)
            return {"topk_ids": drawn, "topk_logprobs": weights.astype(np.float16)}
        top = values.float().log_softmax(-1).topk(config.k, dim=-1)
        return {
            "topk_ids": top.indices.to("cpu").numpy().astype(np.int32),
            "topk_logprobs": top.values.to("cpu").numpy().astype(np.float16),
        }
