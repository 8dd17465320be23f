"""What a study may be told. Importable without torch, ray or vllm; knows nothing of how trials are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from contracts.config import StrictConfig

_FIXED = ("workdir", "cache_dir", "ray", "publish", "gates", "collect.log_dir", "train.seed", "train.name")
"""Fields that are no knobs: they decide where a job runs, or the study sets them itself."""


class DataConfig(StrictConfig):
    """The data-size ablation: the job's training rows, cut to nested subsets."""

    shares: tuple[float, ...] = Field(
        default=(0.1, 0.2, 0.4, 0.7, 1.0), description="Shares of the training rows; at least four, with 1.0."
    )
    budget: Literal["epochs", "steps"] = Field(
        default="epochs",
        description="epochs: as many passes over fewer rows, as a job with less data would make. steps: as"
        " many optimizer steps as with all rows, so that only the data differs.",
    )
    worth: float = Field(
        default=0.01,
        gt=0,
        description="The least gain that doubling the data must bring, in the metric's unit.",
    )

    @model_validator(mode="after")
    def _spread(self) -> DataConfig:
        if any(not 0 < s <= 1 for s in self.shares):
            raise ValueError("shares must be above 0 and at most 1")
        if len(set(self.shares)) < 4 or max(self.shares) != 1.0:
            raise ValueError(
                "shares needs at least four different ones, 1.0 among them (a curve of three parts)"
            )
        return self


class StudyConfig(StrictConfig):
    """A study over one distillation job: one knob at a time, and the size of the data."""

    folder: Path = Field(description="Folder of the study: trials, report.md and pictures.")
    distill: Path = Field(description="Configuration file of the job that is studied.")
    set: dict[str, Any] = Field(
        default_factory=dict, description="Dotted fields of the job to override for every trial: its base."
    )
    knobs: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="Dotted field → values to try, the others at the base. Any field of the job, e.g."
        " train.optimizer.lr, train.loss.temperature, collect.near_duplicates, teach.k.",
    )
    data: DataConfig | None = Field(default=None, description="The data-size ablation; None makes none.")
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="Seeds of every setting: the intervals come of them."
    )
    metric: str = Field(
        default="validation.kl",
        description="validation.kl (to the teacher's top k) or validation.ce, nats a token on the validation"
        " rows; with evaluate: true any metric of the evaluate stage, e.g. quantized.accuracy.",
    )
    goal: Literal["min", "max"] | None = Field(
        default=None, description="Which way is better; None knows it for the metrics of this project."
    )
    evaluate: bool = Field(
        default=False,
        description="Run the whole evaluate stage in every trial (minutes each), one at a time.",
    )
    parallel: int | None = Field(
        default=None, ge=1, description="Trials at a time; None: as many as fit this machine's CPUs."
    )
    level: float = Field(default=0.95, gt=0.5, lt=1, description="Coverage of the intervals.")
    keep_models: bool = Field(
        default=False, description="Keep every trial's student; False keeps metrics only."
    )

    @model_validator(mode="after")
    def _something_to_study(self) -> StudyConfig:
        if not self.knobs and self.data is None:
            raise ValueError("nothing to study: give knobs, or data: {}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ")
        for knob, values in self.knobs.items():
            if any(knob == f or knob.startswith(f + ".") for f in _FIXED):
                raise ValueError(f"knobs: {knob} is no knob of a study")
            if not values:
                raise ValueError(f"knobs: {knob} needs at least one value")
        if self.metric.partition(".")[0] != "validation" and not self.evaluate:
            raise ValueError(f"metric {self.metric!r} is measured by the evaluate stage: set evaluate: true")
        if self.metric.startswith("validation.") and self.metric not in ("validation.kl", "validation.ce"):
            raise ValueError(f"metric {self.metric!r}: there are validation.kl and validation.ce")
        return self

    @property
    def minimise(self) -> bool:
        """True when less is better."""
        if self.goal is not None:
            return self.goal == "min"
        lower = (
            "kl",
            "ce",
            "kl_to_teacher",
            "perplexity",
            "bits_per_byte",
            "ece",
            "brier",
            "ttft_s",
            "bytes",
        )
        return self.metric.rpartition(".")[2] in (*lower, "peak_rss_bytes", "gpu_bytes", "params")
