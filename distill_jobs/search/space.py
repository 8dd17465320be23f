"""Candidates: shapes of a teacher's kind in a precision, and what each takes on disk and in memory.

Bytes come from the shape alone, header included, and are those of the file that is written later. Knows
nothing about training; imports no torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from contracts.errors import ConfigError
from distill_jobs.quantizing.checkpoints import DTYPE_BYTES
from distill_jobs.search.config import BudgetConfig, Precision, SpaceConfig
from distill_jobs.training.config import ShapeConfig

_DIMENSIONS = ("layers", "hidden", "intermediate", "heads", "kv_heads")
_KERNEL_MULTIPLE = 32
_ORDER = ("I64", "I32", "BF16", "I8")
"""safetensors writes wide types first, then by name."""
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, order=True)
class Shape:
    """A decoder's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @property
    def name(self) -> str:
        """e.g. l4-h256-i768-q4-k2."""
        sizes = (self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads)
        return "-".join(f"{letter}{size}" for letter, size in zip("lhiqk", sizes, strict=True))


@dataclass(frozen=True)
class Frame:
    """What all candidates share with the teacher."""

    vocabulary: int
    head_dim: int
    tied: bool
    largest: Shape
    max_positions: int

    @classmethod
    def of(cls, config: Any) -> Frame:
        """Of a Hugging Face configuration. Raises: ConfigError for a model of another kind."""
        if config.model_type != "qwen3" or config.attention_bias:
            raise ConfigError(
                f"distill.teacher: a search knows teachers of type qwen3 without biases, not"
                f" {config.model_type!r}. Use train.shrink and `stillhouse quantize` by hand."
            )
        shape = Shape(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        positions, tied = config.max_position_embeddings, bool(config.tie_word_embeddings)
        return cls(config.vocab_size, config.head_dim, tied, shape, positions)


@dataclass(frozen=True)
class Candidate:
    """A shape in a precision."""

    shape: Shape
    precision: Precision
    bytes: int
    """Of the weights' file."""
    memory: int
    """Weights and the budget's KV cache."""

    @property
    def name(self) -> str:
        """e.g. l4-h256-i768-q4-k2-w4a16-g128."""
        return f"{self.shape.name}-{self.precision}"


def candidates(frame: Frame, space: SpaceConfig, budget: BudgetConfig, cut: bool) -> list[Candidate]:
    """Everything in the space that can be built and served and is within the budget's bytes, small first.

    Raises: ConfigError when nothing is, saying what stood in the way.
    """
    found, reasons = [], dict[str, int]()
    for shape, precision in itertools.product(shapes(frame, space), dict.fromkeys(space.precision)):
        why = _obstacle(frame, shape, precision, cut)
        size = 0 if why else file_bytes(frame, shape, precision)
        memory = size + kv_bytes(frame, shape, budget.kv_tokens)
        why = why or (None if budget.fits(size, memory) else "more than the budget's bytes")
        if why is None:
            found.append(Candidate(shape, precision, size, memory))
        else:
            reasons[why] = reasons.get(why, 0) + 1
    if not found:
        told = "; ".join(f"{count} × {why}" for why, count in reasons.items())
        raise ConfigError(f"space: no candidate is left ({told}). Widen the space or the budget.")
    return sorted(found, key=lambda one: (one.bytes, one.name))


def shapes(frame: Frame, space: SpaceConfig) -> Iterator[Shape]:
    """Every combination of the space's sizes."""
    values = [sorted(set(getattr(space, name))) or [getattr(frame.largest, name)] for name in _DIMENSIONS]
    return (Shape(*sizes) for sizes in itertools.product(*values))


def _obstacle(frame: Frame, shape: Shape, precision: Precision, cut: bool) -> str | None:
    """Why a candidate cannot be built or served; None when it can."""
    if shape.heads % shape.kv_heads:
        return "heads is no multiple of kv_heads"
    if cut and any(getattr(shape, name) > getattr(frame.largest, name) for name in _DIMENSIONS):
        return "larger than the teacher, so not to be cut out of it"
    if cut and frame.largest.kv_heads % shape.kv_heads:
        return "kv_heads does not divide the teacher's"
    group = group_of(precision)
    if any(ins % (group or _KERNEL_MULTIPLE) for _, ins in linears(frame, shape).values()):
        return f"widths are no multiples of {group or _KERNEL_MULTIPLE}, which {precision} needs"
    return None


def group_of(precision: Precision) -> int | None:
    """Columns that share a scale; None where that is a whole row, or there is none."""
    return int(precision.rpartition("-g")[2]) if precision.startswith("w4a16") else None


def linears(frame: Frame, shape: Shape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a block's linear layers."""
    query, key = shape.heads * frame.head_dim, shape.kv_heads * frame.head_dim
    return {
        "self_attn.q_proj": (query, shape.hidden),
        "self_attn.k_proj": (key, shape.hidden),
        "self_attn.v_proj": (key, shape.hidden),
        "self_attn.o_proj": (shape.hidden, query),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def block_params(frame: Frame, shape: Shape) -> int:
    """Weights of all blocks' linear layers: multiplications a token."""
    return shape.layers * sum(outs * ins for outs, ins in linears(frame, shape).values())


def kv_bytes(frame: Frame, shape: Shape, tokens: int) -> int:
    """Bytes of so many tokens' keys and values in bf16."""
    return 2 * 2 * shape.layers * shape.kv_heads * frame.head_dim * tokens


def tensors_of(frame: Frame, shape: Shape, precision: Precision) -> Tensors:
    """Name → (dtype, shape) of everything in the checkpoint."""
    found: Tensors = {"model.embed_tokens.weight": ("BF16", (frame.vocabulary, shape.hidden))}
    if not frame.tied:
        found["lm_head.weight"] = ("BF16", (frame.vocabulary, shape.hidden))
    found["model.norm.weight"] = ("BF16", (shape.hidden,))
    for block in range(shape.layers):
        at = f"model.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = ("BF16", (shape.hidden,))
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            found[f"{at}{norm}.weight"] = ("BF16", (frame.head_dim,))
        for name, size in linears(frame, shape).items():
            found |= _linear(f"{at}{name}", *size, precision)
    return found


def _linear(name: str, outs: int, ins: int, precision: Precision) -> Tensors:
    """What a linear layer is stored as (compressed-tensors)."""
    if precision == "bf16":
        return {f"{name}.weight": ("BF16", (outs, ins))}
    if precision == "w8a8":
        return {f"{name}.weight": ("I8", (outs, ins)), f"{name}.weight_scale": ("BF16", (outs, 1))}
    return {
        f"{name}.weight_packed": ("I32", (outs, math.ceil(ins / 8))),
        f"{name}.weight_scale": ("BF16", (outs, ins // (group_of(precision) or ins))),
        f"{name}.weight_shape": ("I64", (2,)),
    }


def file_bytes(frame: Frame, shape: Shape, precision: Precision) -> int:
    """Size of model.safetensors: 8 bytes, the header (padded to a multiple of 8), the tensors."""
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, sizes) in sorted(
        tensors_of(frame, shape, precision).items(), key=lambda one: (_ORDER.index(one[1][0]), one[0])
    ):
        end = at + math.prod(sizes) * DTYPE_BYTES.get(kind, 1)
        about[name] = {"dtype": kind, "shape": list(sizes), "data_offsets": [at, end]}
        at = end
    header = len(json.dumps(about, separators=(",", ":")).encode())
    return 8 + -(-header // 8) * 8 + at


def shape_config(frame: Frame, shape: Shape, tokenizer: str) -> ShapeConfig:
    """The shape as a training from random weights takes it."""
    return ShapeConfig(
        vocab_size=frame.vocabulary,
        hidden_size=shape.hidden,
        head_dim=frame.head_dim,
        intermediate_size=shape.intermediate,
        max_positions=frame.max_positions,
        tokenizer=tokenizer,
        **{name: asdict(shape)[name] for name in ("layers", "heads", "kv_heads")},
    )
