"""What a distillation job may be told, one section a stage. Importable without torch, ray or vllm.

Fields named in a section's OPERATIONAL change how the work is done, never its result, so they are no part of
the stage's key: lowering a batch size after running out of memory repeats nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from contracts.config import StrictConfig
from contracts.gates import Gate
from distill_jobs.augmenting.config import AugmentConfig
from distill_jobs.collecting.settings import (
    BalanceConfig,
    DifficultyConfig,
    PruneConfig,
    RankConfig,
    RedactConfig,
    RulesConfig,
    SourceConfig,
)
from distill_jobs.collecting.window import place
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.tracking.config import TrackingConfig
from distill_jobs.training.config import TrainConfig


class Section(StrictConfig):
    """One stage's configuration."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset()


class CollectConfig(Section):
    """Which logged requests become samples."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"executor", "log_dir"})

    log_dir: Annotated[
        Path | str | None, BeforeValidator(lambda v: place(v) if isinstance(v, str) else v)
    ] = None
    """Folder of request-log segments (*.jsonl, and *.open.jsonl that is still being written), or the fsspec
    URL that routers upload them to, e.g. s3://bucket/prefix; None where only `sources` are read."""
    sources: tuple[SourceConfig, ...] = ()
    """Files of requests, with or without answers, beside the log."""
    licence: str = "own traffic"
    """Licence of the logged rows, for the card."""
    executor: Literal["ray", "local"] = "ray"
    """ray: every step is mapped by Ray Data, on the running cluster if there is one. local: in this process.
    """
    seed: int = 0
    """Draws which samples of a class are dropped or repeated. Everything else goes by digest."""
    redact: RedactConfig | None = None
    """Take personal data out of requests and answers; None: texts are taken as they were logged."""
    rules: RulesConfig = Field(default_factory=RulesConfig)
    rank: RankConfig | None = None
    """Keep the best by a grader's or judge's score; None ranks nothing."""
    prune: PruneConfig | None = None
    """Take constant prompt text out of the students' inputs (column `student_messages`)."""
    balance: BalanceConfig | None = None
    """Bring classes to a target distribution (column `class`)."""
    difficulty: DifficultyConfig | None = None
    """Measure difficulty (columns `difficulty` and `bin`)."""
    route: str | None = None
    """Only requests to this route; None takes all."""
    upstreams: tuple[str, ...] = ()
    """Names of the upstreams whose answers are the teacher's; empty means every upstream."""
    other_answers: Literal["drop", "relabel"] = "drop"
    """Requests that another upstream answered: drop them, or have the teacher answer them offline."""
    since: float | None = None
    """Unix seconds; older rows are left out."""
    until: float | None = None
    """Unix seconds; rows at or after it are left out."""
    require_json: bool = False
    """Keep only answers that parse as JSON."""
    drop_failed_grades: bool = False
    """Drop answers that an online grader scored 0. Off: the student learns the teacher, mistakes too."""
    corrections: bool = True
    """A correction that a user sent as feedback takes the place of the logged answer. Turn it off where
    anybody may send feedback: the student learns what is written there."""
    drop_bad_feedback: bool = True
    """Drop answers that a user called bad without correcting them."""
    max_chars: int = Field(default=32_000, ge=1)
    """Longest request plus answer, in characters."""
    max_rows: int | None = Field(default=None, ge=1)
    """Keep at most so many samples (a deterministic choice, by digest; clusters stay whole)."""
    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of character 5-grams from which two requests are near-duplicates; None keeps all."""
    keep_per_cluster: int = Field(default=1, ge=1)
    """Samples kept of each cluster of near-duplicates; a cluster stays on one side of the split."""
    holdout: tuple[Path, ...] = ()
    """Files of held-out requests (JSONL of {"request": ...} or plain lines) that no sample may resemble."""
    validation: float = Field(default=0.05, ge=0, lt=1)
    """Share of the samples for validation."""
    calibration: float = Field(default=0.05, ge=0, lt=1)
    """Share of the samples for calibrating quantization."""
    min_rows: int = Field(default=32, ge=1)
    """Fewer training samples than this is an error: the logs do not hold enough traffic yet."""

    @model_validator(mode="after")
    def _something_left(self) -> CollectConfig:
        if self.log_dir is None and not self.sources:
            raise ValueError("log_dir: give the request log's folder, or sources")
        if len({s.name for s in self.sources} | {"log"}) <= len(self.sources):
            raise ValueError("sources: each needs a name of its own, other than 'log'")
        if self.validation + self.calibration >= 1:
            raise ValueError("validation + calibration leave nothing to train on; their sum must be below 1")
        return self


class EngineConfig(StrictConfig):
    """How evaluation starts vLLM: small, and without touching the engines that serve."""

    dtype: str = "bfloat16"
    max_model_len: int = Field(default=1024, ge=16)
    max_num_seqs: int = Field(default=32, ge=1)
    kv_cache_bytes: int = Field(default=256 << 20, ge=1 << 20)
    enforce_eager: bool = True
    kv_cache_dtype: Literal["auto", "fp8", "int8_per_token_head", "fp8_per_token_head"] = "auto"
    """Of the KV cache; auto: the model's. On CPU int8_per_token_head is accepted and wrong, which evaluate
    finds out and refuses."""
    int8_activations: bool = False
    """On CPUs with AMX, INT4 weights meet activations rounded to int8: products up to four times as fast,
    and not quite what the file says. Serving: `env: {VLLM_CPU_INT4_W4A8: "1"}` of the engine."""
    threads: int = Field(default=1, ge=1)
    timeout_s: float = Field(default=1800, gt=0)


class IntervalConfig(StrictConfig):
    """Bootstrap intervals over the evaluation requests."""

    method: Literal["bca", "percentile"] = "bca"
    """bca: corrected for bias and skewness (Efron 1987). percentile: plain quantiles of the resamples."""
    level: float = Field(default=0.95, gt=0.5, lt=1)
    """Two-sided coverage."""
    resamples: int = Field(default=2000, ge=100)
    """Resamples of the requests; the same ones for every metric and model."""
    seed: int = Field(default=0, ge=0)


class EvaluateConfig(Section):
    """What is measured, through vLLM, on teacher, student, quantized artifact and champion."""

    dataset: str
    """JSONL file of {"request": {OpenAI chat body}, "answer": optional reference text} rows, or
    "module:function" that yields such rows. Without an answer the teacher's is the reference."""
    dataset_args: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Keyword arguments of a dataset function (its seed and size)."""
    grader: str | None = None
    """ "module:function" called with (request, text) that returns True, False or None (cannot be graded)."""
    classes: str | None = None
    """The class of an answer, for precision, recall and F1: "json:PATH", a field of a JSON answer
    (json:label, json:0.tool), or "module:function" called with (request, text) for a name or None."""
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """sacrebleu's tokenizer for BLEU: zh or char for Chinese. chrF, ROUGE need none."""
    confidence: Literal["answer", "first_token"] = "answer"
    """What calibration takes as a model's confidence: exp of the mean log-probability of its answer's tokens,
    or the probability of the first one (for answers that are a label)."""
    ece_bins: int = Field(default=10, ge=2)
    """Equal-width bins of the expected calibration error."""
    intervals: IntervalConfig = Field(default_factory=IntervalConfig)
    lm_eval: tuple[str, ...] = ()
    """lm-eval tasks: folders (or files) of YAML tasks, all run; or names of tasks that lm-eval comes with,
    whose data must be on this machine. None is fetched."""
    lm_eval_limit: int | None = Field(default=None, ge=1)
    """Examples of each lm-eval task, the first; None takes all."""
    samples: int = Field(default=500, ge=1)
    """Requests answered for accuracy; the first of the dataset."""
    score_samples: int = Field(default=200, ge=1)
    """Of those, requests whose teacher answers are scored for perplexity, KL and agreement."""
    topk: int = Field(default=20, ge=1)
    """Log-probabilities compared at each position; the rest is one tail bucket."""
    answer_tokens: int = Field(default=256, ge=1)
    speed_batch: int = Field(default=32, ge=1)
    speed_tokens: int = Field(default=64, ge=1)
    """tokens/s is measured over this many greedy tokens of each of speed_batch requests, end of text ignored.
    """
    ttft_samples: int = Field(default=16, ge=1)
    """Requests asked one after the other, with an empty prefix cache, for the time to the first token."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cache_teacher: bool = True
    """Keep the teacher's evaluation, by teacher, dataset and engine version."""


