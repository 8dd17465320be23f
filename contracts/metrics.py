"""Metric nouns: what a rollout is judged by, and the integer counts that every judgement is made of.

Counts are integers per arm, so every decision can be replayed bit for bit. Knows nothing about storage, HTTP
or statistics.
"""

from __future__ import annotations

from enum import StrEnum
from operator import add

from pydantic import Field, model_validator

from contracts.config import Record

LATENCY_BUCKETS_S: tuple[float, ...] = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.030, 0.040, 0.060, 0.080, 0.100, 0.150, 0.200, 0.300,
    0.400, 0.600, 0.800, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0,
)  # fmt: skip
"""Upper edges in seconds of the ledger's latency counts, by which rollouts are judged: fine enough for small
models. Prometheus gets fewer (serve.router.metrics), because every arm of every route multiplies them."""

SCORE_STEPS = 20
"""Scores in [0, 1] are counted on a grid of this many steps: 0, 0.05, …, 1. A failed grade is 0."""
SCORE_VALUES: tuple[float, ...] = tuple(i / SCORE_STEPS for i in range(SCORE_STEPS + 1))

GRADE = "grade"
"""The grader that metrics mean when they name none."""
FEEDBACK = "feedback"
"""Name under which users' judgements are counted."""

PAIR = "pair"
"""Arm of the ledger under which judged pairs are counted: scores are the canary's side of each."""

GRADER_NAME = r"^[a-z][a-z0-9_-]{0,39}$"


class Role(StrEnum):
    """What a metric may do to a rollout."""

    GUARDRAIL = "guardrail"
    """Shown harm rolls back; must be shown no worse before a promotion."""
    OBJECTIVE = "objective"
    """Must be shown no worse (or better) before a promotion; shown harm holds, a person decides."""
    INFO = "info"
    """Reported, decides nothing."""


class MetricKind(StrEnum):
    """What is counted per request."""

    ERRORS = "errors"
    TTFT = "ttft"
    E2E = "e2e"
    QUALITY = "quality"
    """A grader's verdict: pass or fail (a score below `pass_at`)."""
    SCORE = "score"
    """A grader's, or users', score in [0, 1] of each arm's own answers: compared by their means."""
    PAIRS = "pairs"
    """Both arms answered the same request (a shadow); a judge says who is better."""
    QUERY = "query"
    """Asked of an external Prometheus."""


GRADED_KINDS = (MetricKind.QUALITY, MetricKind.SCORE, MetricKind.PAIRS)
LATENCY_KINDS = (MetricKind.TTFT, MetricKind.E2E)


class QuerySpec(Record):
    """PromQL that judges an arm; `{{arm}}`, `{{upstream}}` and `{{route}}` are filled in before it is asked.

    Either counters (`bad` of `total`, tested as counts between two looks) or one `value` with a bound.
    Empty, NaN or unknown is NO_DATA, never a pass.
    """

    bad: str | None = None
    total: str | None = None
    value: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    failures: int = Field(default=3, ge=1)
    """Looks in a row on which `value` must break its bound before that is harm."""

    @model_validator(mode="after")
    def _one_form(self) -> QuerySpec:
        counters, value = (self.bad, self.total), self.value
        if value is None and None in counters:
            raise ValueError("query: give 'bad' and 'total' (counters), or 'value' with a bound")
        if value is not None and counters != (None, None):
            raise ValueError("query: 'bad'/'total' and 'value' exclude each other")
        if value is not None and self.at_most is None and self.at_least is None:
            raise ValueError("query: 'value' needs 'at_most' or 'at_least'")
        return self

    def keeps(self, value: float) -> bool:
        """True when a value is within its bounds."""
        low, high = self.at_least, self.at_most
        return (low is None or value >= low) and (high is None or value <= high)


