"""Ways to quantize by their names, the front of what was measured about them, and the choice.

A candidate is named as its artifact's precision is: awq-w4a16-g128, smoothquant-w8a8-channel,
gptq-w4a16-g128-as-gptq. Pure; knows nothing about how anything is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from contracts.config import Record, parse_config
from contracts.errors import ConfigError
from distill_jobs.quantizing.config import QuantizeConfig

Preference = Literal["bytes", "quality", "speed"]

DEFAULT = (
    "rtn-w4a16", "awq-w4a16", "gptq-w4a16", "smoothquant-w8a8-channel", "gptq-mixed",
)  # fmt: skip
_NAME = re.compile(
    r"(?P<algorithm>[a-z]+)-(?P<scheme>w\d+a\d+(?:-asym|-static)?|fp8-dynamic|mixed)"
    r"(?:-(?:g(?P<group>\d+)|(?P<shares>channel|tensor)))?(?:-as-(?P<format>[a-z-]+))?"
)


class Measured(Record):
    """What was measured about one candidate, or why it was refused."""

    name: str
    artifact: str
    bytes: int | None = None
    perplexity: float | None = None
    """Served."""
    loss: float | None = None
    """Relative, against bf16 served: 0.01 is a perplexity 1 % higher."""
    kl: float | None = None
    """KL(bf16 || candidate) over the top tokens, nats a token, served."""
    served_gap: float | None = None
    """Relative difference of served and offline perplexity."""
    tokens_per_s: float | None = None
    seconds: float = 0.0
    """To quantize it."""
    refused: str | None = None


@dataclass(frozen=True)
class Choice:
    """The candidate that a rule picked, and the rule as people say it. `picked` is None when none
    qualifies.
    """

    picked: Measured | None
    rule: str


def parse_candidate(name: str, base: QuantizeConfig) -> QuantizeConfig:
    """The configuration that a name means; what it leaves out (group size, samples) is as in `base`.

    Raises: ConfigError naming what is wrong with it.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None:
        raise ConfigError(
            f"--candidates: {name!r} is no candidate. Write"
            " ALGORITHM-SCHEME[-gN|-channel|-tensor][-as-FORMAT], e.g. awq-w4a16-g128,"
            " smoothquant-w8a8-channel, gptq-w4a16-g128-as-gptq, gptq-mixed."
        )
    parts = found.groupdict()
    values: dict[str, Any] = base.model_dump() | {
        "algorithm": parts["algorithm"],
        "scheme": parts["scheme"].upper().replace("-", "_"),
        "granularity": parts["shares"],
        "format": parts["format"] or "compressed-tensors",
    }
    if parts["group"] is not None:
        values |= {"granularity": "group", "group_size": int(parts["group"])}
    if values["scheme"] != "MIXED":
        values["budget_bytes"] = None
    return parse_config(values, QuantizeConfig, source=f"--candidates: {name!r}")


def front(measured: Sequence[Measured]) -> list[Measured]:
    """Those that no other is at least as good as in bytes, perplexity and tokens/s, and better in one."""
    whole = [m for m in measured if m.refused is None and m.bytes is not None]
    return [m for m in whole if not any(_dominates(other, m) for other in whole)]


def _dominates(one: Measured, other: Measured) -> bool:
    a, b = _figures(one), _figures(other)
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def _figures(one: Measured) -> tuple[float, float, float]:
    """Smaller is better."""
    return float(one.bytes or 0), one.perplexity or 0.0, -(one.tokens_per_s or 0.0)


def choose(
    measured: Sequence[Measured], prefer: Preference, max_loss: float, budget_bytes: int | None = None
) -> Choice:
    """Of the front, within loss and budget, the best by what is preferred; ties go by perplexity."""
    within = f" and at most {budget_bytes:,} bytes" if budget_bytes is not None else ""
    best = {"bytes": "the fewest bytes", "quality": "the least perplexity", "speed": "the most tokens/s"}
    rule = (
        f"of the front, with a perplexity at most {max_loss:.2%} above bf16{within}: {best[prefer]},"
        " then the least perplexity"
    )
    fit = [
        m for m in front(measured)
        if (m.loss is not None and m.loss <= max_loss)
        and (budget_bytes is None or (m.bytes or 0) <= budget_bytes)
    ]  # fmt: skip
    place = {"bytes": 0, "quality": 1, "speed": 2}[prefer]
    fit.sort(key=lambda m: (_figures(m)[place], m.perplexity))
    return Choice(fit[0] if fit else None, rule)
