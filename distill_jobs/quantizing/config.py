"""How a student is quantized: algorithm, scheme, granularity, file format. Importable without torch.

Knows nothing about how any of it is done, nor which of it is good.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from contracts.config import StrictConfig

Algorithm = Literal["auto", "rtn", "awq", "gptq", "smoothquant"]
Scheme = Literal[
    "W4A16", "W4A16_ASYM", "W4A8", "W8A8", "W8A8_ASYM", "W8A8_STATIC", "W8A16", "FP8_DYNAMIC", "MIXED"
]
Granularity = Literal["group", "channel", "tensor"]
Format = Literal["compressed-tensors", "awq", "gptq"]

_WEIGHT_ONLY_4 = ("W4A16", "W4A16_ASYM")
_ACTIVATIONS = ("W4A8", "W8A8", "W8A8_ASYM", "W8A8_STATIC", "FP8_DYNAMIC")
_BY_GROUP = (*_WEIGHT_ONLY_4, "W4A8", "W8A16", "MIXED")


class QuantizeConfig(StrictConfig):
    """One way to quantize, by llm-compressor in an environment of its own."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset({"timeout_s", "threads"})

    scheme: Scheme = "W4A16"
    """Bits of weights and activations. _ASYM: with zero points (W4A16: of the weights, W8A8: of the
    activations). _STATIC: one activation scale a layer, calibrated; the others scale every token by itself.
    MIXED: 4 bits, 8 bits or bf16 a layer, by measured sensitivity, within `budget_bytes`."""
    algorithm: Algorithm = "auto"
    """How the values are found. auto: awq for weights alone, smoothquant for W4A8 and W8A8, gptq for MIXED,
    rtn (round to nearest, no data) for FP8_DYNAMIC."""
    granularity: Granularity | None = None
    """What shares a weight scale; None: a group where the scheme has 4-bit weights, else an output channel.
    tensor: W8A8 and FP8_DYNAMIC only."""
    group_size: Literal[32, 64, 128, 256] = 128
    """Input columns that share a scale; every linear layer's in-features must be a multiple of it."""
    format: Format = "compressed-tensors"
    """How the file is written. awq and gptq: the formats of AutoAWQ and AutoGPTQ, which other tools load."""
    budget_bytes: int | None = Field(default=None, ge=1)
    """MIXED: largest size of the weights' files; None: what uniform INT4 at `group_size` would take."""
    sensitivity_samples: int = Field(default=32, ge=1)
    """MIXED: calibration samples on which every layer is measured at every precision."""
    unserved: bool = False
    """Write what no kernel of this machine's vLLM serves (FP8_DYNAMIC, W8A16), for another machine's GPU."""
    samples: int = Field(default=128, ge=1)
    """Calibration samples: logged requests with the teacher's answers, chosen to cover lengths and texts."""
    max_tokens: int = Field(default=512, ge=8)
    """Calibration samples are cut to this length."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers that stay in bf16."""
    timeout_s: float = Field(default=3600, gt=0)
    """Seconds until the compression is given up."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads; more than one was slower on a busy machine (research: 22 s against 494 s)."""

    @model_validator(mode="after")
    def _fits_together(self) -> QuantizeConfig:
        for wrong, message in _conflicts(self):
            if wrong:
                raise ValueError(message)
        return self

    @property
    def method(self) -> str:
        """The algorithm, `auto` resolved."""
        if self.algorithm != "auto":
            return self.algorithm
        if self.scheme in ("W4A8", "W8A8", "W8A8_ASYM", "W8A8_STATIC"):
            return "smoothquant"
        return {"MIXED": "gptq", "FP8_DYNAMIC": "rtn"}.get(self.scheme, "awq")

    @property
    def shares(self) -> Granularity:
        """What shares a weight scale, the default resolved."""
        return self.granularity or ("group" if self.scheme in _BY_GROUP else "channel")

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs of the layers are rounded too: the kernels then round on their own."""
        return self.scheme in (*_ACTIVATIONS, "MIXED")

    @property
    def precision(self) -> str:
        """The artifact's precision, e.g. 'awq-w4a16-g128' or 'gptq-w4a16-g128-as-gptq'."""
        shares = f"g{self.group_size}" if self.shares == "group" else self.shares
        told = f"{self.method}-{self.scheme.lower().replace('_', '-')}-{shares}"
        return told if self.format == "compressed-tensors" else f"{told}-as-{self.format}"


def _conflicts(config: QuantizeConfig) -> tuple[tuple[bool, str], ...]:
    """(does it hold, what to say) of every combination that cannot be written or served by anybody."""
    scheme, shares, method = config.scheme, config.shares, config.method
    return (
        (
            config.format == "awq" and scheme not in _WEIGHT_ONLY_4,
            "format: awq holds 4-bit weights alone; set scheme: W4A16 or W4A16_ASYM",
        ),
        (
            config.format == "gptq" and scheme != "W4A16",
            "format: gptq is served with symmetric 4-bit weights alone; set scheme: W4A16",
        ),
        (
            config.format != "compressed-tensors" and shares != "group",
            f"format: {config.format} has a scale a group; leave granularity out",
        ),
        (
            config.format != "compressed-tensors" and config.group_size > 128,
            f"group_size: readers of format {config.format} know 32, 64 and 128",
        ),
        (
            method == "smoothquant" and scheme not in _ACTIVATIONS,
            "algorithm: smoothquant moves outliers from activations into weights, so it needs a scheme that"
            " quantizes activations: W8A8 or W4A8",
        ),
        (
            method == "awq" and (shares == "tensor" or scheme == "MIXED"),
            "algorithm: awq searches scales of columns for one scheme, with a weight scale a group or"
            " channel",
        ),
        (
            shares == "tensor" and scheme in _BY_GROUP,
            f"granularity: {scheme} has no kernel with one scale a tensor; take group or channel",
        ),
        (
            shares == "group" and scheme not in _BY_GROUP,
            f"granularity: {scheme} has no kernel with a scale a group; take channel or tensor",
        ),
        (
            scheme != "MIXED" and config.budget_bytes is not None,
            "budget_bytes: belongs to scheme: MIXED; a uniform scheme has the size it has",
        ),
        (
            scheme == "MIXED" and shares != "group",
            "granularity: of MIXED is chosen a layer; leave it out",
        ),
    )
