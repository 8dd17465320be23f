"""Depth-nested students: one model whose depths share the head, and that leaves at the first sure one.

Trained with the sum of all depths' losses, deeper ones counting more (LayerSkip, arXiv 2404.16710, section
4.1.2; BranchyNet, arXiv 1709.01686); a token leaves where the softmax is sure (DeeBERT, arXiv 2004.12993, by
entropy; CALM, arXiv 2207.07061, by the largest probability). Decoding here computes all blocks for the cache
and only takes the token early: it counts the blocks that a token needed, and saves no time. Knows nothing
about what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import MicroBatch
from distill_jobs.training.live_teacher import forward
from distill_jobs.training.step import Counts, DistillStep

Signal = Literal["probability", "entropy"]


@contextmanager
def depths(decoder: Any, exits: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects (B, S, d) states after so many blocks, by depth, while it is open; not yet normed."""
    seen: dict[int, Tensor] = {}

    def keep(depth: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[depth] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [decoder.layers[depth - 1].register_forward_hook(keep(depth)) for depth in exits]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def shares(exits: Sequence[int]) -> list[float]:
    """Weight of each depth's loss: its depth over the sum of all."""
    return [depth / sum(exits) for depth in exits]


class NestedStep(DistillStep):
    """The configured loss at several depths through the shared norm and head; its parts are the deepest's."""

    def __init__(self, model: Any, config: TrainConfig, exits: Sequence[int]) -> None:
        super().__init__(model, config)
        self.exits = tuple(exits)

    def loss(self, batch: MicroBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        decoder = self.model.get_decoder()
        with depths(decoder, self.exits) as seen:
            forward(decoder, batch, None)
        total: Any = 0.0
        parts = torch.zeros(2)
        for depth, share in zip(self.exits, shares(self.exits), strict=True):
            hidden = decoder.norm(seen[depth][batch.rows, batch.columns])
            one, parts = self._prediction(batch, hidden, [], counts)
            total = total + share * one
        return total, parts


def confidence(logits: Tensor, signal: Signal) -> Tensor:
    """(B, V) → (B,) in 0 to 1: the largest probability, or 1 - entropy / ln V."""
    if signal == "probability":
        return logits.float().softmax(-1).amax(-1)
    logprobs = logits.float().log_softmax(-1)
    return 1 + (logprobs.exp() * logprobs).sum(-1) / math.log(logits.shape[-1])


@dataclass
class Exiting:
    """A model that decodes as one that leaves early: for each token, the first of `exits` whose confidence
    is at least `threshold`, else the last. Stands where `prefixes.generate` takes a model."""

    model: Any
    exits: Sequence[int]
    threshold: float
    signal: Signal = "probability"
    used: dict[int, int] = field(default_factory=dict)
    """Tokens by the depth that they left at."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def mean_layers(self) -> float:
        """Blocks a token needed, over all tokens so far."""
        return sum(depth * count for depth, count in self.used.items()) / max(1, sum(self.used.values()))

    def get_decoder(self) -> Any:
        """What `generate` calls for hidden states."""
        return self._states

    def _states(self, **inputs: Any) -> Any:
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings().weight
        with depths(decoder, self.exits) as seen:
            out = decoder(**inputs)
        chosen: Tensor | None = None
        left = torch.zeros(len(out.last_hidden_state), dtype=torch.long)
        for depth in self.exits:
            hidden = decoder.norm(seen[depth][:, -1])
            sure = confidence(hidden @ head.T, self.signal) >= self.threshold
            leaves = (left == 0) & (sure | (depth == self.exits[-1]))
            chosen = hidden if chosen is None else torch.where(leaves[:, None], hidden, chosen)
            left = torch.where(leaves, depth, left)
        for depth in left.tolist():
            self.used[depth] = self.used.get(depth, 0) + 1
        assert chosen is not None
        out.last_hidden_state = chosen[:, None]
        return out
