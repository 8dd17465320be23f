"""The graders that need no model: JSON Schema, regular expression, exact match, a Python callable.

A grader is a plain function of the request and the answer's text. It raises when it cannot do its work; the
caller counts that and goes on. Knows nothing about who asks or what a score is used for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import regex  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import NoSuchResource

from contracts.config import canonical_json
from contracts.errors import ConfigError, DataError
from contracts.grading import (
    MAX_GRADED_CHARS,
    ExactGrader,
    FunctionGrader,
    Grader,
    JsonSchemaGrader,
    Mode,
    RegexGrader,
)
from contracts.plugins import load_function

Score = Callable[[dict[str, Any], str], float | None]
Prefer = Callable[[dict[str, Any], str, str], float | None]

_REGEX_TIMEOUT_S = 0.25


class NamedGrader(NamedTuple):
    """A grader of single answers, ready to be called."""

    name: str
    spec: Grader
    score: Score


class NamedPreference(NamedTuple):
    """A grader that compares the canary's answer with a reference, ready to be called."""

    name: str
    spec: Grader
    prefer: Prefer
    score: Score | None = None
    """Of one answer, where the comparison is the difference of two scores."""


def single_graders(graders: Mapping[str, Grader]) -> list[NamedGrader]:
    """All graders of single answers that are no judges. Raises: ConfigError naming the field."""
    found = []
    for name, spec in graders.items():
        if isinstance(spec, JsonSchemaGrader | RegexGrader | ExactGrader) or (
            isinstance(spec, FunctionGrader) and spec.mode is Mode.SCORE
        ):
            found.append(NamedGrader(name, spec, make_score(name, spec)))
    return found


def pair_graders(graders: Mapping[str, Grader]) -> list[NamedPreference]:
    """All graders of pairs that are no judges: callables on both, differences of two scores."""
    found = [NamedPreference(g.name, g.spec, difference(g.score), g.score) for g in single_graders(graders)]
    for name, spec in graders.items():
        if isinstance(spec, FunctionGrader) and spec.mode is Mode.PAIRWISE:
            found.append(NamedPreference(name, spec, _preference(name, spec)))
    return [p for p in found if p.spec.against is not None]


def make_score(name: str, spec: JsonSchemaGrader | RegexGrader | ExactGrader | FunctionGrader) -> Score:
    """The function of one grader; answers too long to grade get no score. Raises: ConfigError."""
    if isinstance(spec, JsonSchemaGrader):
        score = _by_schema(name, spec)
    elif isinstance(spec, RegexGrader):
        score = _by_regex(name, spec)
    elif isinstance(spec, ExactGrader):
        score = _by_reference(spec)
    else:
        call = load_function(spec.function, f"graders.{name}.function")

        def score(request: dict[str, Any], text: str) -> float | None:
            return as_score(call(request, text))

    return lambda request, text: None if len(text) > MAX_GRADED_CHARS else score(request, text)


def difference(score: Score) -> Prefer:
    """How much better the canary's score is, as (canary - reference + 1) / 2; None unless both have one."""

    def prefer(request: dict[str, Any], canary: str, reference: str) -> float | None:
        return paired(score(request, canary), score(request, reference))

    return prefer


def paired(canary: float | None, reference: float | None) -> float | None:
    """Two scores as the value of a pair: 1 a win by all there is, ½ a tie, 0 a loss by all there is."""
    return None if canary is None or reference is None else (canary - reference + 1.0) / 2.0


def as_score(value: object) -> float | None:
    """What a callable returned as a score. Raises: DataError for anything but a bool, [0, 1] and None."""
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value) and 0.0 <= value <= 1.0:
        return float(value)
    raise DataError(f"a grader returns True, False, a number in [0, 1] or None, not {type(value).__name__}.")


def _preference(name: str, spec: FunctionGrader) -> Prefer:
    call = load_function(spec.function, f"graders.{name}.function")
    return lambda request, canary, reference: as_score(call(request, canary, reference))


# JSON Schema ------------------------------------------------------------------------------------------


def _by_schema(name: str, spec: JsonSchemaGrader) -> Score:
    validator = schema_validator(spec.json_schema, f"graders.{name}.schema")

    def score(_request: dict[str, Any], text: str) -> float | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validator.is_valid(value) else 0.0

    return score


def schema_validator(schema: dict[str, Any], where: str) -> Validator:
    """A validator that never fetches a reference. Raises: ConfigError when the schema is none."""
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as err:
        raise ConfigError(f"{where}: is not a JSON Schema: {err.message}.") from err
    registry: Registry[Any] = Registry(retrieve=_nothing_outside)  # type: ignore[call-arg]
    return kind(schema, registry=registry)


def _nothing_outside(uri: str) -> Any:
    raise NoSuchResource(ref=uri)  # type: ignore[call-arg]


# regular expressions ----------------------------------------------------------------------------------


def _by_regex(name: str, spec: RegexGrader) -> Score:
    try:
        pattern = regex.compile(spec.pattern)
    except regex.error as err:
        raise ConfigError(f"graders.{name}.pattern: is not a regular expression: {err}.") from err

    def score(_request: dict[str, Any], text: str) -> float | None:
        if len(text) > spec.max_chars:
            return None
        # `concurrent`: without the interpreter's lock, or a slow search would hold up the event loop too.
        found = pattern.search(text, timeout=_REGEX_TIMEOUT_S, concurrent=True)
        return 0.0 if found is None else 1.0

    return score


# exact match --------------------------------------------------------------------------------------------


def _by_reference(spec: ExactGrader) -> Score:
    def score(request: dict[str, Any], text: str) -> float | None:
        metadata = request.get("metadata")
        reference = metadata.get(spec.reference) if isinstance(metadata, dict) else None
        if not isinstance(reference, str):
            return None
        return 1.0 if same(spec, text, reference) else 0.0

    return score


def same(spec: ExactGrader, text: str, reference: str) -> bool:
    """True when an answer is its reference, as far as the grader looks."""
    if spec.as_json:
        try:
            return canonical_json(json.loads(text)) == canonical_json(json.loads(reference))
        except (ValueError, RecursionError):
            return False
    return _plain(spec, text) == _plain(spec, reference)


def _plain(spec: ExactGrader, text: str) -> str:
    text = " ".join(text.split()) if spec.strip else text
    return text.casefold() if spec.ignore_case else text
