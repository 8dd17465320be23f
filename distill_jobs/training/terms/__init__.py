"""Extra terms of the loss, each a small module from recorded insides to one loss a position.

`Terms` builds those that a configuration names. Knows nothing of the divergence or of where rows come from.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill_jobs.training.method_config import LayerMap, TermsConfig
from distill_jobs.training.recorder import Recorder, Seen
from distill_jobs.training.terms.attention import AttentionMaps
from distill_jobs.training.terms.contrastive import Contrast
from distill_jobs.training.terms.hidden import HiddenStates
from distill_jobs.training.terms.positions import Positions, spread
from distill_jobs.training.terms.relation import Relations

__all__ = ["Positions", "Terms", "recorder_of"]


class Terms(nn.Module):
    """The configured terms between a student and a teacher; its parameters train with the student."""

    def __init__(self, config: TermsConfig, student: Any, teacher: Any) -> None:
        """`student` and `teacher` are the models' configurations (layers, widths)."""
        super().__init__()
        depths = student.num_hidden_layers, teacher.num_hidden_layers
        widths = student.hidden_size, teacher.hidden_size
        last, even = (depths,), spread(*depths)
        self.parts = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        if config.hidden:
            one = config.hidden
            self._add("hidden", one.weight, HiddenStates(one.layers or even, widths, one.distance))
        if config.attention:
            two = config.attention
            self._add("attention", two.weight, AttentionMaps(two.layers or even, two.distance))
        if config.relation:
            three = config.relation
            self._add("relation", three.weight, Relations(three.layers or last, three.kind))
        if config.contrastive:
            four = config.contrastive
            self._add(
                "contrastive",
                four.weight,
                Contrast(four.layers or last, widths, four.temperature, four.negatives),
            )

    def _add(self, name: str, weight: float, part: nn.Module) -> None:
        self.parts[name], self.weights[name] = part, weight

    @property
    def names(self) -> list[str]:
        """The terms' names, in the order of `forward`'s losses."""
        return list(self.parts)

    def needs(self, side: int) -> tuple[set[int], set[int]]:
        """Blocks of the student (0) or teacher (1) whose outputs, and whose heads, must be recorded."""
        hidden: set[int] = set()
        heads: set[int] = set()
        for part in self.parts.values():
            layers: LayerMap = part.layers  # type: ignore[assignment]
            by_heads = isinstance(part, AttentionMaps) or (
                isinstance(part, Relations) and part.kind != "distance"
            )
            (heads if by_heads else hidden).update(pair[side] for pair in layers)
        return hidden, heads

    def forward(self, student: Seen, teacher: Seen, positions: Positions) -> dict[str, Tensor]:
        """Name -> (N,) unweighted losses of the positions."""
        return {name: part(student, teacher, positions) for name, part in self.parts.items()}


def recorder_of(decoder: Any, terms: Terms, side: int) -> Recorder:
    """The recorder of what the terms read of the student (0) or teacher (1)."""
    return Recorder(decoder, *terms.needs(side))
