"""The report's nouns: everything the page, the Markdown and the JSON say, as data.

`report.json` is `Report` as it is written here; `Report.model_json_schema()` is its schema. Seconds are
wall-clock seconds since the rollout was asked for unless a name says otherwise; e-values are natural logs.
Knows nothing about where the facts come from or how they look.
"""

from __future__ import annotations

from pydantic import Field

from contracts.config import Record
from contracts.gates import Verdict
from contracts.metrics import MetricKind, Role
from contracts.rollout import Phase, RolloutSpec

FORMAT = 1
"""Rises when a field changes its meaning."""


class Move(Record):
    """A line of the timeline: the rollout changed phase or step, or somebody did something to it."""

    at: float
    """Unix seconds."""
    seconds: float
    what: str
    phase: Phase
    weight: float
    reason: str
    notes: tuple[str, ...] = ()


class TestSeries(Record):
    """Both e-processes of one metric at every look."""

    metric: str
    log_harm: tuple[float, ...]
    log_noninferior: tuple[float, ...]


class Series(Record):
    """What every look saw; all tuples are as long as `seconds`."""

    seconds: tuple[float, ...] = ()
    weight: tuple[float, ...] = ()
    """The canary's share after the look."""
    requests: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Arm → counted requests so far."""
    tests: tuple[TestSeries, ...] = ()


class Thresholds(Record):
    """What the e-values are held against (logs)."""

    log_harm_each: float
    """One guardrail's."""
    log_harm_mean: float
    log_promote: float


class Sample(Record):
    """What one arm showed on one metric: `bad` of `n`, or the mean of `n` scores."""

    n: int
    bad: int | None = None
    mean: float | None = None
    """The share of bad ones, or the mean score; None without data."""


class Interval(Record):
    """A difference canary - stable with a confidence sequence around it, at every look."""

    seconds: tuple[float, ...]
    estimate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    alpha: float
    """The whole sequence covers the true difference with probability 1 - alpha."""


class Comparison(Record):
    """Both arms on one metric, at one threshold where it has several."""

    threshold_s: float | None = None
    stable: Sample
    canary: Sample
    interval: Interval | None = None
    """None where there is no data, or no sequence for this kind of metric."""


class MetricReport(Record):
    """One metric: what it asks, what was seen, what its tests say."""

    name: str
    kind: MetricKind
    role: Role
    question: str
    """What is counted, in words."""
    margin: float
    tolerance: float
    better: bool
    verdict: Verdict
    log_harm: float
    log_harm_at: float
    """What shown harm is on this metric, alone among those of its role."""
    log_noninferior: float
    comparisons: tuple[Comparison, ...] = ()


class Quantile(Record):
    """A quantile as far as buckets know it: above `above_s`, at most `at_most_s`."""

    q: float
    above_s: float
    at_most_s: float | None
    """None: beyond the last bucket."""


class Latency(Record):
    """Latencies of an arm's answered requests, per bucket of LATENCY_BUCKETS_S and one beyond."""

    n: int
    buckets: tuple[int, ...]
    quantiles: tuple[Quantile, ...] = ()


class Cost(Record):
    """What 1000 requests of an arm cost, or why that is not known."""

    per_1000: float | None = None
    at_full_traffic: float | None = None
    """Per 1000 requests if the arm had all of the route's traffic; differs for prices by the hour."""
    currency: str | None = None
    said: str
    """How it was computed, or what is missing."""


class ArmReport(Record):
    """One arm over the whole rollout."""

    arm: str
    upstream: str
    requests: int
    errors: int
    ttft: Latency
    e2e: Latency
    cost: Cost


class SampleRatio(Record):
    """Did the arms get the shares of traffic that the split says? An e-process against 'yes'."""

    canary: int
    expected: float
    """Canary requests that the weights promise for this traffic."""
    log_e: float
    log_at: float
    mismatch: bool


class Piece(Record):
    """A stretch of a word-level diff: what stable says where canary says that; equal where both are."""

    stable: str
    canary: str

    @property
    def same(self) -> bool:
        """True for a stretch that both answers share."""
        return self.stable == self.canary


class Answer(Record):
    """An answer from the request log. `text` is None when the log does not keep it; `missing` says why."""

    request_id: str
    arm: str
    upstream: str
    status: int
    outcome: str
    grade: bool | None
    ttft_s: float | None
    e2e_s: float
    completion_tokens: int | None
    prompt: str | None
    text: str | None
    missing: str = ""
    error: str | None = None


class Example(Record):
    """One of the canary's worst answers beside what the other arm said to the same, or the most alike."""

    why: str
    """'failed', 'graded wrong' or 'slowest'."""
    canary: Answer
    other: Answer | None
    relation: str
    """How the two belong together, or why there is no other one."""
    similarity: float | None = None
    """Of the two prompts: shared words of all words, 1 for the same prompt."""
    diff: tuple[Piece, ...] = ()


class Examples(Record):
    """Worst examples, and what the log could tell of them."""

    shown: tuple[Example, ...] = ()
    rows: int = 0
    """Rows of this rollout in the request log."""
    said: str = ""


class Audit(Record):
    """The trail this report was made of, and what replaying it says."""

    entries: int
    ticks: int
    exact: bool
    mismatches: tuple[str, ...]
    digest: str
    """sha256 of the status; replaying the trail gives the same one, bit for bit."""


class Report(Record):
    """Everything that is said about one rollout."""

    format: int = FORMAT
    made_at: float
    """Unix seconds."""
    id: str
    route: str
    model_ref: str
    ab_test: bool
    stable: str
    candidate: str
    phase: Phase
    decision: str | None
    headline: str
    """What was decided, in a few words."""
    sentence: str
    """What was decided and why."""
    started_at: float
    """Unix seconds."""
    seconds: float
    """From the request to the last thing that happened."""
    weight: float
    max_weight: float
    timeline: tuple[Move, ...]
    series: Series
    thresholds: Thresholds
    metrics: tuple[MetricReport, ...]
    arms: tuple[ArmReport, ...]
    sample_ratio: SampleRatio
    examples: Examples
    spec: RolloutSpec
    audit: Audit
    reproduce: tuple[str, ...]
    """Commands that show the same again."""
    notes: tuple[str, ...] = ()
    """What is missing, and why."""
