"""Grading nouns: who scores answers, on what share of them, and against what shadow pairs are compared.

Read from the stack's configuration (`graders:`); used by serve.router, serve.rollout and the CLI. A score is
in [0, 1], or there is none (the grader abstains). Knows nothing about how a score is found.
"""

from __future__ import annotations

import re
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from contracts.config import Record, StrictConfig, canonical_json
from contracts.metrics import FEEDBACK, GRADER_NAME
from contracts.traffic import NAME, Upstream

FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
STABLE = "stable"
"""`against`: the reference of a pair is the stable arm's own answer."""

MAX_GRADED_CHARS = 200_000
"""Longer answers are not graded: a grader must not cost more than the answer did."""
_VERSION_CHARS = 8
_JUDGE_NAME_CHARS = 31
"""A judge's name, a dash and its version fit GRADER_NAME."""


class GraderKind(StrEnum):
    """How an answer is scored."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EXACT = "exact"
    FUNCTION = "function"
    JUDGE = "judge"


class Mode(StrEnum):
    """What a grader is shown."""

    SCORE = "score"
    """One answer; on a pair its two scores are compared."""
    PAIRWISE = "pairwise"
    """Both answers of a pair; it says which is better, and never sees served answers."""


class GraderFields(StrictConfig):
    """What every grader has."""

    sample: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the answers (by their request's id) or of the pairs that it is shown."""
    routes: tuple[str, ...] = ()
    """Routes it grades; empty: all of them."""
    against: str | None = Field(default=STABLE, pattern=NAME)
    """Reference of shadow pairs: 'stable', or a declared upstream (the teacher); null: pairs are not
    graded."""

    @property
    def mode(self) -> Mode:
        """Score, unless the kind says otherwise."""
        return Mode.SCORE

    def grades(self, route: str) -> bool:
        """True for a route it is for."""
        return not self.routes or route in self.routes


class JsonSchemaGrader(GraderFields):
    """1 when the answer is JSON that the schema accepts, 0 otherwise."""

    model_config = ConfigDict(populate_by_name=True, frozen=True, extra="forbid", validate_default=True)

    kind: Literal[GraderKind.JSON_SCHEMA]
    json_schema: dict[str, Any] = Field(alias="schema")
    """JSON Schema (2020-12 unless it names another draft). References are only followed inside it."""


class RegexGrader(GraderFields):
    """1 when the pattern is found in the answer, 0 otherwise."""

    kind: Literal[GraderKind.REGEX]
    pattern: str = Field(min_length=1, max_length=1000)
    """Python regular expression; matched against the whole answer only with `^…$` or `\\A…\\Z` in it."""
    max_chars: int = Field(default=10_000, ge=1, le=MAX_GRADED_CHARS)
    """Longer answers are not graded (abstained): some patterns take exponential time, so text and time are
    bounded; a search that runs into the time limit is an error of the grader, not of the answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as err:
            raise ValueError(f"is not a regular expression: {err}") from err
        return value


class ExactGrader(GraderFields):
    """1 when the answer is the request's reference, 0 otherwise; abstains without a reference."""

    kind: Literal[GraderKind.EXACT]
    reference: str = Field(default="reference", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Key of the request's `metadata` that holds the right answer."""
    strip: bool = True
    """White space around the answer does not count, runs of it count as one space."""
    ignore_case: bool = False
    as_json: bool = False
    """Compare as JSON: order of keys and white space do not count; 1 and 1.0 differ, as true and 1 do."""


class FunctionGrader(GraderFields):
    """A Python callable: `(request, text)`, or pairwise `(request, canary_text, reference_text)`.

    It returns True, False, a number in [0, 1], or None to abstain; pairwise 1 says that the canary's answer
    is better, ½ a tie.
    """

    kind: Literal[GraderKind.FUNCTION]
    function: str = Field(pattern=FUNCTION)
    """'module:function', called off the hot path."""
    pairwise: bool = False

    @property
    def mode(self) -> Mode:
        """As `pairwise` says."""
        return Mode.PAIRWISE if self.pairwise else Mode.SCORE


class JudgeGrader(GraderFields):
    """A language model behind a declared upstream, asked at /v1/chat/completions."""

    kind: Literal[GraderKind.JUDGE]
    upstream: str = Field(pattern=NAME)
    """Name of a declared upstream. It should be no arm of the route that it judges."""
    pairwise: bool = True
    """False: it scores one answer from 0 to 10 instead of comparing two."""
    rubric: str = Field(default="", max_length=20_000)
    """What makes an answer good, in words; the built-in rubric when empty."""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0, "max_tokens": 64})
    """Fields of its requests besides model and messages; a reasoning model needs more tokens than this."""
    per_hour: int | None = Field(default=600, ge=1)
    """Most calls an hour and router process; null: no bound. What is over is dropped and counted."""
    max_in_flight: int = Field(default=4, ge=1)
    """Calls running at once, per router process."""
    max_queued: int = Field(default=64, ge=0)
    """Answers and pairs waiting for their call; further ones are dropped and counted."""
    timeout_s: float = Field(default=60.0, gt=0)
    """For one call."""
    max_chars: int = Field(default=16_000, ge=100)
    """Of the conversation and of each answer; what is longer is not judged."""
    min_agreement: float = Field(default=0.8, ge=0, le=1)
    """Agreement with people that `stillhouse judge check` must find before a guardrail may rest on it."""
    min_anchors: int = Field(default=20, ge=1)
    """Anchors that such a check must have at least."""
    check_max_age_days: float = Field(default=7.0, gt=0)
    """A check older than this counts no more: models behind URLs drift."""

    @field_validator("parameters")
    @classmethod
    def _ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := {"model", "messages", "stream", "n"} & set(value):
            raise ValueError(f"{', '.join(sorted(taken))}: set by the router, not here")
        return value

    @property
    def mode(self) -> Mode:
        """As `pairwise` says."""
        return Mode.PAIRWISE if self.pairwise else Mode.SCORE


