"""The buffer of a student's earlier answers (DistiLLM, arXiv 2402.03898, section 3.2).

The oldest answer leaves first. Its content is part of a run's state, the same on every worker. Knows nothing
of models or steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Written:
    """A row whose answer was generated."""

    uid: int
    """Unique in the run: what the teacher said about it can be kept under this."""
    source: int
    """The dataset's row that the prompt is from."""
    ids: np.ndarray  # prompt and answer
    prompt_len: int


class ReplayBuffer:
    """At most `capacity` rows, first in, first out."""

    def __init__(self, capacity: int) -> None:
        self.rows: deque[Written] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: list[Written]) -> None:
        """Put rows in, in their order; what is too old leaves."""
        self.rows.extend(rows)

    def take(self, count: int, rng: np.random.Generator) -> list[Written]:
        """`count` different rows, or all there are when there are fewer."""
        chosen = rng.choice(len(self.rows), size=min(count, len(self.rows)), replace=False)
        return [self.rows[i] for i in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Flat tensors, which a weights-only checkpoint can hold."""
        return {
            "uid": torch.tensor([r.uid for r in self.rows], dtype=torch.long),
            "source": torch.tensor([r.source for r in self.rows], dtype=torch.long),
            "prompt_len": torch.tensor([r.prompt_len for r in self.rows], dtype=torch.long),
            "lengths": torch.tensor([len(r.ids) for r in self.rows], dtype=torch.long),
            "ids": torch.from_numpy(np.concatenate([r.ids for r in self.rows] or [np.zeros(0, np.int64)])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.rows.clear()
        start = 0
        for uid, source, prompt, length in zip(
            *(state[k].tolist() for k in ("uid", "source", "prompt_len", "lengths")), strict=True
        ):
            ids = state["ids"][start : start + length].numpy().copy()
            self.rows.append(Written(uid, source, ids, prompt))
            start += length
