"""Every metric that a rule reads is exported: by our own code, the installed vLLM or the installed Ray."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import promql_parser
import pytest

from k8s.monitoring.rules import read_groups

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"Counter", "Gauge", "Histogram", "gauge"}
PREFIXES = {"serve/rollout/metrics.py": "stillhouse_rollout_", "serve/router/split_metrics.py": "stillhouse_"}
"""Files whose own `gauge(…)` puts this before the name."""
RAY = {"ray_node_gram_used", "ray_node_gram_available", "ray_serve_deployment_replica_healthy"}
"""Names that Ray exports, with the prefix it puts before them."""


def our_names() -> set[str]:
    """What the code registers, as a scrape shows it."""
    found: set[str] = set()
    for folder in ("serve", "distill_jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            if "prometheus_client" in text:
                found |= registered(text, PREFIXES.get(str(file.relative_to(ROOT)), ""))
    return found


def registered(text: str, prefix: str = "") -> set[str]:
    """Series names of the metrics that a module makes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
            continue
        name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if isinstance(name, str):
            full = prefix + name if node.func.id == "gauge" else name
            found |= series(full, node.func.id)
    return found


def series(name: str, kind: str) -> set[str]:
    """The names that one metric has in a scrape."""
    if kind == "Counter":
        return {f"{name.removesuffix('_total')}_total"}
    return {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "Histogram" else {name}


def vllm_names() -> set[str]:
    """What the installed vLLM registers; its source is read, as importing it takes seconds."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    text = "\n".join(f.read_text() for f in (Path(spec.origin).parent / "v1" / "metrics").glob("*.py"))
    names = set(re.findall(r'"(vllm:[a-z_0-9]+)"', text))
    return {n + end for n in names for end in ("", "_total", "_bucket", "_count", "_sum")}


def selected(expression: str) -> set[str]:
    """Metric names in a PromQL expression. Raises: ValueError for one that does not parse."""
    found: set[str] = set()
    waiting = [promql_parser.parse(expression)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None, f"a selector without a name: {node}"
            found.add(node.name)
            continue
        for part in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, part, None)
            if isinstance(child, promql_parser.Expr):
                waiting.append(child)
        waiting += [a for a in getattr(node, "args", ()) or () if isinstance(a, promql_parser.Expr)]
    return found


def unknown(expressions: list[str], known: set[str]) -> set[str]:
    """Names that nobody exports."""
    return {name for expression in expressions for name in selected(expression)} - known


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Everything that is exported or recorded."""
    recorded = {r["record"] for group in read_groups() for r in group["rules"] if "record" in r}
    return our_names() | vllm_names() | RAY | recorded


def test_every_metric_in_a_rule_is_exported(known: set[str]) -> None:
    """A metric that was renamed in the code would leave an alert that can never fire."""
    expressions = [rule["expr"] for group in read_groups() for rule in group["rules"]]
    assert unknown(expressions, known) == set()


def test_recorded_series_are_asked_as_they_are_named(known: set[str]) -> None:
    """A misspelt name is seen wherever it stands in an expression."""
    typos = [
        "sum by (route) (rate(stillhouse_request_total[5m])) > 0",
        "route_arm:stillhouse_burn:rate2h > 1 and on (route) max(stillhouse_rollout_phases) == 1",
        'histogram_quantile(0.9, sum by (le) (rate(stillhouse_ttft_buckets{le="2.0"}[5m:1m] offset 1h)))',
        "absent(stillhouse_router) unless label_replace(vllm:kv_cache, 'a', 'b', 'c', 'd')",
    ]
    assert unknown(typos, known) == {
        "stillhouse_request_total", "route_arm:stillhouse_burn:rate2h", "stillhouse_rollout_phases",
        "stillhouse_ttft_buckets", "stillhouse_router", "vllm:kv_cache",
    }  # fmt: skip


def test_names_are_read_from_the_code() -> None:
    """Counters, gauges, histograms, and gauges that a module makes by a helper of its own."""
    counter, histogram = "a = Counter('stillhouse_a_total', '')", "b = Histogram('stillhouse_b', '')"
    text = "\n".join((counter, histogram, "c = gauge('c', '', 'route')"))
    assert registered(text, "stillhouse_rollout_") == {
        "stillhouse_a_total", "stillhouse_b_bucket", "stillhouse_b_count", "stillhouse_b_sum",
        "stillhouse_rollout_c",
    }  # fmt: skip
    assert {"stillhouse_requests_total", "stillhouse_flywheel_ticks_total"} <= our_names()


def test_the_list_of_rays_names_is_rays() -> None:
    """The names without their prefix stand in the installed Ray."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    folders = [root / "dashboard" / "modules" / "reporter", root / "serve" / "_private"]
    text = "\n".join(f.read_text() for folder in folders for f in folder.rglob("*.py"))
    assert [name for name in RAY if f'"{name.removeprefix("ray_")}"' not in text] == []
