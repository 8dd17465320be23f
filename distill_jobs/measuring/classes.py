"""The class of an answer, and precision, recall and F1 by class.

A class is what a user's function says, or a field of a JSON answer. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from contracts.errors import ConfigError
from contracts.plugins import load_function
from distill_jobs.measuring.statistics import Statistic, by_class

ClassOf = Callable[[dict[str, Any], str], str | None]
"""(request, text) to the class of the text; None when it has none."""

_KINDS = ("precision_macro", "recall_macro", "f1_macro", "f1_weighted", "f1_worst")


def class_function(spec: str) -> ClassOf:
    """ "json:PATH" (dotted keys and list positions) or "module:function". Raises: ConfigError."""
    kind, _, path = spec.partition(":")
    if kind != "json":
        return load_function(spec, "evaluate.classes")
    keys = path.split(".")
    if not path or "" in keys:
        raise ConfigError(f"evaluate.classes: {spec!r} names no field; write e.g. json:0.tool or json:label.")
    return lambda request, text: _field(text, keys)


def _field(text: str, keys: list[str]) -> str | None:
    """A scalar of a JSON text as a class name; None when the text is not JSON or has no such scalar."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in keys:
        if isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return None
    if isinstance(value, dict | list) or value is None:
        return None
    return value if isinstance(value, str) else json.dumps(value)


def classes_of(
    classify: ClassOf, requests: Sequence[dict[str, Any]], texts: Sequence[str | None]
) -> list[str | None]:
    """The class of each text; None where there is no text or it has no class. Raises: ConfigError."""
    found: list[str | None] = []
    for request, text in zip(requests, texts, strict=True):
        one = None if text is None else classify(request, text)
        if one is not None and not isinstance(one, str):
            raise ConfigError(
                f"evaluate.classes: the function must return a string or None, not {type(one).__name__}."
            )
        found.append(one)
    return found


def class_statistics(predicted: Sequence[str | None], actual: Sequence[str | None]) -> dict[str, Statistic]:
    """Macro and weighted scores and the worst class's F1, over requests whose actual class is known.

    A predicted class that is unknown (or that no request has) is a miss of the actual one.
    """
    names = names_of(actual)
    if not names:
        return {}
    rows = _rows(predicted, actual, names)
    return {kind: Statistic(rows, kind) for kind in _KINDS}


def names_of(actual: Sequence[str | None]) -> list[str]:
    """The actual classes, sorted."""
    return sorted({a for a in actual if a is not None})


def table(predicted: Sequence[str | None], actual: Sequence[str | None]) -> list[dict[str, float | str]]:
    """Precision, recall, F1 and support of each class, by name."""
    names = names_of(actual)
    if not names:
        return []
    precision, recall, f1, support = by_class(_rows(predicted, actual, names).sum(0))
    return [
        {"class": n, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for n, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
    ]


def _rows(predicted: Sequence[str | None], actual: Sequence[str | None], names: list[str]) -> np.ndarray:
    """[requests, 3 * classes]: hit, predicted and actual, one-hot."""
    index = {name: i for i, name in enumerate(names)}
    rows = np.zeros((len(actual), 3, len(names)))
    for i, (p, a) in enumerate(zip(predicted, actual, strict=True)):
        if a is None:
            continue
        rows[i, 2, index[a]] = 1
        if p in index:
            rows[i, 1, index[p]] = 1
            rows[i, 0, index[p]] = p == a
    return rows.reshape(len(actual), -1)
