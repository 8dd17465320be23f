"""What an upstream costs: tokens at a price, or machines by the hour.

Read from the stack's configuration (`upstreams.<name>.cost`, `students.cost`). Knows nothing about requests.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from contracts.config import StrictConfig


class Price(StrictConfig):
    """Money per million tokens, or per hour of all the upstream's replicas together. One of the two."""

    prompt_per_million: float | None = Field(default=None, ge=0)
    """Money per million prompt tokens."""
    completion_per_million: float | None = Field(default=None, ge=0)
    """Money per million tokens of the answers."""
    per_hour: float | None = Field(default=None, ge=0)
    """Money per hour that the upstream is up, however much it is asked."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")

    @model_validator(mode="after")
    def _one_kind(self) -> Price:
        tokens = (self.prompt_per_million, self.completion_per_million)
        if (tokens != (None, None)) == (self.per_hour is not None):
            raise ValueError("give 'prompt_per_million' and 'completion_per_million', or 'per_hour'")
        if self.per_hour is None and None in tokens:
            raise ValueError("give both 'prompt_per_million' and 'completion_per_million' (0 is a price)")
        return self

    def of_tokens(self, prompt: int, completion: int) -> float:
        """Money for so many tokens. Only for prices by token."""
        assert self.prompt_per_million is not None
        assert self.completion_per_million is not None
        return (prompt * self.prompt_per_million + completion * self.completion_per_million) / 1e6
