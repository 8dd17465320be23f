"""A teacher with another tokenizer: the same text in its tokens, aligned by bytes, compared by ULD.

The teacher reads the prompt as the student's template renders it. Knows nothing of steps; gives one distance
for the answers of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_jobs.training.cross_tokenizer.alignment import Group, align
from distill_jobs.training.cross_tokenizer.spelling import Spelling
from distill_jobs.training.cross_tokenizer.uld import (
    chunked,
    continuation,
    distance,
    profile,
    token_logprobs,
)
from distill_jobs.training.data import MicroBatch, Rows
from distill_jobs.training.live_teacher import LiveTeacher
from distill_jobs.training.method_config import CrossTokenizerConfig


@dataclass(frozen=True, slots=True)
class Twin:
    """A row in the teacher's tokens; groups count from the answers' first tokens."""

    ids: np.ndarray
    prompt_len: int
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class Side:
    """One model's answers of a micro-batch, row after row."""

    hidden: Tensor  # (N, d): the state that predicts each token
    head: Tensor  # (V, d)
    labels: Tensor  # (N,)
    groups: Tensor  # (N,): which group each token is of
    first: Tensor  # (N,) bool: the first of its group


class CrossTokenizer:
    """The distance between a student's and a teacher's answers."""

    def __init__(
        self, config: CrossTokenizerConfig, student: Any, teacher: Any, model: LiveTeacher, capacity: int
    ) -> None:
        """`student` and `teacher` are tokenizers."""
        self.config, self.model, self.capacity = config, model, capacity
        self.student, self.teacher = Spelling(student), Spelling(teacher)
        self._twins: dict[int, Twin] = {}

    def twin(self, ids: list[int], prompt_len: int) -> Twin:
        """A row of the student's tokens as the teacher reads it."""
        answer = ids[prompt_len:]
        ended = bool(answer) and answer[-1] == self.student.end
        mine = [self.student.bytes_of(one) for one in (answer[:-1] if ended else answer)]
        prompt = self.teacher.ids(self.student.text(ids[:prompt_len]), start=True)
        its_ids = self.teacher.ids(b"".join(mine).decode("utf-8", errors="replace"), start=False)
        its = [self.teacher.bytes_of(one) for one in its_ids]
        # An answer cut within a character, or one that the teacher's tokenizer normalises, has no twin.
        groups = align(mine, its) if b"".join(mine) == b"".join(its) else []
        if ended:
            groups.append(Group((len(mine), len(mine) + 1), (len(its_ids), len(its_ids) + 1)))
            its_ids = [*its_ids, self.teacher.end]
        return Twin(np.asarray([*prompt, *its_ids]), len(prompt), groups)

    def _twin(self, uid: int, rows: Rows, index: int) -> Twin:
        if uid not in self._twins:
            if len(self._twins) >= max(self.capacity, 1):
                self._twins.clear()
            self._twins[uid] = self.twin(rows.tokens(index).tolist(), int(rows.prompt_len[index]))
        return self._twins[uid]

    def loss(
        self, rows: Rows, indices: np.ndarray, uids: list[int], hidden: Tensor, head: Tensor, scale: Tensor
    ) -> Tensor:
        """Sum over groups of scale * ULD. `hidden` (N, d) and `scale` (N,) are of the answers' tokens of the
        rows `indices`, one row after the other; a group weighs as its student's tokens do."""
        twins = [self._twin(uid, rows, int(i)) for uid, i in zip(uids, indices, strict=True)]
        device = hidden.device
        answers = (rows.lengths - rows.prompt_len)[indices].tolist()
        labels = np.concatenate([rows.tokens(int(i))[int(rows.prompt_len[i]) :] for i in indices])
        mine = _side(hidden, head, labels, [[g.student for g in t.groups] for t in twins], answers)
        its = self._teacher_side(twins, uids, device)
        count = sum(len(t.groups) for t in twins)
        if count == 0:
            return hidden.sum() * 0
        weights = scale.float()[mine.groups >= 0]
        group_weights = scale.new_zeros(count, dtype=torch.float32).index_add(
            0, mine.groups[mine.groups >= 0], weights
        )
        with torch.no_grad():
            target = self._starts(its, count)
        return (self._distances(mine.head, self._starts(mine, count), its.head, target) * group_weights).sum()

    def _starts(self, side: Side, count: int) -> tuple[Tensor, Tensor]:
        """(G, d) states at the groups' first tokens, and (G,) probabilities of their further ones."""
        inside = side.groups >= 0
        hidden, labels, groups, first = (
            one[inside] for one in (side.hidden, side.labels, side.groups, side.first)
        )

        def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
            return token_logprobs(states, side.head, tokens, self.config.temperature)

        given = continuation(chunked(logprobs, len(hidden), hidden, labels), groups, first, count)
        return hidden[first], given

    def _distances(
        self, head: Tensor, mine: tuple[Tensor, Tensor], its_head: Tensor, its: tuple[Tensor, Tensor]
    ) -> Tensor:
        """(G,) distances; both sides' probabilities exist for a chunk of groups at a time."""
        t, top = self.config.temperature, self.config.top

        def gaps(states: Tensor, given: Tensor, its_states: Tensor, its_given: Tensor) -> Tensor:
            student = profile(states, head, t, top) * given[:, None]
            with torch.no_grad():
                teacher = profile(its_states, its_head, t, top) * its_given[:, None]
            return distance(student, teacher)

        return chunked(gaps, len(mine[0]), *mine, *its)

    def _teacher_side(self, twins: list[Twin], uids: list[int], device: torch.device) -> Side:
        ones = np.ones(len(twins), np.float32)
        prompts = np.array([t.prompt_len for t in twins])
        rows = Rows.of([t.ids for t in twins], prompts, ones, np.zeros(len(twins), bool))

        def batch_of(places: list[int]) -> MicroBatch:
            return rows.micro_batch(np.array(places), False).to(device)

        states, _ = self.model.last_hidden(batch_of, uids, False)
        answers = (rows.lengths - rows.prompt_len).tolist()
        labels = np.concatenate([t.ids[t.prompt_len :] for t in twins])
        return _side(states, self.model.head, labels, [[g.teacher for g in t.groups] for t in twins], answers)


def _side(
    hidden: Tensor, head: Tensor, labels: np.ndarray, runs: list[list[tuple[int, int]]], answers: list[int]
) -> Side:
    """Groups numbered over all rows; tokens outside any group get -1."""
    groups, first = np.full(len(labels), -1, np.int64), np.zeros(len(labels), bool)
    number = start = 0
    for of_row, length in zip(runs, answers, strict=True):
        for begin, end in of_row:
            groups[start + begin : start + end] = number
            first[start + begin] = True
            number += 1
        start += length
    tensors = (torch.from_numpy(one).to(hidden.device) for one in (labels.astype(np.int64), groups, first))
    return Side(hidden, head, *tensors)
