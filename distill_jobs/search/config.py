"""What a student search may be told: a budget, a space of shapes and precisions, and how much to train.

Importable without torch; knows nothing about how anything is trained or measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from contracts.config import StrictConfig

Precision = Literal["bf16", "w8a8", "w4a16-g128", "w4a16-g64", "w4a16-g32"]
Sizes = tuple[int, ...]


class BudgetConfig(StrictConfig):
    """What the student may cost. Everything that is given must hold; one thing at least must be given."""

    bytes: int | None = Field(
        default=None, ge=1, description="Largest size of the weights' files, headers and embeddings included."
    )
    memory_bytes: int | None = Field(
        default=None, ge=1, description="Largest size of weights and KV cache together, in bytes."
    )
    kv_tokens: int = Field(
        default=4096, ge=1, description="Tokens whose keys and values count as memory: requests × length."
    )
    tpot_ms: float | None = Field(
        default=None, gt=0, description="Longest time of a token, in milliseconds, with `batch` requests."
    )
    tokens_per_s: float | None = Field(
        default=None, gt=0, description="Least tokens a second of `batch` requests together."
    )

    @property
    def is_latency(self) -> bool:
        """Whether engines must be timed to know what fits."""
        return self.tpot_ms is not None or self.tokens_per_s is not None

    def fits(self, weights: int, memory: int) -> bool:
        """Whether so many bytes are within it."""
        return weights <= (self.bytes or weights) and memory <= (self.memory_bytes or memory)

    def fast_enough(self, step_s: float, batch: int) -> bool:
        """Whether steps of so many seconds, a token for each of `batch` requests, are within it."""
        slow = self.tpot_ms is not None and 1000 * step_s > self.tpot_ms
        return not slow and batch / step_s >= (self.tokens_per_s or 0.0)

    @model_validator(mode="after")
    def _something_is_given(self) -> Self:
        if not (self.bytes or self.memory_bytes or self.is_latency):
            raise ValueError("give bytes, memory_bytes, tpot_ms or tokens_per_s: what may the student cost?")
        return self


class SpaceConfig(StrictConfig):
    """Values of each dimension, all combined; what is left out stays as the teacher has it."""

    layers: Sizes = Field(default=(), description="Decoder blocks.")
    hidden: Sizes = Field(default=(), description="Widths of the residual stream.")
    intermediate: Sizes = Field(default=(), description="Widths of the gated MLP.")
    heads: Sizes = Field(default=(), description="Query heads.")
    kv_heads: Sizes = Field(default=(), description="Key and value heads.")
    precision: tuple[Precision, ...] = Field(
        default=("w8a8", "w4a16-g128", "w4a16-g32"),
        min_length=1,
        description="Formats of the blocks' linear layers; a shape is trained once for all of them.",
    )

    @model_validator(mode="after")
    def _sizes_are_sizes(self) -> Self:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads"):
            if any(one < 1 for one in getattr(self, name)):
                raise ValueError(f"{name}: sizes are at least 1, got {list(getattr(self, name))}")
        return self


class HalvingConfig(StrictConfig):
    """Successive halving (Jamieson and Talwalkar 2016): one bracket of Hyperband (Li et al. 2018)."""

    candidates: int = Field(
        default=27, ge=1, description="Drawn from those that fit the budget; all, where there are fewer."
    )
    rungs: int = Field(default=3, ge=1, description="Times that candidates are compared.")
    eta: int = Field(default=3, ge=2, description="One in so many goes on, with so many times the tokens.")
    tokens: int = Field(
        default=2_000_000, ge=1, description="Training tokens of a student that reaches the last rung."
    )


class SpeedConfig(StrictConfig):
    """How engines are timed."""

    batch: int = Field(default=32, ge=1, description="Requests in flight.")
    answer_tokens: int = Field(default=48, ge=1, description="Tokens of each answer.")
    measure: bool = Field(
        default=True, description="Time those that reach the last rung; a latency budget needs it."
    )


class SearchConfig(StrictConfig):
    """A student search: which student within a budget is the best one for a distillation job."""

    folder: Path = Field(description="Of the search; the same folder goes on where it was.")
    distill: Path = Field(description="The job's YAML: its teacher, its training, its data.")
    rows: Path | None = Field(
        default=None, description="Training rows (the teach stage's train); None: the job's, made if missing."
    )
    held_out: Path | None = Field(
        default=None, description="Rows to compare on (the teach stage's validation); None: the job's."
    )
    budget: BudgetConfig
    space: SpaceConfig = Field(default_factory=SpaceConfig)
    start: Literal["cut", "random"] = Field(
        default="cut", description="cut: every student is cut out of the teacher. random: from scratch."
    )
    halving: HalvingConfig = Field(default_factory=HalvingConfig)
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    importance_rows: int = Field(default=128, ge=1, description="cut: rows that importance is measured on.")
    seed: int = Field(default=0, ge=0, description="Of the draw of candidates, and of random starts.")
    threads: int = Field(default=1, ge=1, description="Threads of training and engine.")

    @model_validator(mode="after")
    def _rows_come_together(self) -> Self:
        if (self.rows is None) != (self.held_out is None):
            raise ValueError("rows and held_out: give both, or neither")
        if self.budget.is_latency and not self.speed.measure:
            raise ValueError("speed.measure: a latency budget cannot be kept without timing; set it to true")
        return self