class MetricSpec(Record):
    """One metric of a rollout: a harm test and a non-inferiority test on the same counts."""

    kind: MetricKind
    name: str = Field(default="", pattern=r"^$|^[a-z][a-z0-9_.-]{0,59}$")
    """Unique within a rollout; default: the kind, with the grader's name where there is one."""
    role: Role = Role.GUARDRAIL
    margin: float = Field(gt=0, lt=1)
    """Non-inferiority margin Δ: promote only if 'worse than stable by Δ or more' is refuted. A difference of
    risks (errors, slow, failed grades) or of mean scores. Pairs (below 0.5): how far the mean of win = 1,
    tie = ½, loss = 0 may be below ½; where a pair is two scores, of (canary - stable + 1) / 2, so a margin of
    0.05 there is a score difference of 0.10. A query of one value has its own bounds and ignores it."""
    tolerance: float | None = Field(default=None, ge=0, lt=1)
    """Harm tolerance, on the margin's scale: roll back if 'worse than stable by more' is shown. Default:
    margin / 4."""
    better: bool = False
    """Must be shown better than stable, not only no worse."""
    thresholds_s: tuple[float, ...] = ()
    """Edges from LATENCY_BUCKETS_S, ttft and e2e only: harm at any counts, all must be non-inferior."""
    grader: str = Field(default=GRADE, pattern=GRADER_NAME)
    """Whose scores (quality, score, pairs); 'feedback' are the users'."""
    pass_at: float = Field(default=1.0, gt=0, le=1)
    """Quality only: a score below this is a failed grade."""
    query: QuerySpec | None = None

    @model_validator(mode="after")
    def _check(self) -> MetricSpec:
        if self.kind in LATENCY_KINDS:
            wrong = [t for t in self.thresholds_s if t not in LATENCY_BUCKETS_S]
            if not self.thresholds_s or wrong:
                raise ValueError(
                    f"metric {self.kind}: thresholds_s must be bucket edges; {wrong or 'none given'}: "
                    f"choose from {LATENCY_BUCKETS_S}"
                )
        elif self.thresholds_s:
            raise ValueError(f"metric {self.kind}: thresholds_s is only for latency metrics")
        if self.tolerance is not None and self.tolerance >= self.margin:
            raise ValueError(f"metric {self.kind}: tolerance must be smaller than margin {self.margin}")
        if (self.kind is MetricKind.QUERY) != (self.query is not None):
            raise ValueError(f"metric {self.kind}: 'query' belongs to kind query, and only to it")
        if self.kind is MetricKind.PAIRS and self.margin >= 0.5:
            raise ValueError(f"metric pairs: margin must be below 0.5 (a mean of wins), got {self.margin}")
        if self.kind not in GRADED_KINDS and self.grader != GRADE:
            raise ValueError(f"metric {self.kind}: 'grader' is only for quality, score and pairs")
        if self.kind is MetricKind.QUERY and not self.name:
            raise ValueError("metric query: give it a name")
        return self

    @property
    def key(self) -> str:
        """How the metric is called in status, audit and metrics; unique within a rollout."""
        if self.name:
            return self.name
        return self.kind.value if self.grader == GRADE else f"{self.kind.value}.{self.grader}"

    @property
    def harm_tolerance(self) -> float:
        """The tolerance in force."""
        return self.margin / 4 if self.tolerance is None else self.tolerance


class ArmCounts(Record):
    """Integer counts of one arm over some time: the sufficient statistics of every test.

    `ttft` and `e2e` are per-bucket counts over LATENCY_BUCKETS_S plus one overflow bucket (length 31, not
    cumulative); they hold counted, non-failed requests. `scores` holds, by grader, how often each of
    SCORE_VALUES was given (length 21); in a window's `pairs` the value is (canary - stable + 1) / 2.
    """

    n: int = Field(default=0, ge=0)
    errors: int = Field(default=0, ge=0)
    ttft: tuple[int, ...] = ()
    e2e: tuple[int, ...] = ()
    scores: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    def plus(self, other: ArmCounts) -> ArmCounts:
        """Sum of two counts."""
        if not (self.n or self.errors or self.scores or self.ttft or self.e2e):
            return other
        names = dict.fromkeys((*self.scores, *other.scores))
        # Sums of valid counts are valid: validating them again would be a third of a controller's tick.
        return ArmCounts.model_construct(
            n=self.n + other.n,
            errors=self.errors + other.errors,
            ttft=_add(self.ttft, other.ttft),
            e2e=_add(self.e2e, other.e2e),
            scores={name: _add(self.scores.get(name, ()), other.scores.get(name, ())) for name in names},
        )

    def graded(self, grader: str = GRADE) -> int:
        """Answers that a grader scored."""
        return sum(self.scores.get(grader, ()))

    def failed(self, grader: str = GRADE, pass_at: float = 1.0) -> int:
        """Answers whose score was below `pass_at`."""
        return sum(self.scores.get(grader, ())[: score_bin(pass_at)])


def bucket_quantile(buckets: tuple[int, ...], q: float) -> float | None:
    """Upper edge in seconds of a quantile's bucket; None without counts, or when it is the overflow."""
    left = q * sum(buckets)
    if left <= 0:
        return None
    for count, edge in zip(buckets, LATENCY_BUCKETS_S, strict=False):
        left -= count
        if left <= 0:
            return edge
    return None


def score_bin(score: float) -> int:
    """Where a score in [0, 1] is counted. Raises ValueError outside, and for NaN."""
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"a score must be in [0, 1], not {score!r}")
    return round(score * SCORE_STEPS)


def pass_fail(passed: int, failed: int) -> tuple[int, ...]:
    """The score counts of verdicts."""
    return (failed, *(0,) * (SCORE_STEPS - 1), passed)


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if not a or not b:
        return a or b
    if len(a) != len(b):
        raise ValueError(f"cannot add counts of {len(a)} and of {len(b)} buckets")
    return tuple(map(add, a, b))
