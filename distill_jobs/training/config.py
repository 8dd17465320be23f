"""What a training run may be told. Importable without torch; knows nothing of Ray or of where data comes
from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from contracts.config import StrictConfig
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.training.method_config import (
    CurriculumConfig,
    FakeQuantConfig,
    LiveTeacherConfig,
    LoraConfig,
    PrefixConfig,
    TermsConfig,
    tokens_of_a_pass,
)


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
    """What is minimised: kd_weight * divergence(teacher, student) + hard_weight * cross entropy, per valid
    token."""

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"
    ] = Field(default="forward_kl", description="Between teacher p and student q: forward is KL(p || q).")
    beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="jsd: share of p in the mixture; 0 and 1 are the forward and the reverse KL (GKD).",
    )
    over_beta: bool = Field(
        default=False,
        description="jsd: divide by beta (1 - beta), so that its size hardly depends on beta.",
    )
    alpha: float = Field(
        default=0.1, ge=0, lt=1, description="skew_*: share of the first argument in the second (DistiLLM)."
    )
    temperature: float = Field(default=1.0, gt=0, description="T, on both sides of the divergence.")
    t_squared: bool = Field(
        default=True, description="Multiply the divergence by T^2 (Hinton, ModelOpt); TRL does not."
    )
    kd_weight: float = Field(
        default=1.0, ge=0, description="Weight of the divergence; 0 needs no teacher logits."
    )
    hard_weight: float = Field(
        default=0.5, ge=0, description="Weight of the cross entropy with the teacher's text."
    )
    prompt_weight: float = Field(
        default=0.0, ge=0, description="Weight of the cross entropy of the prompt's tokens."
    )
    chunk: int | None = Field(
        default=None,
        ge=1,
        description="Token rows whose logits exist at a time; by default, by bytes.",
    )


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
            "resources_per_worker",
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
    micro_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Tokens in one forward pass of one worker, padding included; default: 8192 on a GPU, 1024"
        " on a CPU. Fewer take less memory; the result is the same.",
    )
    packing: bool = Field(
        default=True,
        description="Rows of a forward pass share one sequence without padding; none sees another.",
    )
    bucket_window: int = Field(
        default=1, ge=1, description="Steps whose samples are sorted by length together."
    )
    max_length: int = Field(default=1024, ge=8, description="Longer samples are refused.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    terms: TermsConfig = Field(default_factory=TermsConfig)
    prefix: PrefixConfig = Field(default_factory=PrefixConfig)
    teacher: LiveTeacherConfig | None = Field(
        default=None, description="Teachers that run beside the student, instead of what the rows cache."
    )
    lora: LoraConfig | None = Field(
        default=None, description="Train low-rank adapters instead of all weights."
    )
    curriculum: CurriculumConfig | None = Field(
        default=None, description="Easy rows first, by the rows' `difficulty`; None shuffles them."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Weights in compute; masters are fp32."
    )
    shape: ShapeConfig | None = Field(
        default=None, description="From scratch: the model to make; base_model is unused."
    )
    shrink: ShrinkConfig | None = Field(
        default=None,
        description="Cut the checkpoint that training starts from to a smaller one: a student built from its"
        " teacher, where that is the start. The training heals it.",
    )
    fake_quant: FakeQuantConfig | None = Field(
        default=None,
        description="Quantization-aware: train with the weights as they will be served, which then takes the"
        " place of `quantize`.",
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
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Ray resources of the cluster's own naming that each worker reserves, e.g. {train: 1}: it"
        " runs on nodes that have them. A Ray started for the job has what it asks for.",
    )
    checkpoint_steps: int = Field(default=100, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Checkpoints kept, besides the latest.")
    storage: str | None = Field(
        default=None, description="Folder or URL (s3://…) for checkpoints; default: beside the result."
    )
    log_steps: int = Field(default=10, ge=1, description="Optimizer steps between progress reports.")
    max_failures: int = Field(default=3, ge=0, description="Worker failures that Ray Train may recover from.")

    @property
    def worker_resources(self) -> dict[str, float]:
        """All that Ray reserves for each worker."""
        gpu = {"GPU": 1} if self.use_gpu else {}
        return {"CPU": self.cpus_per_worker, **gpu, **self.resources_per_worker}

    @property
    def ray_resources(self) -> dict[str, float]:
        """What a Ray that is started for this training must have of the resources that its workers name."""
        return {name: amount * self.workers + 1 for name, amount in self.resources_per_worker.items()}

    @property
    def cached_teacher(self) -> bool:
        """Whether the rows' own columns say what the teacher thinks."""
        return self.loss.kd_weight > 0 and self.teacher is None

    def pass_tokens(self, device: str) -> int:
        """Tokens in one forward pass on this kind of device ("cpu", "cuda")."""
        return self.micro_tokens or tokens_of_a_pass(device)

    @property
    def with_prompt(self) -> bool:
        """Whether positions of the prompt count, too."""
        return self.loss.prompt_weight > 0 or self.terms.positions == "all"

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainConfig:
        if self.terms.intermediate and self.teacher is None:
            raise ValueError("terms read the inside of a live teacher; set train.teacher")
        if self.terms.intermediate and self.compile:
            raise ValueError("terms look inside the blocks, which compile hides; set train.compile: false")
        asks = self.loss.kd_weight > 0 or self.prefix.teacher
        if self.prefix.generates and asks and self.teacher is None:
            raise ValueError("prefixes written during training need a live teacher; set train.teacher")
        if self.terms.intermediate and self.teacher and self.teacher.cross_tokenizer:
            raise ValueError("terms compare tokens one by one; they need a teacher of the same tokenizer")
        if self.parallel == "fsdp2" and (self.prefix.student or self.lora):
            raise ValueError("prefix.student and lora need whole parameters; set train.parallel: ddp")
        if self.lora and self.lora.export == "adapter" and self.validate_steps:
            raise ValueError("validation loads whole checkpoints; set lora.export: merged")
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.shrink and self.shape:
            raise ValueError("shrink cuts a checkpoint and shape makes a new model; set one of them")
        if self.shrink and self.lora and self.lora.export == "adapter":
            raise ValueError("shrink leaves a base that nobody serves; set lora.export: merged")
        sparse = self.shrink is not None and self.shrink.sparsify is not None
        for name, given in (("fake_quant", self.fake_quant is not None), ("shrink.sparsify", sparse)):
            if given and self.lora:
                raise ValueError(f"{name} is for whole weights, which adapters leave alone; leave lora out")
            if given and self.parallel == "fsdp2":
                raise ValueError(f"{name} needs whole parameters; set train.parallel: ddp")
        if self.fake_quant and self.compile:
            raise ValueError(
                "fake_quant rounds in every block, which compile hides; set train.compile: false"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.early_stop is not None and self.validate_steps is None:
            raise ValueError("early_stop needs validate_steps: without validation nothing says when to stop.")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}.")
        return self
