"""Prometheus' own word on every PrometheusRule: the API server does not read PromQL, promtool does.

Knows nothing about what the rules are for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from k8s.findings import Finding, Found, Object, of

_WHERE = re.compile(r'group "(?P<group>[^"]*)", rule (?P<rule>\d+), (?P<says>.*)')


def check_rules(objects: list[Object], promtool: str | None = None) -> Iterator[Finding]:
    """What promtool refuses; without promtool a finding that says so, if there is anything to check."""
    for item in objects:
        if item.get("kind") == "PrometheusRule":
            yield from of(item, _promtool(item, promtool or shutil.which("promtool")))


def _promtool(item: Object, program: str | None) -> Iterator[Found]:
    if program is None:
        yield Found(
            "spec.groups", "not checked: promtool is not on PATH (package prometheus); give --promtool"
        )
        return
    groups = (item.get("spec") or {}).get("groups") or []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rules.yaml"
        file.write_text(yaml.safe_dump({"groups": groups}))
        done = subprocess.run(
            [program, "check", "rules", str(file)], capture_output=True, text=True, timeout=120, check=False
        )
    if done.returncode == 0:
        return
    numbers = {str(group.get("name")): number for number, group in enumerate(groups)}
    said = done.stderr + done.stdout
    found = list(_WHERE.finditer(said))
    for match in found:
        group, rule = numbers.get(match["group"], 0), int(match["rule"]) - 1
        yield Found(f"spec.groups[{group}].rules[{rule}]", match["says"])
    if not found:
        yield Found("spec.groups", said.strip()[-400:])
