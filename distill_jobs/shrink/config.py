"""What a student cut out of a larger checkpoint may be told. Importable without torch; knows nothing of how
importance is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from contracts.config import StrictConfig

DENSE = "zeros are stored and served dense: neither smaller nor faster"
"""What is said wherever a sparse student is shown."""


class SparsifyConfig(StrictConfig):
    """Single weights of the blocks' linear layers set to zero. They are stored and served dense, so nothing
    gets faster or smaller; healing keeps the zeros."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        default="sparsegpt",
        description="magnitude: |w|. wanda: |w| times its input's norm, a row at a time (arXiv 2306.11695)."
        " sparsegpt: optimal brain surgeon, what stays makes up for what goes (arXiv 2301.00774).",
    )
    share: float = Field(default=0.5, gt=0, lt=1, description="Share of the weights that become zero.")
    pattern: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d?:[1-9]\d?$",
        description="N:M, e.g. 2:4: at most N of every M neighbours in a row stay; takes `share`'s place.",
    )
    damping: float = Field(
        default=0.01, gt=0, description="sparsegpt: added to the Hessian's diagonal, times its mean."
    )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """`pattern` as numbers."""
        if self.pattern is None:
            return None
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)

    @property
    def zeros(self) -> float:
        """The share of the weights that becomes zero."""
        return self.share if self.n_of_m is None else 1 - self.n_of_m[0] / self.n_of_m[1]

    @model_validator(mode="after")
    def _pattern_prunes(self) -> SparsifyConfig:
        if self.n_of_m is not None and self.n_of_m[0] >= self.n_of_m[1]:
            raise ValueError(f"pattern: {self.pattern} keeps everything; N must be below M, as in 2:4")
        if self.n_of_m is not None and "share" in self.model_fields_set:
            raise ValueError("share: a pattern decides the share; leave one of the two out")
        return self


class ShrinkConfig(StrictConfig):
    """The checkpoint that training starts from, cut to a smaller shape by what it does on the training rows.
    What is not given stays as it is."""

    layers: int | None = Field(
        default=None, ge=1, description="Blocks that stay: those that change their input most (ShortGPT)."
    )
    hidden: int | None = Field(default=None, ge=8, description="Channels of the residual stream that stay.")
    intermediate: int | None = Field(default=None, ge=8, description="Neurons of each MLP that stay.")
    heads: int | None = Field(default=None, ge=1, description="Query heads of each block that stay.")
    kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="Key and value heads, each the mean of neighbours; must divide the checkpoint's (GQA).",
    )
    sparsify: SparsifyConfig | None = Field(
        default=None, description="Then set single weights to zero (served dense: no speed-up)."
    )
    rows: int = Field(default=128, ge=1, description="Training rows that importance is measured on.")

    @property
    def shape(self) -> dict[str, int]:
        """The sizes that are given."""
        names = ("layers", "hidden", "intermediate", "heads", "kv_heads")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _something_to_cut(self) -> ShrinkConfig:
        if not self.shape and self.sparsify is None:
            raise ValueError("give a size (layers, hidden, intermediate, heads, kv_heads), or sparsify")
        if self.heads is not None and self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} is no multiple of kv_heads {self.kv_heads}")
        return self