Grader = Annotated[
    JsonSchemaGrader | RegexGrader | ExactGrader | FunctionGrader | JudgeGrader, Field(discriminator="kind")
]
"""Any grader of the configuration."""


class PrometheusConfig(StrictConfig):
    """The external Prometheus that metrics of kind `query` are asked of."""

    url: str = Field(pattern=r"^https?://[^/\s]+\S*$")
    """Base URL, e.g. http://prometheus:9090, with whatever prefix it is served under."""
    timeout_s: float = Field(default=3.0, gt=0, le=5)
    """For one query. A look of a rollout takes three times this at most; the controller waits meanwhile."""
    lag_s: float = Field(default=30.0, ge=0)
    """Looks end this long before now: two scrape intervals, so that no sample of a window comes after it."""
    bearer_token_env: str | None = None
    """Environment variable that holds the token; the token itself is never stored."""


class GraderSet(StrictConfig):
    """Graders by name, and the upstreams that they name."""

    graders: dict[str, Grader] = Field(default_factory=dict)
    """Name (as metrics say it) → grader."""

    @field_validator("graders")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, grader in value.items():
            if not re.match(GRADER_NAME, name):
                raise ValueError(f"{name!r}: a grader's name is lower-case letters, digits, '-' and '_'")
            if name == FEEDBACK:
                raise ValueError(f"{name!r} is what users say; give the grader another name")
            if isinstance(grader, JudgeGrader) and len(name) > _JUDGE_NAME_CHARS:
                raise ValueError(f"{name!r}: a judge's name has at most {_JUDGE_NAME_CHARS} characters")
            if grader.mode is Mode.PAIRWISE and grader.against is None:
                raise ValueError(f"{name}: a pairwise grader needs 'against': 'stable' or an upstream")
        return value

    def judges(self) -> dict[str, JudgeGrader]:
        """The graders that are language models."""
        return {name: g for name, g in self.graders.items() if isinstance(g, JudgeGrader)}

    def upstreams_named(self) -> dict[str, str]:
        """Upstream → the field that names it."""
        named = {g.against: f"graders.{n}.against" for n, g in self.graders.items() if g.against is not None}
        named.pop(STABLE, None)
        named.update({g.upstream: f"graders.{n}.upstream" for n, g in self.judges().items()})
        return named


def judge_version(grader: JudgeGrader, upstream: Upstream, template: str) -> str:
    """Digest of what a judge's verdicts depend on: who is asked, which model, with which words.

    Where an upstream answers (its URL or application) counts, its key does not.
    """
    asked = {
        "upstream": upstream.name,
        "target": upstream.app or upstream.url,
        "model": upstream.model,
        "digest": upstream.digest,
        "pairwise": grader.pairwise,
        "parameters": grader.parameters,
        "template": template,
        "rubric": grader.rubric,
    }
    return sha256(canonical_json(asked).encode()).hexdigest()[:_VERSION_CHARS]


class ScoreRow(Record):
    """One line of the `scores-…` segments beside the request log: a judge's score, or a pair's.

    `score` is of one answer, or of a pair (canary - reference + 1) / 2: 1 a win, ½ a tie, 0 a loss of the
    canary. Holds no text; the answers are in the request log, joined by `request_id` and `reference_id`.
    """

    id: str
    """Of this line: grader and request."""
    request_id: str
    """The judged answer's request; of a pair the canary's copy."""
    reference_id: str | None = None
    """Of a pair: the request whose answer it was compared with."""
    pair_id: str | None = None
    """Of a pair: the client's request."""
    ts: float
    route: str
    arm: str
    """The judged arm, 'pair' for a pair."""
    rollout_id: str | None = None
    split_version: int
    grader: str
    """Name under which it is counted; a judge's ends in its version."""
    against: str | None = None
    """Of a pair: 'stable' or the reference's upstream."""
    first: Literal["canary", "reference"] | None = None
    """Of a judged pair: whose answer the judge saw first."""
    score: float = Field(ge=0, le=1)
    subjects: tuple[str, ...] = ()
    """Whose request it was, as in the request log, so that an erasure finds it."""


class JudgeCheck(Record):
    """How a judge did on answers that people had judged."""

    name: str
    grader: str
    """The judge's name with its version."""
    at: float
    by: str
    anchors: int
    agreed: int
    agreement: float
    """Share of the anchors on which judge and people said the same (a score: within `within` of theirs)."""
    low: float
    high: float
    """Wilson's 95 % interval of the agreement."""
    kappa: float | None
    """Cohen's, quadratically weighted for scores; None when one of them always said the same."""
    first_share: float | None = None
    """Of decided verdicts in both orders, the share for the answer shown first; ½ is no position bias."""
    flipped: float | None = None
    """Share of the anchors whose verdict changed with the order."""
    abstained: int = 0
    """Anchors without a readable verdict; they count as disagreement."""

    @model_validator(mode="after")
    def _counts(self) -> JudgeCheck:
        if not 0 <= self.agreed <= self.anchors:
            raise ValueError(f"agreed must be between 0 and anchors, not {self.agreed} of {self.anchors}")
        return self
