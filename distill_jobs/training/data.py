"""Training rows as micro-batches: padded, or packed into one sequence.

Padding is on the right, where a causal model cannot see it; packed rows start again at position 0 and the
attention keeps them apart (`attention`). It knows nothing of losses, of the order of rows or of their files
(`order`, `columns`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from contracts.errors import DataError
from distill_jobs.training.columns import open_columns

TOKENS, POSITIONS = 64, 16
"""Packed sequences, and the rows of their layout, are filled up to multiples of these: oneDNN compiles, and
keeps, a kernel for every shape it meets. In bf16 on a CPU that cost 15 % of the time and a third of the
memory of passes of 1024 tokens."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of a packed sequence are when its rows are padded: what keeps attention in its row.

    What fills the sequence up comes behind the rows' ends, where a causal row does not see it.
    """

    places: Tensor  # (S,): row * longest + position
    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. `rows`/`columns` are the positions whose next token counts; all that is (N, ...)
    follows their order, rows one after the other."""

    input_ids: Tensor  # (B, S), right-padded; (1, S) when packed
    rows: Tensor  # (N,)
    columns: Tensor  # (N,): the hidden state at (row, column) predicts the label
    labels: Tensor  # (N,)
    in_prompt: Tensor  # (N,) bool
    samples: Tensor  # (N,): which of the micro-batch's rows of data; equal to `rows` unless packed
    weights: Tensor  # (N,) float32: the weight of the position's row
    rationale: Tensor  # (N,) bool: the position's row has the task "rationale"
    indices: Tensor  # (rows of data,): their indices in the source that made the batch
    topk_ids: Tensor | None = None  # (N, k); rows of prompt positions are zeros
    topk_logprobs: Tensor | None = None  # (N, k); log importance weights under the scheme "sampled"
    teacher_hidden: Tensor | None = None  # (N, d): the teacher's last hidden states, scheme "hidden"
    scheme: str = ""  # "topk", "sampled" or "hidden": what the teacher's tensors mean; "" without a teacher
    position_ids: Tensor | None = None  # (1, S) when packed: starts again at 0 with every row
    packing: Packing | None = None

    def model_inputs(self) -> dict[str, Any]:
        """The decoder's keyword arguments."""
        if self.packing is None:
            return {"input_ids": self.input_ids}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "packing": self.packing}

    def to(self, device: torch.device) -> MicroBatch:
        """On another device; itself where it is there already."""
        if self.input_ids.device == device:
            return self
        moved: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            one = getattr(self, name)
            moved[name] = one.to(device, non_blocking=True) if isinstance(one, Tensor) else one
        if self.packing is not None:
            moved["packing"] = Packing(
                self.packing.places.to(device), self.packing.rows, self.packing.longest
            )
        return MicroBatch(**moved)


class RowSource(Protocol):
    """Rows that can be trained on, whatever they come from."""

    lengths: np.ndarray  # (rows,) tokens of each row
    prompt_len: np.ndarray  # (rows,) of which prompt
    weights: np.ndarray  # (rows,) float32 sample weights
    rationale: np.ndarray  # (rows,) bool: the row's task is "rationale"

    def micro_batch(self, indices: np.ndarray, with_prompt: bool, packed: bool = False) -> MicroBatch:
        """The given rows in one forward pass; `with_prompt` counts the prompt's positions, too."""


