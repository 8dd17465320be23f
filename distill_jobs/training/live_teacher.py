"""Teachers that run beside the student: hidden states and heads for the chunked op, insides for the terms.

A teacher's logits never exist as a whole; they are rebuilt from its hidden states a chunk at a time. Last
hidden states of rows seen before come from memory when nothing of the inside is wanted. Knows nothing of the
student's loss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.errors import ConfigError
from distill_jobs.training.columns import tag_code
from distill_jobs.training.data import MicroBatch
from distill_jobs.training.divergence import HiddenTeacher, MixtureTeacher, Teacher
from distill_jobs.training.heads import check_head
from distill_jobs.training.method_config import LiveTeacherConfig, TeacherModel
from distill_jobs.training.recorder import Recorder, Seen


@dataclass(slots=True)
class Answers:
    """The last hidden states of rows' answers, the latest visited kept."""

    capacity: int
    kept: OrderedDict[int, Tensor] = field(default_factory=OrderedDict)

    def of(self, uids: list[int]) -> list[Tensor | None]:
        """One (answer, d) tensor a row, or None where it is not known."""
        for uid in uids:
            if uid in self.kept:
                self.kept.move_to_end(uid)
        return [self.kept.get(uid) for uid in uids]

    def keep(self, uids: list[int], states: list[Tensor]) -> None:
        """Remember rows; those that were visited longest ago leave."""
        if not self.capacity:
            return
        for uid, one in zip(uids, states, strict=True):
            self.kept[uid] = one.clone()
            self.kept.move_to_end(uid)
        while len(self.kept) > self.capacity:
            self.kept.popitem(last=False)


class LiveTeacher:
    """One teacher, frozen."""

    def __init__(
        self, config: TeacherModel, cache_rows: int, device: torch.device, attention: str | None
    ) -> None:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=getattr(torch, config.dtype)
            )
        except (OSError, ValueError) as err:
            raise ConfigError(f"train.teacher: {config.model!r} cannot be loaded: {err}") from err
        self.model = model.to(device).eval().requires_grad_(False)
        check_head(self.model, f"train.teacher: {config.model!r}")
        if attention is not None:
            self.model.set_attn_implementation(attention)
        self.head: Tensor = self.model.get_output_embeddings().weight
        self.answers = Answers(cache_rows)
        self.recorder: Recorder | None = None

    def last_hidden(
        self, batch_of: Callable[[list[int]], MicroBatch], uids: list[int], inside: bool
    ) -> tuple[Tensor, Seen]:
        """(N, d) of the answers' positions, and the inside if wanted.

        Args:
            batch_of: makes a batch of the rows at these places in `uids`. Those whose answers are not known
                yet are all that the teacher reads, unless its inside is wanted.
            uids: name the rows.
            inside: what the recorder sees is wanted, too.
        """
        known = [None] * len(uids) if inside else self.answers.of(uids)
        unknown = [place for place, one in enumerate(known) if one is None]
        seen = Seen()
        if unknown:
            found, seen = self._read(batch_of(unknown), len(unknown), inside)
            self.answers.keep([uids[place] for place in unknown], found)
            for place, one in zip(unknown, found, strict=True):
                known[place] = one
        return torch.cat([one for one in known if one is not None]), seen

    def _read(self, batch: MicroBatch, rows: int, inside: bool) -> tuple[list[Tensor], Seen]:
        """The last hidden states of each row's answer."""
        counted = ~batch.in_prompt
        with torch.no_grad():
            states, seen = forward(self.model.get_decoder(), batch, self.recorder if inside else None)
        last = states[batch.rows[counted], batch.columns[counted]]
        sizes = torch.bincount(batch.samples[counted], minlength=rows).tolist()
        return list(torch.split(last, sizes)), seen


def forward(decoder: Any, batch: MicroBatch, recorder: Recorder | None) -> tuple[Tensor, Seen]:
    """(B, S, d) last hidden states of a batch, and what the recorder saw on the way."""
    if recorder is None:
        return decoder(**batch.model_inputs(), use_cache=False).last_hidden_state, Seen()
    with recorder.recording(batch.packing) as seen:
        return decoder(**batch.model_inputs(), use_cache=False).last_hidden_state, seen


class LiveTeachers:
    """All teachers of a run, and which of them a row asks."""

    def __init__(self, config: LiveTeacherConfig, device: torch.device, attention: str | None) -> None:
        self.config = config
        self.models = [LiveTeacher(one, config.cache_rows, device, attention) for one in config.models]
        total = sum(one.weight for one in config.models)
        self.weights = [one.weight / total for one in config.models]
        self.places = {one.tag: place for place, one in enumerate(config.models)}

    @property
    def first(self) -> LiveTeacher:
        """The one whose inside the terms read, and that answers for the teacher's share of the prefixes."""
        return self.models[0]

    def routes(self, tags: np.ndarray | None, rows: int) -> np.ndarray:
        """(rows,) which teacher each row asks; zeros when their average answers for all.

        Raises: ConfigError when rows name a teacher that is not there.
        """
        if self.config.combine == "average":
            return np.zeros(rows, dtype=np.int64)
        if tags is None or not tags.any():
            raise ConfigError("train.teacher.combine: route needs a `teacher` column in the training rows.")
        routes = np.full(rows, -1, dtype=np.int64)
        for tag, place in self.places.items():
            routes[tags == tag_code(str(tag))] = place
        if (routes < 0).any():
            known = ", ".join(str(tag) for tag in self.places)
            raise ConfigError(
                f"{int((routes < 0).sum())} rows ask a teacher that train.teacher.models has no tag for; it"
                f" has {known}."
            )
        return routes

    def look(
        self, batch_of: Callable[[list[int]], MicroBatch], uids: list[int], routes: set[int], inside: bool
    ) -> tuple[list[Tensor | None], Seen]:
        """(N, d) last hidden states at the answers' positions for every teacher that is asked, and the first
        one's inside; `batch_of` makes a batch of a part of the rows."""
        wanted = set(range(len(self.models))) if self.config.combine == "average" else routes
        states: list[Tensor | None] = [None] * len(self.models)
        first = Seen()
        for place in sorted(wanted):
            states[place], seen = self.models[place].last_hidden(batch_of, uids, inside and place == 0)
            first = seen if place == 0 else first
        return states, first

    def rows(self, states: list[Tensor | None], route: int, chosen: Any) -> Teacher:
        """What is known of the teacher at the chosen (mask or slice) of the answers' positions."""
        if self.config.combine == "route" or len(self.models) == 1:
            one = states[route]
            assert one is not None
            return HiddenTeacher(one[chosen], self.models[route].head)
        parts = tuple(
            HiddenTeacher(one[chosen], model.head)
            for one, model in zip(states, self.models, strict=True)
            if one is not None
        )
        return MixtureTeacher(parts, tuple(self.weights))
