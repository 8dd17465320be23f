"""Training rows from parquet to micro-batches: deterministic order by (seed, epoch), sorted by length
against padding.

Rows are right-padded, which a causal model cannot see, so no attention mask is needed. It knows nothing of
losses; the contract of the files is in `Rows`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from contracts.errors import DataError


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. `rows`/`columns` are the positions whose next token counts; the rest follow their
    order."""

    input_ids: Tensor  # (B, S), right-padded
    rows: Tensor  # (N,)
    columns: Tensor  # (N,): the hidden state at (row, column) predicts the label
    labels: Tensor  # (N,)
    in_prompt: Tensor  # (N,) bool
    weights: Tensor  # (N,) float32: the weight of the position's row
    rationale: Tensor  # (N,) bool: the position's row has the task "rationale"
    topk_ids: Tensor | None = None  # (N, k); rows of prompt positions are zeros
    topk_logprobs: Tensor | None = None  # (N, k); log importance weights under the scheme "sampled"
    teacher_hidden: Tensor | None = None  # (N, d): the teacher's last hidden states, scheme "hidden"
    scheme: str = "topk"  # "topk", "sampled" or "hidden": what the teacher's tensors mean

    def model_inputs(self) -> dict[str, Any]:
        """The decoder's keyword arguments."""
        return {"input_ids": self.input_ids}

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {
            name: one.to(device) if isinstance(one, Tensor) else one for name, one in tensors.items()
        }
        return MicroBatch(**moved)


class RowSource(Protocol):
    """Rows that can be trained on, whatever they come from."""

    lengths: np.ndarray  # (rows,) tokens of each row
    prompt_len: np.ndarray  # (rows,) of which prompt
    weights: np.ndarray  # (rows,) float32 sample weights
    rationale: np.ndarray  # (rows,) bool: the row's task is "rationale"

    def micro_batch(self, indices: np.ndarray, with_prompt: bool) -> MicroBatch:
        """The given rows in one forward pass; `with_prompt` counts the prompt's positions, too."""


@dataclass(slots=True)
class _Ragged:
    """A list column as one flat array and offsets."""

    flat: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


def _ragged(table: object, name: str) -> _Ragged:
    column = table.column(name).combine_chunks()  # type: ignore[attr-defined]
    array = column if not hasattr(column, "chunks") else column.chunk(0)
    offsets = array.offsets.to_numpy()
    return _Ragged(array.values.to_numpy(zero_copy_only=False), offsets)


