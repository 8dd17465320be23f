"""What may stand beside the divergence: live teachers, extra terms, prefix sources, adapters, curriculum, the
grid that weights are rounded to.

Importable without torch. Knows nothing of how any of it is computed; `config.TrainConfig` puts it together.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from contracts.config import StrictConfig

LayerMap = tuple[tuple[int, int], ...]
"""(student block, teacher block) pairs, counted from 1; 0 is the embedding's output."""


class TeacherModel(StrictConfig):
    """One teacher that runs beside the student."""

    model: str = Field(description="Folder of a checkpoint, or its HF id.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Weights in compute; a teacher has no masters."
    )
    weight: float = Field(default=1.0, gt=0, description="Share in the average; weights are normalised.")
    tag: str | None = Field(default=None, description="Rows whose `teacher` column says this are its own.")


class CrossTokenizerConfig(StrictConfig):
    """Universal logit distillation: for a teacher whose tokenizer is not the student's (arXiv 2402.12030)."""

    temperature: float = Field(default=1.0, gt=0, description="T, on both sides of the distance.")
    top: int | None = Field(
        default=None, ge=1, description="Sorted probabilities compared a group; None compares all of them."
    )


def tokens_of_a_pass(device: str) -> int:
    """Tokens of one forward pass on this kind of device ("cpu", "cuda") where nothing else is configured."""
    return 1024 if device == "cpu" else 8192


class LiveTeacherConfig(StrictConfig):
    """Teachers run in the step, without gradient; the cached log-probabilities are then not read."""

    models: tuple[TeacherModel, ...] = Field(min_length=1, description="One teacher, or several.")
    combine: Literal["average", "route"] = Field(
        default="average",
        description="average: of probabilities, by weight. route: each row asks the teacher of its tag.",
    )
    cross_tokenizer: CrossTokenizerConfig | None = Field(
        default=None,
        description="For a teacher of another tokenizer: ULD takes the divergence's place.",
    )
    cache_rows: int = Field(
        default=4096, ge=0, description="Rows whose teacher states are kept in memory for the next visit."
    )
    read_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens a teacher reads at once; by default 1024 on a CPU, 8192 on a GPU.",
    )

    def at_once(self, device: str) -> int:
        """`read_tokens` on this kind of device ("cpu", "cuda")."""
        return self.read_tokens or tokens_of_a_pass(device)

    @model_validator(mode="after")
    def _routable(self) -> LiveTeacherConfig:
        tags = [m.tag for m in self.models]
        if self.combine == "route" and (None in tags or len(set(tags)) < len(tags)):
            raise ValueError("combine: route needs a different tag for every teacher in models")
        if self.cross_tokenizer and len(self.models) > 1:
            raise ValueError("cross_tokenizer works with one teacher; give one entry in models")
        return self


class HiddenTerm(StrictConfig):
    """Hidden states through a learned projection (FitNets, arXiv 1412.6550)."""

    weight: float = Field(default=1.0, gt=0, description="Weight of the term.")
    distance: Literal["mse", "cosine"] = Field(
        default="mse", description="mse: mean over dimensions. cosine: 1 - cosine."
    )
    layers: LayerMap = Field(default=(), description="Layer map; empty spreads the student's blocks evenly.")


class AttentionTerm(StrictConfig):
    """Attention maps (TinyBERT, arXiv 1909.10351; KL: MiniLM, arXiv 2002.10957)."""

    weight: float = Field(default=1.0, gt=0, description="Weight of the term.")
    distance: Literal["mse", "kl"] = Field(
        default="kl", description="mse: of the scores before the softmax. kl: KL(teacher || student) a query."
    )
    layers: LayerMap = Field(default=(), description="Layer map; empty spreads the student's blocks evenly.")


class RelationTerm(StrictConfig):
    """Relations between the tokens of a row: they need no equal widths and no projection."""

    weight: float = Field(default=1.0, gt=0, description="Weight of the term.")
    kind: Literal["value", "query", "distance"] = Field(
        default="value",
        description="value, query: KL of softmax(XX^T / sqrt(d)) (MiniLM, MiniLMv2). distance: RKD-D's Huber"
        " loss of pairwise distances over their mean (arXiv 1904.05068), of hidden states.",
    )
    layers: LayerMap = Field(default=(), description="Layer map; empty takes the last block of each.")


class ContrastiveTerm(StrictConfig):
    """InfoNCE (arXiv 1807.03748): a student's state against the teacher's of the same token, others being
    negatives."""

    weight: float = Field(default=0.1, gt=0, description="Weight of the term.")
    temperature: float = Field(default=0.1, gt=0, description="Divides the cosines.")
    negatives: Literal["row", "batch"] = Field(
        default="row",
        description="row: other tokens of the row, so that accumulation changes nothing. batch: of the whole"
        " micro-batch, which micro_tokens and workers then shape.",
    )
    layers: LayerMap = Field(default=(), description="Layer map; empty takes the last block of each.")


class RationaleTerm(StrictConfig):
    """Multi-task training on answers and rationales (Distilling step-by-step, arXiv 2305.02301)."""

    rationale_weight: float = Field(
        default=0.5, ge=0, lt=1, description="a: rationales' mean loss counts a, answers' mean 1 - a."
    )
    prefix: str = Field(
        default="", description="Put before the prompt of rationale rows; answers have none, as when served."
    )