def ragged_arange(sizes: np.ndarray) -> np.ndarray:
    """0..n-1 for every n, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes)


class Rows:
    """All rows of a folder of `part-*.parquet`, memory-mapped.

    Columns: `input_ids` list<int32> (prompt + completion with its end token), `prompt_len` int32; optional
    `weight` float32, `task` string ("answer" or "rationale"), `difficulty` float32 and `teacher` string (the
    tag of the live teacher that answers for the row). For distillation, by `scheme` in manifest.json: "topk"
    and "sampled" read `topk_ids` list<int32> and `topk_logprobs` list<float16>, k a completion position,
    row-major; "hidden" reads `hidden` list<float16>, d a completion position, and the teacher's head from
    `head.safetensors`.

    Raises: DataError when the folder holds no rows or malformed ones.
    """

    def __init__(self, folder: Path, max_length: int, with_teacher: bool) -> None:
        self.folder = Path(folder)
        columns = open_columns(self.folder, max_length, with_teacher)
        arrays = columns.arrays
        self.lengths = np.array(arrays["lengths"], dtype=np.int64)
        self.prompt_len = np.array(arrays["prompt_len"], dtype=np.int64)
        self.weights = np.array(arrays["weight"])
        self.rationale = np.array(arrays["rationale"])
        self.difficulty = np.array(arrays["difficulty"])
        self.teacher_tags = np.array(arrays["teacher"])
        self.flat_ids = arrays["input_ids"]
        self._lay_out()
        self.scheme, self.k, self.largest_id = columns.scheme, columns.width, columns.largest_id
        self.teacher = {
            name: arrays[name].reshape(-1, self.k)
            for name in ("topk_ids", "topk_logprobs", "hidden")
            if name in arrays
        }

    def _lay_out(self) -> None:
        """Where each row begins in the flat columns."""
        self.starts = np.cumsum(self.lengths) - self.lengths
        answers = self.lengths - self.prompt_len
        self.answer_starts = np.cumsum(answers) - answers

    @classmethod
    def of(
        cls, ids: Sequence[np.ndarray], prompt_len: np.ndarray, weights: np.ndarray, rationale: np.ndarray
    ) -> Rows:
        """Rows from memory, without a cached teacher: answers that were generated just now."""
        rows = cls.__new__(cls)
        rows.folder, rows.scheme, rows.k, rows.teacher = Path(), "", 0, {}
        rows.lengths = np.array([len(one) for one in ids], dtype=np.int64)
        rows.prompt_len, rows.weights, rows.rationale = prompt_len.astype(np.int64), weights, rationale
        rows.difficulty = np.zeros(len(ids), dtype=np.float32)
        rows.teacher_tags = np.zeros(len(ids), dtype=np.uint32)
        rows.flat_ids = np.concatenate(ids).astype(np.int32)
        rows.largest_id = int(rows.flat_ids.max())
        rows._lay_out()
        return rows

    def with_prefix(self, which: np.ndarray, ids: np.ndarray) -> Rows:
        """The rows with `ids` before the prompts of those that `which` (rows,) marks."""
        rows = copy.copy(self)
        longer = np.where(which, len(ids), 0)
        rows.lengths, rows.prompt_len = self.lengths + longer, self.prompt_len + longer
        places = np.repeat(self.starts[which], len(ids))
        rows.flat_ids = np.insert(self.flat_ids, places, np.tile(ids, int(which.sum())))
        rows._lay_out()
        return rows

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """The token ids of one row."""
        return self.flat_ids[self.starts[index] : self.starts[index] + self.lengths[index]]

    @cached_property
    def head(self) -> Tensor:
        """(V, d) output head of the teacher whose hidden states the rows hold.

        Raises: DataError when `head.safetensors` is missing or of another width.
        """
        from safetensors.torch import load_file

        path = self.folder / "head.safetensors"
        if not path.exists():
            raise DataError(f"{path} is missing; rows of the scheme hidden need the teacher's head.")
        tensors = list(load_file(path).values())
        if len(tensors) != 1 or tensors[0].ndim != 2 or tensors[0].shape[1] != self.k:
            raise DataError(f"{path} must hold one matrix of width {self.k}, the teacher's output head.")
        return tensors[0]

    def micro_batch(self, indices: np.ndarray, with_prompt: bool, packed: bool = False) -> MicroBatch:
        """Pad the given rows into one micro-batch, or pack them into one sequence."""
        lengths, prompts = self.lengths[indices], self.prompt_len[indices]
        sample, place = np.repeat(np.arange(len(indices)), lengths), ragged_arange(lengths)
        flat = self.flat_ids[self.starts[indices][sample] + place].astype(np.int64)
        counted = place < lengths[sample] - 1
        if not with_prompt:
            counted &= place >= prompts[sample] - 1
        at = np.flatnonzero(counted)
        in_prompt = place[at] < prompts[sample[at]] - 1
        rows, columns = (np.zeros_like(at), at) if packed else (sample[at], place[at])
        shape = (
            _packed(flat, sample, place, lengths)
            if packed
            else {"input_ids": _padded(flat, sample, place, len(indices))}
        )
        return MicroBatch(
            **shape,
            rows=torch.from_numpy(rows),
            columns=torch.from_numpy(columns),
            labels=torch.from_numpy(flat[at + 1]),
            in_prompt=torch.from_numpy(in_prompt),
            samples=torch.from_numpy(sample[at]),
            weights=torch.from_numpy(self.weights[indices][sample[at]]),
            rationale=torch.from_numpy(self.rationale[indices][sample[at]]),
            indices=torch.from_numpy(np.array(indices, dtype=np.int64)),
            scheme=self.scheme,
            **self._teacher(indices, lengths - prompts, in_prompt),
        )

    def _teacher(self, indices: np.ndarray, answers: np.ndarray, in_prompt: np.ndarray) -> dict[str, Tensor]:
        """The teacher's columns at the counted positions; zeros in the prompt, of which it says nothing."""
        source = np.repeat(self.answer_starts[indices], answers) + ragged_arange(answers)
        found: dict[str, Tensor] = {}
        for name, column in self.teacher.items():
            values = np.zeros((len(in_prompt), self.k), dtype=np.int64 if name == "topk_ids" else np.float32)
            values[~in_prompt] = column[source]
            field = "teacher_hidden" if name == "hidden" else name
            found[field] = torch.from_numpy(values)
        return found


def _padded(flat: np.ndarray, sample: np.ndarray, place: np.ndarray, rows: int) -> Tensor:
    ids = np.zeros((rows, int(place.max()) + 1), dtype=np.int64)
    ids[sample, place] = flat
    return torch.from_numpy(ids)


def _packed(flat: np.ndarray, sample: np.ndarray, place: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """The sequence of the rows, filled up to a shape that others share, and its layout."""
    rows, longest = len(lengths), _up(int(lengths.max()), POSITIONS)
    more = min(_up(len(flat), TOKENS), rows * longest) - len(flat)
    room = longest - lengths
    filling = np.clip(more - (np.cumsum(room) - room), 0, room)
    behind = np.repeat(np.arange(rows) * longest + lengths, filling) + ragged_arange(filling)
    nothing = np.zeros(more, np.int64)
    few = 1 << max(0, rows.bit_length() - 3)  # at most a quarter of the layout is rows of nothing
    return {
        "input_ids": torch.from_numpy(np.concatenate([flat, nothing])[None]),
        "position_ids": torch.from_numpy(np.concatenate([place, nothing])[None]),
        "packing": Packing(
            torch.from_numpy(np.concatenate([sample * longest + place, behind])), _up(rows, few), longest
        ),
    }


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
