"""Writes every dashboard as JSON, and the kustomize component that makes a ConfigMap of each.

    python -m k8s.dashboards.build            writes them, and the guide's table of metrics
    python -m k8s.dashboards.build --check    exits 1 when a committed file is not what would be written

Grafana's sidecar loads ConfigMaps labelled `grafana_dashboard: "1"`; a local Grafana reads the folder (see
docs/guides/monitoring.md). Knows nothing about what the dashboards show.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import cost, distillation, engine, fleet, rollout, route
from k8s.dashboards.catalogue import table

HERE = Path(__file__).resolve().parent
GUIDE = HERE.parents[1] / "docs" / "guides" / "monitoring.md"
_TABLE = re.compile(r"(?<=<!-- metrics -->\n).*?(?=<!-- /metrics -->)", re.DOTALL)
MOST_BYTES = 1 << 20
"""Of a ConfigMap, Kubernetes' own bound."""


def dashboards() -> list[Dashboard]:
    """All of them, in the order of frame.TITLES."""
    return [part.build() for part in (fleet, route, rollout, distillation, engine, cost)]


def files() -> dict[str, str]:
    """File name → content of everything that is written. Raises: ValueError when one is too large."""
    found = {}
    for made in dashboards():
        text = JSONEncoder(sort_keys=True, indent=1).encode(made) + "\n"
        if len(text.encode()) > MOST_BYTES // 2:
            raise ValueError(f"{made.uid}: {len(text)} characters are too much for a ConfigMap")
        found[f"{made.uid}.json"] = json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
    return {**found, "kustomization.yaml": _component(sorted(found))}


def _component(names: list[str]) -> str:
    """A kustomize component: one ConfigMap a dashboard, named like its uid."""
    labels = {"grafana_dashboard": "1", "app.kubernetes.io/part-of": "stillhouse"}
    component = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "configMapGenerator": [
            {
                "name": f"grafana-{name.removesuffix('.json')}",
                "files": [name],
                "options": {
                    "disableNameSuffixHash": True,
                    "labels": dict(labels),
                    "annotations": {"grafana_folder": "Stillhouse"},
                },
            }
            for name in names
        ],
    }
    head = "# Written by `python -m k8s.dashboards.build`.\n"
    return head + yaml.safe_dump(component, sort_keys=False)


def main(argv: list[str] | None = None) -> int:
    """Write, or check what is written."""
    parser = argparse.ArgumentParser(prog="python -m k8s.dashboards.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare, exit 1 when something differs")
    check = parser.parse_args(argv).check
    wanted = files()
    stale = [n for n, text in wanted.items() if not (f := HERE / n).is_file() or f.read_text() != text]
    stale += [f.name for f in HERE.glob("*.json") if f.name not in wanted]
    if check:
        for name in stale:
            print(f"k8s/dashboards/{name} is stale: run python -m k8s.dashboards.build", file=sys.stderr)
        return 1 if stale else 0
    GUIDE.write_text(_TABLE.sub(lambda _: table(), GUIDE.read_text()))
    for name in stale:
        if name in wanted:
            (HERE / name).write_text(wanted[name])
        else:
            (HERE / name).unlink()
        print(f"k8s/dashboards/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
