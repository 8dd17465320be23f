"""The rule files of this folder as Prometheus itself reads them, and the same rules on another time scale.

A PrometheusRule object wraps the groups of a rule file; tests and a Prometheus without the operator need the
groups alone. Knows nothing about what the rules say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
_UNITS_MS = {
    "ms": 1,
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 604_800_000,
    "y": 31_536_000_000,
}
_PART = re.compile(r"(\d+)(ms|[smhdwy])")
_DURATION = re.compile(r"(?:\d+(?:ms|[smhdwy]))+")
_QUOTED = r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)"""
_IN_EXPRESSION = re.compile(_QUOTED + r"|(\[[^\]]*\])|(\boffset\s+-?)(\S+)")


def rule_files(folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """File name → rule groups of the PrometheusRule objects in a folder, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if document is not None and document.get("kind") == "PrometheusRule":
                found.setdefault(file.name, []).extend(document["spec"]["groups"])
    return found


def read_groups(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All of their groups: what is promised, then what is recorded, then the alerts that read it."""
    groups = [group for found in rule_files(folder).values() for group in found]
    return sorted(groups, key=lambda g: (".alerts" in g["name"], "objectives" not in g["name"]))


def write_rules(target: Path, groups: list[dict[str, Any]]) -> None:
    """A rule file for Prometheus and promtool."""
    target.write_text(yaml.safe_dump({"groups": groups}, width=1_000, sort_keys=False, allow_unicode=True))


def scale(groups: Iterable[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """The same rules with every duration (interval, for, windows, offsets) divided by `factor`.

    No duration falls under a second. Numbers in an expression are left alone, as `> 15` may mean anything.
    Raises: ValueError for a duration that Prometheus would not read either.
    """
    return [_scaled_group(group, lambda text: scale_duration(text, factor)) for group in groups]


def scale_duration(text: str, factor: float) -> str:
    """'1h30m' divided by 60 is '90s'; milliseconds are kept, a second is the least. '0s' stays."""
    if text in ("0", "0s"):
        return "0s"
    if _DURATION.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a duration such as 30s, 5m or 1h30m")
    milliseconds = sum(int(n) * _UNITS_MS[unit] for n, unit in _PART.findall(text))
    scaled = max(1_000, round(milliseconds / factor))
    return f"{scaled // 1_000}s" if scaled % 1_000 == 0 else f"{scaled}ms"


def _scaled_group(group: dict[str, Any], scaled: Callable[[str], str]) -> dict[str, Any]:
    rules = []
    for rule in group["rules"]:
        times = {key: scaled(rule[key]) for key in ("for", "keep_firing_for") if key in rule}
        rules.append({**rule, **times, "expr": _scaled_expression(rule["expr"], scaled)})
    interval = {"interval": scaled(group["interval"])} if "interval" in group else {}
    return {**group, **interval, "rules": rules}


def _scaled_expression(expression: str, scaled: Callable[[str], str]) -> str:
    """Windows in brackets and offsets; what stands in quotes is no duration."""

    def replaced(found: re.Match[str]) -> str:
        quoted, window, offset, by = found.groups()
        if quoted is not None:
            return str(quoted)
        if window is not None:
            return _DURATION.sub(lambda m: scaled(m[0]), str(window))
        return f"{offset}{scaled(by.rstrip(')'))}{by[len(by.rstrip(')')) :]}"

    return _IN_EXPRESSION.sub(replaced, expression)
