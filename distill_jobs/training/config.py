"""What a training run may be told. Importable without torch; knows nothing of Ray or of where data comes
from."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from contracts.config import StrictConfig


class ShapeConfig(StrictConfig):
    """A Qwen3-shaped model to start from scratch, when there is no checkpoint to start from."""

    vocab_size: int = Field(
        default=2048, ge=8, description="Rows of the embedding, at least the tokenizer's length."
    )
    hidden_size: int = Field(default=256, ge=8, description="Width of the residual stream.")
    layers: int = Field(default=2, ge=1, description="Number of decoder blocks.")
    heads: int = Field(default=4, ge=1, description="Query heads; a multiple of kv_heads.")
    kv_heads: int = Field(default=2, ge=1, description="Key and value heads.")
    head_dim: int = Field(default=64, ge=8, description="Width of a head.")
    intermediate_size: int = Field(default=768, ge=8, description="Width of the gated MLP.")
    max_positions: int = Field(
        default=1024, ge=16, description="Longest sequence the model may be served with."
    )
    tokenizer: str = Field(description="HF id or folder of the tokenizer that goes with the model.")


class OptimizerConfig(StrictConfig):
    """Optimizer and schedule."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon for matrices, AdamW for the rest."
    )
    lr: float = Field(
        default=1e-3, gt=0, description="Peak learning rate (Muon's update is matched to AdamW's RMS)."
    )
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled; not on norms and biases.")
    beta2: float = Field(default=0.95, gt=0, lt=1, description="AdamW's second-moment decay.")
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps over which the rate rises."
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="wsd",
        description="After the warm-up: flat; to 0 by a line or a cosine; or flat, then a fall (wsd).",
    )
    decay: float = Field(
        default=0.6, ge=0, le=1, description="wsd: last share of the steps over which the rate falls to 0."
    )
    clip: float = Field(default=1.0, gt=0, description="Largest gradient norm.")


class LossConfig(StrictConfig):
    """What is minimised: kd_weight * T^2 * KL(teacher || student) + hard_weight * cross entropy, per valid
    token."""

    temperature: float = Field(default=1.0, gt=0, description="T, on both sides of the divergence.")
    kd_weight: float = Field(
        default=1.0, ge=0, description="Weight of the divergence; 0 needs no teacher logits."
    )
    hard_weight: float = Field(
        default=0.5, ge=0, description="Weight of the cross entropy with the teacher's text."
    )
    prompt_weight: float = Field(
        default=0.0, ge=0, description="Weight of the cross entropy of the prompt's tokens."
    )
    chunk: int = Field(default=1024, ge=1, description="Token rows whose logits exist at a time.")


class EarlyStopConfig(StrictConfig):
    """When a run ends before its last step."""

    patience: int = Field(default=3, ge=1, description="Validations in a row that may bring no new best.")
    min_delta: float = Field(
        default=0.0, ge=0, description="A new best is lower by more than this, in the loss's unit."
    )


class TrainConfig(StrictConfig):
    """One training run."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset(
        {
            "name",
            "workers",
            "threads",
            "cpus_per_worker",
            "checkpoint_steps",
            "log_steps",
            "max_failures",
            "compile",
            "use_gpu",
            "micro_tokens",
            "packing",
            "gradient_checkpointing",
            "parallel",
            "min_workers",
            "keep_checkpoints",
            "storage",
            "validation_cpus",
            "validation_gpus",
        }
    )
    """Settings that change how a run is executed, not what comes out: a run may continue under others."""

    name: str = Field(default="train", description="Run name; the same name and folder resume the run.")
    seed: int = Field(default=0, description="Seeds the order of the data and a from-scratch model.")
    epochs: float = Field(default=3.0, gt=0, description="Passes over the data; may be a fraction.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop earlier, after so many optimizer steps."
    )
    batch_rows: int = Field(default=64, ge=1, description="Samples per optimizer step, over all workers.")
    micro_tokens: int = Field(
        default=8192, ge=16, description="Tokens in one forward pass of one worker, padding included."
    )
    packing: bool = Field(
        default=True,
        description="Rows of a forward pass share one sequence without padding; none sees another.",
    )
    bucket_window: int = Field(
        default=1, ge=1, description="Steps whose samples are sorted by length together."
    )
    max_length: int = Field(default=1024, ge=8, description="Longer samples are refused.")
    curriculum: bool = Field(
        default=False, description="The first epoch goes from easy to difficult (column difficulty)."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Weights in compute; masters are fp32."
    )
    shape: ShapeConfig | None = Field(
        default=None, description="From scratch: the model to make; base_model is unused."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass: less memory, a third slower.",
    )
    validate_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between validations on the rows of `validation`, beside the training.",
    )
    early_stop: EarlyStopConfig | None = Field(
        default=None,
        description="Stop when validation gets no better and export the best; needs validate_steps.",
    )
    validation_cpus: float = Field(default=0.0, ge=0, description="Ray CPUs that a validation reserves.")
    validation_gpus: float = Field(default=0.0, ge=0, description="GPUs that a validation reserves.")
    compile: bool = Field(
        default=False, description="Compile each decoder block: twice the speed after half a minute."
    )
    workers: int = Field(default=1, ge=1, description="Ray Train workers.")
    min_workers: int | None = Field(
        default=None, ge=1, description="Go on with so many when nodes are lost; default: all of `workers`."
    )
    parallel: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="Whole copies of the model a worker, or shards of it (FSDP2)."
    )
    threads: int = Field(default=1, ge=1, description="Intra-op threads of each worker.")
    use_gpu: bool = Field(default=False, description="One GPU a worker.")
    cpus_per_worker: float = Field(default=1.0, gt=0, description="Ray CPUs that each worker reserves.")
    checkpoint_steps: int = Field(default=100, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Checkpoints kept, besides the latest.")
    storage: str | None = Field(
        default=None, description="Folder or URL (s3://…) for checkpoints; default: beside the result."
    )
    log_steps: int = Field(default=10, ge=1, description="Optimizer steps between progress reports.")
    max_failures: int = Field(default=3, ge=0, description="Worker failures that Ray Train may recover from.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.early_stop is not None and self.validate_steps is None:
            raise ValueError("early_stop needs validate_steps: without validation nothing says when to stop.")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}.")
        return self
