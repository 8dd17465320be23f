"""Every metric that Stillhouse itself exports, read from the code that makes it: name, type, labels, meaning.

The dashboards' queries are checked against it, and the table of docs/guides/monitoring.md is written from it.
Knows nothing about dashboards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry

from contracts.config import load_config
from distill_jobs.flywheel.config import FlywheelConfig
from distill_jobs.flywheel.metrics import FlywheelMetrics
from distill_jobs.flywheel.store import Store
from serve.rollout.metrics import ControllerMetrics
from serve.router.metrics import Metrics

FLYWHEEL_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "flywheel.yaml"
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@dataclass(frozen=True)
class Metric:
    """One metric family. `source`: router, controller or flywheel."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str
    source: str

    def series(self) -> tuple[str, ...]:
        """The names under which its samples are asked for."""
        return tuple(self.name + suffix for suffix in _SUFFIXES[self.kind])

    @property
    def exported(self) -> str:
        """The name that a scrape shows: a counter ends in _total."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def metrics() -> list[Metric]:
    """All of them, by source and name."""
    controller = CollectorRegistry()
    ControllerMetrics(controller)
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        flywheel = FlywheelMetrics(load_config(FLYWHEEL_CONFIG, FlywheelConfig), store)
        store.close()
    found = [
        *_of(Metrics()._registry, "router"),
        *_of(controller, "controller"),
        *_of(flywheel._registry, "flywheel"),
    ]
    return sorted(found, key=lambda m: (("router", "controller", "flywheel").index(m.source), m.name))


def table() -> str:
    """The Markdown table of the guide."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.exported}` | {metric.kind} | {labels} | {metric.text} |")
    return "\n".join(lines) + "\n"


def _of(registry: CollectorRegistry, source: str) -> Iterator[Metric]:
    # prometheus_client has no public way to ask for label names before there is a sample.
    for collector in registry._collector_to_names:
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            yield Metric(family.name, family.type, tuple(collector._labelnames), family.documentation, source)  # type: ignore[attr-defined]
