"""What a user says about an answer, joined to its request by the request's id.

Accepted by serve.router (`POST /v1/feedback`), read by whoever trains or compares. Knows nothing about HTTP
or storage.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from contracts.config import Record
from contracts.traffic import LogMode


class Feedback(Record):
    """One person's judgement. The same id twice is one judgement, the later one counts."""

    id: str = Field(min_length=1, max_length=128)
    """Made by the client, so that a retry is not a second vote; by default the request's id."""
    request_id: str = Field(min_length=1, max_length=128)
    ts: float
    """Unix seconds at arrival."""
    good: bool | None = None
    """Thumb up or down."""
    score: float | None = Field(default=None, ge=0.0, le=1.0)
    comment: str | None = Field(default=None, max_length=10_000)
    correction: str | None = Field(default=None, max_length=100_000)
    """The answer it should have been."""

    @model_validator(mode="after")
    def _says_something(self) -> Feedback:
        if self.good is None and self.score is None and not self.comment and self.correction is None:
            raise ValueError("give at least one of 'good', 'score', 'comment' and 'correction'")
        return self


class FeedbackRow(Feedback):
    """One line of the feedback segments beside the request log; of lines with one id the last counts."""

    route: str
    arm: str
    """The arm that the request was assigned to."""
    rollout_id: str | None = None
    split_version: int
    log_mode: LogMode
    """How much of the request was logged: without its texts, comment and correction are not kept either."""
    subjects: tuple[str, ...] = ()
    """Whose request it was, as in the request log, so that an erasure finds it."""