class PublishConfig(Section):
    """Where a student that passed its gates goes."""

    name: str
    """Model name in the registry."""
    tracking_uri: str = "sqlite:///runs/registry.db"
    """MLflow tracking URI: a server's, or sqlite:///FILE (artifacts then lie beside the file)."""
    artifact_root: Path | None = None
    """Folder of the artifacts for a SQLite tracking URI; default: `artifacts` beside the database."""
    alias: str | None = "challenger"
    """Alias to set on the new version; None sets none."""
    description: str = ""
    license: str = "unknown"
    """License of the student for its model card, as Hugging Face writes it (apache-2.0, other, …): the base
    model's and the teacher's terms decide it, so there is no default that is right."""
    tags: tuple[str, ...] = ()
    """Further tags of the model card."""


class DistillConfig(StrictConfig):
    """A whole distillation job."""

    workdir: Path
    """Folder of this job. The log window is fixed at its first start, so a later job takes another folder."""
    cache_dir: Path = Path("runs/cache")
    """Shared between jobs: the teacher's outputs and its evaluation."""
    ray: str = "auto"
    """Ray address: auto (the running cluster, else a local one), local (always one of its own), or an
    address.
    """
    teacher: str
    """HF id or checkpoint folder of the teacher."""
    student: str
    """HF id or checkpoint folder that training starts from (with train.shape: what to call the new model)."""
    collect: CollectConfig
    augment: AugmentConfig | None = None
    """Have the teacher widen the training samples (off by default)."""
    teach: TeachConfig = Field(default_factory=TeachConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig
    gates: tuple[Gate, ...] = ()
    """What must hold before a model is published; with none, nothing passes (no data never passes)."""
    publish: PublishConfig
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if self.teach.scheme == "text" and self.train.loss.kd_weight > 0:
            raise ValueError(
                "teach.scheme: text keeps no distributions, so train.loss.kd_weight must be 0 (and"
                " train.loss.hard_weight above it)"
            )
        return self