class Rows:
    """All rows of a folder of `part-*.parquet`, in memory.

    Columns: `input_ids` list<int32> (prompt + completion with its end token), `prompt_len` int32, and for
    distillation `topk_ids` list<int32>, `topk_logprobs` list<float16>: k a completion position, row-major.
    """

    def __init__(self, folder: Path, max_length: int, with_teacher: bool) -> None:
        files = sorted(Path(folder).glob("part-*.parquet"))
        if not files:
            raise DataError(f"{folder} holds no part-*.parquet; run the teach stage first.")
        columns = ["input_ids", "prompt_len", *(["topk_ids", "topk_logprobs"] if with_teacher else [])]
        table = pq.read_table(files, columns=columns)
        if not len(table):
            raise DataError(f"{folder} holds no rows.")
        self.input_ids = _ragged(table, "input_ids")
        self.prompt_len = table.column("prompt_len").to_numpy()
        self.lengths = np.diff(self.input_ids.offsets)
        self.topk_ids = _ragged(table, "topk_ids") if with_teacher else None
        self.topk_logprobs = _ragged(table, "topk_logprobs") if with_teacher else None
        self._check(folder, max_length)
        self.k = self._k() if with_teacher else 0
        self.weights = np.ones(len(self.lengths), dtype=np.float32)
        self.rationale = np.zeros(len(self.lengths), dtype=bool)

    def __len__(self) -> int:
        return len(self.lengths)

    def _check(self, folder: Path, max_length: int) -> None:
        if int(self.lengths.max()) > max_length:
            raise DataError(
                f"{folder}: a row has {int(self.lengths.max())} tokens, more than max_length {max_length}."
            )
        if not (self.prompt_len < self.lengths).all() or not (self.prompt_len > 0).all():
            raise DataError(
                f"{folder}: every row needs a prompt and a completion (0 < prompt_len < len(input_ids))."
            )

    def _k(self) -> int:
        assert self.topk_ids is not None
        assert self.topk_logprobs is not None
        answers = self.lengths - self.prompt_len
        sizes = np.diff(self.topk_ids.offsets)
        k = int(sizes[0] // answers[0])
        if not (sizes == k * answers).all() or not (np.diff(self.topk_logprobs.offsets) == sizes).all():
            raise DataError("topk_ids and topk_logprobs must both hold k values for every completion token.")
        return k

    def micro_batch(self, indices: np.ndarray, with_prompt: bool) -> MicroBatch:
        """Pad the given rows into one micro-batch."""
        width = int(self.lengths[indices].max())
        ids = np.zeros((len(indices), width), dtype=np.int64)
        rows, columns, prompt = [], [], []
        for row, index in enumerate(indices):
            tokens = self.input_ids[index]
            ids[row, : len(tokens)] = tokens
            first = 0 if with_prompt else int(self.prompt_len[index]) - 1
            places = np.arange(first, len(tokens) - 1)
            rows.append(np.full(len(places), row))
            columns.append(places)
            prompt.append(places < self.prompt_len[index] - 1)
        row, column, in_prompt = np.concatenate(rows), np.concatenate(columns), np.concatenate(prompt)
        topk = self._topk(indices, in_prompt)
        return MicroBatch(
            torch.from_numpy(ids),
            torch.from_numpy(row),
            torch.from_numpy(column),
            torch.from_numpy(ids[row, column + 1]),
            torch.from_numpy(in_prompt),
            torch.from_numpy(self.weights[indices][row]),
            torch.from_numpy(self.rationale[indices][row]),
            *topk,
        )

    def _topk(self, indices: np.ndarray, in_prompt: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        if self.topk_ids is None or self.topk_logprobs is None:
            return None, None
        ids = np.zeros((len(in_prompt), self.k), dtype=np.int64)
        logprobs = np.zeros((len(in_prompt), self.k), dtype=np.float32)
        ids[~in_prompt] = np.concatenate([self.topk_ids[i] for i in indices]).reshape(-1, self.k)
        logprobs[~in_prompt] = np.concatenate([self.topk_logprobs[i] for i in indices]).reshape(-1, self.k)
        return torch.from_numpy(ids), torch.from_numpy(logprobs)


@dataclass(frozen=True, slots=True)
class Order:
    """Which rows make which step: a pure function of (seed, step), the same for any number of workers."""

    lengths: np.ndarray
    seed: int
    batch_rows: int
    bucket_window: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.lengths) // self.batch_rows)

    def _epoch(self, epoch: int) -> np.ndarray:
        """(steps, batch_rows) row indices of one pass; the rows of `bucket_window` steps are sorted by
        length together."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        size = min(self.batch_rows, len(order))
        order = order[: self.steps_per_epoch * size].reshape(-1, size)
        if self.bucket_window == 1:
            return order
        windows = []
        for start in range(0, len(order), self.bucket_window):
            flat = order[start : start + self.bucket_window].reshape(-1)
            steps = flat[np.argsort(self.lengths[flat], kind="stable")].reshape(-1, size)
            windows.append(rng.permutation(steps))
        return np.concatenate(windows)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, row indices) for first <= step < last; starting in the middle costs nothing."""
        epoch = -1
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                table = self._epoch(epoch)
            yield step, table[step % self.steps_per_epoch]


def split_for_worker(
    indices: np.ndarray, lengths: np.ndarray, rank: int, world: int, budget: int
) -> list[np.ndarray]:
    """The worker's share of a step, as micro-batches of at most `budget` padded tokens (or one row)."""
    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    mine = ordered[rank::world]
    batches: list[np.ndarray] = []
    current: list[int] = []
    for index in mine:
        if current and (len(current) + 1) * int(lengths[index]) > budget:
            batches.append(np.array(current))
            current = []
        current.append(index)
    return [*batches, np.array(current)] if current else batches


def read_manifest(folder: Path) -> dict[str, object]:
    """The `manifest.json` beside the parts, or nothing when there is none."""
    path = Path(folder) / "manifest.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
