"""Room for LoRA adapters on an engine: the options, and what vLLM is told. Knows nothing of their files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from contracts.config import StrictConfig


class LoraOptions(StrictConfig):
    """Room for LoRA adapters beside the model; vLLM reserves it at start."""

    max_loras: int = Field(default=8, ge=1)
    """Adapters that one batch may hold; requests of further ones wait for a slot."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Largest rank; memory and time of every adapter are reserved for it."""
    max_cpu_loras: int | None = Field(default=None, ge=1)
    """Adapters kept in memory, at least max_loras (the default); others are read again when asked."""
    target_modules: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Layers that may carry an adapter, by the last part of their name; never lm_head."""

    @model_validator(mode="after")
    def _room_for_a_batch(self) -> LoraOptions:
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras must be at least max_loras ({self.max_loras})")
        return self

    @model_validator(mode="after")
    def _leaves_the_head(self) -> LoraOptions:
        # vLLM 0.29 wraps the head for adapters, and a request for prompt_logprobs that shares a batch then
        # ends the engine: its mapping has a row a request, the prompt a row a token.
        if "lm_head" in self.target_modules:
            raise ValueError("target_modules: lm_head would let one request end the engine; leave it out")
        return self


def lora_arguments(lora: LoraOptions) -> list[str]:
    """vLLM's arguments for this room."""
    sizes = ["--max-loras", str(lora.max_loras), "--max-lora-rank", str(lora.max_lora_rank)]
    sizes += ["--max-cpu-loras", str(lora.max_cpu_loras or lora.max_loras)]
    return ["--enable-lora", *sizes, "--lora-target-modules", *lora.target_modules]
