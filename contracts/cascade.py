"""Cascade nouns: which signal says how sure a student is, from where on its answer is served, what is held.

A cascade asks its first upstream, and its second when the signal is below the threshold. Made by the stack's
configuration, read by serve.router and by the calibration. Knows nothing about upstreams or HTTP.

Sources: Chen, Zaharia & Zou, "FrugalGPT", 2023, arXiv 2305.05176; Gupta et al., "Language Model Cascades:
Token-level uncertainty and beyond", ICLR 2024, arXiv 2404.10136 (mean and quantiles of log-probabilities);
Wang et al., "Self-consistency", ICLR 2023, arXiv 2203.11171; Madaan et al., "AutoMix", NeurIPS 2024, arXiv
2310.12963 (answers verified before they are passed on).
"""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import Field, field_validator, model_validator

from contracts.config import Record


class Signal(StrEnum):
    """How sure the first is of its answer; larger is surer."""

    MEAN_LOGPROB = "mean_logprob"
    """Mean log-probability of the answer's tokens, in nats."""
    MIN_LOGPROB = "min_logprob"
    """Log-probability of its least likely token, in nats."""
    MARGIN = "margin"
    """Smallest distance of a token's log-probability to that of the best other token, in nats."""
    GRADER = "grader"
    """Score of a configured grader, in [0, 1]."""
    SELF_CONSISTENCY = "self_consistency"
    """Share of further samples that say the same, in [0, 1]."""

    @property
    def of_logprobs(self) -> bool:
        """True for those that need nothing but the answer's log-probabilities."""
        return self in (Signal.MEAN_LOGPROB, Signal.MIN_LOGPROB, Signal.MARGIN)


class Long(StrEnum):
    """What becomes of an answer that is longer than a cascade holds."""

    THEN = "then"
    """It is given up, and the second is asked."""
    FIRST = "first"
    """It is served unjudged, once it is whole."""


class Why(StrEnum):
    """Why the second answered a request."""

    UNSURE = "unsure"
    """The signal was below the threshold."""
    NO_SIGNAL = "no_signal"
    """The answer could not be judged: no log-probabilities, or the grader abstained."""
    LONG = "long"
    """The answer was longer than the cascade holds."""
    FAILED = "failed"
    """The first failed, refused the request, or has no replica that may be asked."""
    TIMEOUT = "timeout"
    """The first was not ready in time."""
    NOT_JUDGED = "not_judged"
    """A request whose answers this signal cannot judge (another API, several choices): the first was not
    asked."""


_BOUNDS = {
    Signal.MEAN_LOGPROB: (-math.inf, 0.0),
    Signal.MIN_LOGPROB: (-math.inf, 0.0),
    Signal.MARGIN: (-math.inf, math.inf),
    Signal.GRADER: (0.0, 1.0),
    Signal.SELF_CONSISTENCY: (0.0, 1.0),
}


class CascadeFields(Record):
    """When the first's answer is served, and how long it is waited for. Names no upstream."""

    signal: Signal = Signal.MEAN_LOGPROB
    """What is compared with the threshold."""
    threshold: float
    """The first's answer is served when the signal is at least this; 'stillhouse cascade calibrate' finds
    it."""
    grader: str | None = None
    """Name of a grader of single answers; with signal 'grader' only."""
    samples: int = Field(default=4, ge=1, le=32)
    """Further answers that 'self_consistency' compares with the one that would be served."""
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Of those further answers."""
    hold_tokens: int = Field(default=1024, ge=1, le=65_536)
    """Longest answer that is held until it was judged; see `long` for what is longer."""
    long: Long = Long.THEN
    """What becomes of a longer answer: 'then' asks the second, 'first' serves it unjudged."""
    first_s: float | None = Field(default=None, gt=0)
    """Seconds for the first's whole answer and its judgement; None: the route's first_byte_s."""

    @field_validator("threshold")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @model_validator(mode="after")
    def _fits(self) -> CascadeFields:
        low, high = _BOUNDS[self.signal]
        if not low <= self.threshold <= high:
            raise ValueError(f"threshold: {self.signal} lies in [{low:g}, {high:g}]; got {self.threshold:g}")
        if (self.signal is Signal.GRADER) != (self.grader is not None):
            raise ValueError("grader: give one with signal 'grader', and only then")
        return self


class CascadeNote(Record):
    """What a cascade did with one request, in its log row."""

    by: str
    """Upstream whose answer the client got."""
    reason: Why | None = None
    """Why that was the second; None: the first's answer was served."""
    signal: float | None = None
    """As measured on the first's answer; None when it was not."""
    first: str
    """The first upstream."""
    first_prompt_tokens: int = 0
    """Prompt tokens that the first was asked, samples included; the row's own counts are the answer's."""
    first_completion_tokens: int = 0
    """Tokens that the first made, samples included."""
