"""The committed dashboards as Grafana would use them: panels, their queries, variables, and values put in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "dashboards"
_LABEL_VALUES = re.compile(r"^label_values\((?P<selector>.+), (?P<label>\w+)\)$")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


@dataclass(frozen=True)
class Target:
    """One query of one panel."""

    dashboard: str
    panel: str
    expr: str
    instant: bool

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return f"{self.dashboard} / {self.panel}: {self.expr}"


@dataclass(frozen=True)
class Choice:
    """One variable that asks Prometheus for the values of a label."""

    dashboard: str
    name: str
    selector: str
    label: str
    many: bool


@cache
def dashboards() -> dict[str, dict[str, Any]]:
    """uid → the committed JSON."""
    found = [json.loads(f.read_text()) for f in sorted(FOLDER.glob("*.json"))]
    return {d["uid"]: d for d in found}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that is drawn but the rows' titles."""
    return [p for p in dashboard["panels"] if p["type"] != "row"]


@cache
def targets() -> list[Target]:
    """Every query of every panel."""
    return [
        Target(uid, panel["title"], target["expr"], bool(target.get("instant")))
        for uid, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


@cache
def choices() -> list[Choice]:
    """Every variable that is a query, in the order of its dashboard."""
    found = []
    for uid, dashboard in dashboards().items():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            asked = _LABEL_VALUES.match(variable["query"]["query"])
            assert asked, f"{uid}: {variable['name']} is no label_values(selector, label)"
            found.append(
                Choice(uid, variable["name"], asked["selector"], asked["label"], bool(variable["multi"]))
            )
    return found


def filled(expr: str, values: dict[str, str]) -> str:
    """An expression with variables put in, as Grafana does. Raises: KeyError on an unknown one."""
    return _VARIABLE.sub(lambda found: values[found[1]], expr)


def intervals(rate: str = "1m", span: str = "1h") -> dict[str, str]:
    """Grafana's own variables."""
    return {"__rate_interval": rate, "__range": span}


def chosen(values: list[str]) -> str:
    """Several values as Grafana writes them into a regular expression inside a PromQL string."""
    return "|".join(re.sub(r"([\\^$*+?.()|{}\[\]/])", r"\\\\\1", value) for value in values)
