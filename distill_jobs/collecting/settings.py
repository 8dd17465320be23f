"""What collect may be told beyond the log window: further sources, rules, ranking, redaction, pruning,
balance and difficulty. Importable without ray or torch; config.py holds the section these are part of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from contracts.config import StrictConfig


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as err:
        raise ValueError(f"{text!r} is no regular expression: {err}") from err
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class SourceConfig(StrictConfig):
    """Files of {"request": OpenAI chat body, "answer"?: text} rows beside the request log."""

    kind: Literal["jsonl", "parquet"]
    """jsonl: a JSON object a line. parquet: columns `request` (JSON text or struct) and `answer` (text)."""
    path: Path
    """A file, or a folder whose files with the kind's ending are taken (not its subfolders)."""
    name: str = Field(default="files", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Whose rows they are: what the card and the samples' `source` call them."""
    route: str | None = None
    """Route that the rows count as, where `collect.route` selects one; None: they belong to every route."""
    licence: str = "unknown"
    """Licence of the rows, copied into the card."""


class RulesConfig(StrictConfig):
    """Samples that are dropped for what their texts say. Patterns are searched for, not matched whole."""

    drop_request: tuple[Pattern, ...] = ()
    """Regular expressions; a request that holds one is dropped (`drop_request`)."""
    require_request: tuple[Pattern, ...] = ()
    """Regular expressions; a request that lacks one is dropped (`require_request`)."""
    drop_answer: tuple[Pattern, ...] = ()
    """Regular expressions; an answer that holds one is dropped (`drop_answer`)."""
    require_answer: tuple[Pattern, ...] = ()
    """Regular expressions; an answer that lacks one is dropped (`require_answer`)."""
    min_request_chars: int = Field(default=0, ge=0)
    """Shortest text of a request without the system's messages (`request_short`)."""
    max_request_chars: int | None = Field(default=None, ge=1)
    """Longest text of a request without the system's messages (`request_long`)."""
    min_answer_chars: int = Field(default=0, ge=0)
    """Shortest answer (`answer_short`)."""
    max_answer_chars: int | None = Field(default=None, ge=1)
    """Longest answer (`answer_long`)."""
    drop_refusals: bool = False
    """Drop answers that begin as refusals do ("I'm sorry, but I can't …", 「抱歉，我无法」; `refusal`)."""
    answer_schema: dict[str, Any] | None = None
    """JSON Schema that an answer must parse to and obey (`not_json`, `schema`)."""

    @model_validator(mode="after")
    def _a_schema(self) -> RulesConfig:
        if self.answer_schema is not None:
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for

            try:
                validator_for(self.answer_schema).check_schema(self.answer_schema)
            except SchemaError as err:
                raise ValueError(f"answer_schema is no JSON Schema: {err.message}") from err
        return self


class RankConfig(StrictConfig):
    """Keep the best share of the samples by the score of a grader or judge."""

    score: str
    """Name of the grader or judge in the log's `scores`; files may carry a `scores` object too."""
    keep: float = Field(gt=0, le=1)
    """Share of the scored samples that stays, best first; of equal scores the smaller digest wins."""
    unscored: Literal["keep", "drop"] = "keep"
    """What becomes of samples without the score. Corrected ones always stay."""


class RedactConfig(StrictConfig):
    """Personal data and secrets replaced by labels before anything else is done with a row."""

    detectors: tuple[str, ...] = ("email", "phone", "credit_card", "iban", "ip", "api_key")
    """Built-in detectors, or your own as "module:function"."""


class PruneConfig(StrictConfig):
    """Constant prompt text taken out of the students' inputs: what every request of a route says teaches
    nothing and costs prefill at every request. Serving must take out the same text; the manifest has it.
    """

    share: float = Field(default=0.98, gt=0.5, le=1)
    """Share of a route's samples that must have a text in common before it is taken out."""
    min_chars: int = Field(default=32, ge=1)
    """Shortest text worth taking out."""


class BalanceConfig(StrictConfig):
    """The training samples' classes brought to a target distribution."""

    classes: str
    """ "json:FIELD": that field of the answer (dots for nested ones); or "module:function", called with
    (request, answer) and returning a class name or None."""
    target: dict[str, Annotated[float, Field(gt=0)]] | Literal["uniform"] = "uniform"
    """Class → share (normalised to 1). Samples of classes not named keep weight 1 and are never dropped."""
    by: Literal["weight", "drop", "repeat"] = "weight"
    """weight: column `weight`. drop: samples of classes that are too frequent are left out. repeat: those of
    rare classes are written several times (at most `most_repeats`)."""
    most_repeats: int = Field(default=10, ge=1)
    """Largest number of copies of one sample, and the largest weight."""

    @model_validator(mode="after")
    def _classes(self) -> BalanceConfig:
        if ":" not in self.classes:
            raise ValueError(f'classes: {self.classes!r} is neither "json:FIELD" nor "module:function"')
        return self


class DifficultyConfig(StrictConfig):
    """Column `difficulty` and the bin each sample falls into, for a curriculum."""

    measure: Literal["auto", "logprob", "text"] = "auto"
    """logprob: the teacher's mean negative log-probability a token, where answers were logged with
    `logprobs`. text: log of the length times the mean rarity of the words. auto: logprob when all samples
    have it.
    """
    bins: int = Field(default=5, ge=2, le=100)
    """Equally large bins, 0 the easiest: column `bin`."""