class TermsConfig(StrictConfig):
    """Extra terms; each needs a live teacher, except rationale."""

    hidden: HiddenTerm | None = Field(default=None, description="Hidden states.")
    attention: AttentionTerm | None = Field(default=None, description="Attention maps.")
    relation: RelationTerm | None = Field(default=None, description="Token relations.")
    contrastive: ContrastiveTerm | None = Field(default=None, description="InfoNCE.")
    rationale: RationaleTerm | None = Field(default=None, description="Multi-task by the `task` column.")
    positions: Literal["answer", "all"] = Field(
        default="answer", description="Tokens that the terms compare: the answer's, or the prompt's too."
    )
    two_stage: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="First share of the steps that trains the intermediate terms alone, the rest the"
        " prediction alone (TinyBERT); 0 trains both together.",
    )

    @property
    def intermediate(self) -> bool:
        """Whether any term reads the teacher's inside."""
        return any((self.hidden, self.attention, self.relation, self.contrastive))

    @model_validator(mode="after")
    def _stages_have_terms(self) -> TermsConfig:
        if self.two_stage and not self.intermediate:
            raise ValueError("two_stage needs an intermediate term: hidden, attention, relation, contrastive")
        return self


Shares = tuple[tuple[float, float], ...]


class PrefixConfig(StrictConfig):
    """Who wrote the answers that a step trains on. Shares run linearly between (progress, share) points."""

    teacher: Shares = Field(default=(), description="Share of rows that the live teacher answers anew.")
    student: Shares = Field(default=(), description="Share of rows that the student answers (on-policy).")
    replay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of steps whose student rows are its earlier answers (DistiLLM's buffer).",
    )
    capacity: int = Field(default=1024, ge=1, description="Answers that the replay buffer holds.")
    temperature: float = Field(default=1.0, ge=0, description="Of sampling; 0 is greedy.")
    max_new_tokens: int = Field(default=128, ge=1, description="Longest generated answer.")
    batch_rows: int = Field(default=64, ge=1, description="Rows generated at a time.")
    student_divergence: (
        Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"] | None
    ) = Field(
        default=None,
        description="Divergence of rows that the student wrote, where it differs (DistiLLM-2, 2503.07067).",
    )

    @property
    def generates(self) -> bool:
        """Whether any row is written during training."""
        return bool(self.teacher or self.student)

    @model_validator(mode="after")
    def _shares_are_shares(self) -> PrefixConfig:
        for name in ("teacher", "student"):
            points: Shares = getattr(self, name)
            if any(not (0 <= at <= 1 and 0 <= share <= 1) for at, share in points):
                raise ValueError(f"{name}: progress and share lie in [0, 1]")
            if list(points) != sorted(points, key=lambda point: point[0]):
                raise ValueError(f"{name}: points must be in the order of progress")
        if self.replay and not self.student:
            raise ValueError("replay takes from the student's share; give student a share")
        both = {at for at, _ in (*self.teacher, *self.student)}
        if any(share_at(self.teacher, at) + share_at(self.student, at) > 1 + 1e-9 for at in both):
            raise ValueError("teacher and student shares must never exceed 1 together; logs take the rest")
        return self


def share_at(points: Shares, progress: float) -> float:
    """The schedule's share at a progress in [0, 1]: linear between points, flat outside them."""
    if not points:
        return 0.0
    before = [p for p in points if p[0] <= progress]
    after = [p for p in points if p[0] > progress]
    if not before:
        return after[0][1]
    if not after:
        return before[-1][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)


class LoraConfig(StrictConfig):
    """Low-rank adapters instead of all weights (arXiv 2106.09685), through peft."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"served_base"})

    r: int = Field(default=16, ge=1, description="Rank.")
    alpha: float = Field(default=32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On the adapter's input.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="Names of the linear layers, or all of them but the head."
    )
    export: Literal["merged", "adapter"] = Field(
        default="merged",
        description="merged: a plain checkpoint, which is then quantized. adapter: a peft folder, which vLLM"
        " serves beside the base.",
    )
    served_base: str | None = Field(
        default=None,
        description="The base that will serve an exported adapter, where it is not the one trained on: e.g."
        " its W4A16 file. The adapter is evaluated there.",
    )

    @model_validator(mode="after")
    def _only_adapters_have_a_base(self) -> LoraConfig:
        if self.served_base is not None and self.export != "adapter":
            raise ValueError("served_base is for an adapter; set export: adapter")
        return self


class CurriculumConfig(StrictConfig):
    """Easy rows first: at step t rows come from the easiest c(t) (competence, arXiv 1903.09848)."""

    start: float = Field(default=0.2, gt=0, le=1, description="c(0), the share of rows open at the start.")
    full: float = Field(default=0.6, gt=0, le=1, description="Progress from which every row is open.")


class FakeQuantConfig(StrictConfig):
    """Quantization-aware training: the blocks' linear layers compute with weights rounded as they will be
    served; gradients pass the rounding unchanged. The artifact holds exactly those values."""

    bits: Literal[3, 4] = Field(
        default=4,
        description="Of a weight. 3: eight levels in a file of 4 bits, no smaller than 4; vLLM has no kernel"
        " of 3 bits for CPUs.",
    )
    group_size: Literal[32, 64, 128] = Field(
        default=128, description="Input columns that share a scale; must divide every layer's in-features."
    )
    symmetric: bool = Field(default=True, description="False: every group also has a zero point.")

    @property
    def format(self) -> str:
        """As an artifact's precision says it, e.g. qad-w4a16-g128."""
        return f"qad-w{self.bits}a16{'' if self.symmetric else '-asym'}-g{self.group_size}"
