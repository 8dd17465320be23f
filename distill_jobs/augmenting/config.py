"""What the augment stage may be told. Off by default: a section that is not given does nothing.

Importable without torch or vllm. Knows nothing about how the teacher is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from contracts.config import StrictConfig
from distill_jobs.teaching.config import EndpointConfig


class ParaphraseConfig(StrictConfig):
    """Requests said otherwise: paraphrase.txt."""

    per_sample: int = Field(default=1, ge=1, le=20, description="Paraphrases asked for of each sample.")
    samples: int | None = Field(default=None, ge=1, description="Samples to paraphrase; None takes all.")
    keep_answer: bool = Field(
        default=False, description="Give them the sample's answer; off: the teacher answers them afresh."
    )


class ExpandConfig(StrictConfig):
    """New requests in the style of the samples: expand.txt."""

    requests: int = Field(default=100, ge=1, description="New requests asked for in all.")
    shown: int = Field(default=5, ge=1, le=50, description="Samples shown at a time.")
    each: int = Field(default=5, ge=1, le=50, description="New requests asked for at a time.")


class HardNegativesConfig(StrictConfig):
    """Requests close to the border of two classes: hard_negatives.txt, shown the most alike of both."""

    requests: int = Field(default=100, ge=1, description="New requests asked for in all.")
    each: int = Field(default=3, ge=1, le=50, description="New requests asked for at a time.")
    label: str | None = Field(
        default=None,
        description='"module:function" called with (request, answer) that returns the class or None; without'
        " one"
        " the normalised answer is the class.",
    )


class RationaleConfig(StrictConfig):
    """The steps behind answers, as rows of a second task (Distilling step-by-step, arXiv 2305.02301)."""

    samples: int | None = Field(default=None, ge=1, description="Samples to ask steps for; None takes all.")
    marker: str = Field(
        default="Answer:",
        min_length=1,
        description="The teacher's final answer follows its last line with this.",
    )
    with_answer: bool = Field(
        default=True,
        description="The student's rationale ends with the final answer, as the teacher wrote it. Off: the"
        " steps"
        " alone, as in the paper; the teacher then would not have stopped where the student learns to.",
    )
    agree: str | None = Field(
        default=None,
        description='"module:function" called with (request, logged answer, stated answer) that returns'
        " whether"
        " they agree; without one, normalised text (JSON by value) has to be equal.",
    )


class AugmentConfig(StrictConfig):
    """Samples that the teacher adds to the training set; validation, calibration and held-out stay as they
    are.
    """

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"window"})

    paraphrase: ParaphraseConfig | None = Field(default=None, description="Requests said otherwise.")
    expand: ExpandConfig | None = Field(default=None, description="New requests in the style of the samples.")
    hard_negatives: HardNegativesConfig | None = Field(
        default=None, description="Requests near a class's border."
    )
    rationale: RationaleConfig | None = Field(default=None, description="The steps behind answers.")
    endpoint: EndpointConfig | None = Field(
        default=None, description="Chat API that writes; None: the job's teacher in an offline engine."
    )
    prompts: Path | None = Field(
        default=None, description="Folder of your own prompt files; those it lacks are the built-in ones."
    )
    temperature: float = Field(default=0.8, gt=0, description="Of variants; rationales are greedy.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Nucleus of the sampling.")
    answer_tokens: int = Field(default=512, ge=16, description="Longest reply of the teacher, in tokens.")
    max_new: int | None = Field(default=None, ge=1, description="New samples kept at most (by digest).")
    near_duplicates: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Similarity (Jaccard, 5-grams) from which a new request counts as one that is there;"
        " None: equal.",
    )
    weight: float = Field(
        default=1.0, gt=0, description="Weight of a new sample in training; a logged one has 1."
    )
    seed: int = Field(default=0, ge=0, description="Of the choice of samples.")
    window: int = Field(
        default=20_000,
        ge=1,
        description="Samples in memory at a time, whatever the collection's size; what is written does not"
        " depend on it.",
    )

    @model_validator(mode="after")
    def _does_something(self) -> AugmentConfig:
        if not (self.paraphrase or self.expand or self.hard_negatives or self.rationale):
            raise ValueError("give at least one of paraphrase, expand, hard_negatives, rationale")
        return self
