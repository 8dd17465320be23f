"""Speculative decoding: what an engine is told of it, and the arithmetic of what it gains.

A draft proposes some tokens, the model checks all of them in one pass and keeps a prefix so that its output
distribution does not change (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding", arXiv 2211.17192, algorithm 1). Knows nothing about engines, files or how acceptance was measured.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from contracts.config import StrictConfig

MOST = 16
"""Tokens a draft may propose at once."""


class Speculative(StrictConfig):
    """How an engine drafts: with a small model, or by looking n-grams up in the request's own tokens."""

    method: Literal["draft", "ngram"] = "draft"
    """draft: a smaller model with the same vocabulary. ngram: what followed the last tokens before."""
    draft: str | None = None
    """Of method draft: folder of a checkpoint, file:// URI, Hugging Face id, or `registry:NAME:VERSION` and
    `registry:NAME@ALIAS` of a published student."""
    tokens: int = Field(default=4, ge=1, le=MOST)
    """Tokens proposed at once."""
    sampling: Literal["greedy", "probabilistic"] = "greedy"
    """How the draft chooses: its likeliest token, or a draw of its own distribution, which is accepted more
    often at temperatures near 1. Either leaves the output's distribution as it is."""
    ngram_min: int = Field(default=2, ge=1, le=MOST)
    """Of method ngram: fewest last tokens that must be found again."""
    ngram_max: int = Field(default=4, ge=1, le=MOST)
    """Of method ngram: most last tokens that are looked for."""

    @model_validator(mode="after")
    def _fits(self) -> Speculative:
        if (self.draft is not None) != (self.method == "draft"):
            raise ValueError(
                "draft: name the draft model, or say method: ngram"
                if self.method == "draft"
                else "draft: method ngram has no draft model; leave it out, or say method: draft"
            )
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min: {self.ngram_min} is above ngram_max ({self.ngram_max})")
        return self

    def for_vllm(self) -> dict[str, Any]:
        """vLLM's `--speculative-config`; its sampler for it is algorithm 1 ('standard')."""
        if self.method == "ngram":
            looked = {"prompt_lookup_min": self.ngram_min, "prompt_lookup_max": self.ngram_max}
            return {"method": "ngram", "num_speculative_tokens": self.tokens, **looked}
        return {
            "method": "draft_model",
            "model": self.draft,
            "num_speculative_tokens": self.tokens,
            "draft_sample_method": self.sampling,
        }


def expected_tokens(acceptance: float, tokens: int) -> float:
    """Tokens that one pass of the model yields on average, (1 - α^(γ+1)) / (1 - α): equation 1.

    Args:
        acceptance: α in [0, 1], the probability that a proposed token is kept; independent by assumption.
        tokens: γ, how many are proposed.
    """
    if acceptance >= 1.0:
        return tokens + 1.0
    return float((1 - acceptance ** (tokens + 1)) / (1 - acceptance))


def expected_speed_up(acceptance: float, tokens: int, cost: float) -> float:
    """Times faster than without, (1 - α^(γ+1)) / ((1 - α)(γc + 1)): theorem 3.8.

    It takes a pass over γ+1 tokens to cost what a pass over one does, so it is an upper bound on a busy
    engine. `cost` is c: seconds of the draft's step over seconds of the model's.
    """
    return expected_tokens(acceptance, tokens) / (tokens * cost + 1)


def best_tokens(acceptance: float, cost: float) -> int:
    """The γ with the greatest expected speed-up, 1 … MOST (section 3.5)."""
    return max(range(1, MOST + 1), key=lambda tokens: expected_speed_up(acceptance, tokens, cost))
