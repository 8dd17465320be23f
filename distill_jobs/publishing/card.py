"""MODEL_CARD.md: what a published student is, for the person who has to decide whether to serve it.

Front matter as Hugging Face reads it (model cards: Mitchell et al., 2019). Pure: the same facts give the same
card. Knows nothing about registries; the card is written before a version number is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import yaml

from contracts.gates import GateResult
from distill_jobs.publishing.facts import MODELS, Facts
from distill_jobs.publishing.limits import limitations
from distill_jobs.publishing.recipe import recipe

_DIGEST_CHARS = 12
_LEFT_OUT = {"params", "bytes", "graded"}
"""Of the metrics: sizes stand in a table of their own."""


def render(facts: Facts) -> str:
    """The card's text."""
    parts = [
        _front_matter(facts),
        f"# {facts.record.name}",
        facts.record.description or "A student distilled from logged traffic.",
        _section("What it is for", [_purpose(facts)]),
        _section("Evaluation", _evaluation(facts)),
        _section("Limitations", ["\n".join(f"- {line}" for line in limitations(facts))]),
        _section("How it was made", [*recipe(facts), _config_block(facts)]),
        _section("Lineage", [_table(("what", "which"), _lineage(facts))]),
        _section("Serve it", _serving(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts) -> str:
    record, publish = facts.record, facts.config.publish
    digest = facts.dataset_digest()
    data: dict[str, Any] = {
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "license": publish.license,
        "base_model": facts.config.student,
        "base_model_relation": "finetune",
        "tags": ["stillhouse", "distillation", record.artifact.precision, *publish.tags],
        "datasets": [f"sha256:{digest}"] if digest else [],
        "model-index": [{"name": record.name, "results": _results(facts)}],
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _results(facts: Facts) -> list[dict[str, Any]]:
    metrics = [
        {"type": name.removeprefix("quantized."), "value": value}
        for name, value in sorted(facts.metrics.items())
        if name.startswith("quantized.") and _known(value) and name.partition(".")[2] not in _LEFT_OUT
    ]
    evaluation = facts.record.evaluation
    revision = evaluation.dataset_digest if evaluation else ""
    dataset = {"name": "held-out requests", "type": "stillhouse-evaluation", "revision": revision}
    return [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}] if metrics else []


def _purpose(facts: Facts) -> str:
    lineage, route = facts.record.lineage, facts.config.collect.route
    stands_in = f"It answers what clients ask route `{route}`" if route else "It answers the logged requests"
    size = f"{facts.record.artifact.params:,} parameters in {facts.record.artifact.precision}"
    teacher = facts.value("teacher.params")
    times = facts.record.artifact.params and teacher and teacher / facts.record.artifact.params
    fewer = f", {times:.1f} times fewer than its teacher's" if times else ""
    return (
        f"{stands_in} in place of `{lineage.teacher}`: {size}{fewer} "
        f"({facts.record.artifact.bytes / 1e6:,.1f} MB on disk). It is made for that traffic and no other."
    )


def _evaluation(facts: Facts) -> list[str]:
    evaluation = facts.record.evaluation
    engine = evaluation.engine if evaluation else "nothing"
    said = [f"{facts.samples:,} held-out requests, every model through {engine}, which will serve it."]
    said.append(_metrics_table(facts))
    said.append(f"Gates: **{facts.gates.verdict}**" + _override(facts))
    if facts.gates.results:
        rows = [_gate_row(result) for result in facts.gates.results]
        said.append(_table(("gate", "bound", "measured", "verdict", "why"), rows))
    if facts.classes:
        rows = [
            (c["class"], f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}", f"{c['support']:,}")
            for c in facts.classes
        ]
        said.append("By class, the published artifact:")
        said.append(_table(("class", "precision", "recall", "F1", "requests"), rows))
    return said


def _override(facts: Facts) -> str:
    return f", overridden: {facts.gates.overridden_by}" if facts.gates.overridden_by is not None else ""


def _metrics_table(facts: Facts) -> str:
    """A row a metric, a column a model that has any."""
    models = [m for m in MODELS if any(name.startswith(f"{m}.") for name in facts.metrics)]
    names = sorted({name.partition(".")[2] for name in facts.metrics} - _LEFT_OUT)
    rows = []
    for name in names:
        cells = [_cell(facts, f"{model}.{name}") for model in models]
        if any(cell != "–" for cell in cells):
            rows.append((name, *cells))
    return _table(("metric", *models), rows)


def _cell(facts: Facts, name: str) -> str:
    value, interval = facts.value(name), facts.intervals.get(name)
    if value is None or not _known(value):
        return "–"
    within = "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return f"{value:,.4g}{within}"


def _gate_row(result: GateResult) -> tuple[str, ...]:
    gate = result.gate
    name = gate.metric if gate.relative_to is None else f"{gate.metric} / {gate.relative_to}"
    bounds = [f"≥ {gate.at_least:g}"] if gate.at_least is not None else []
    bounds += [f"≤ {gate.at_most:g}"] if gate.at_most is not None else []
    value = "not measured" if result.value is None else f"{result.value:.4g}"
    return name, ", ".join(bounds), value, result.verdict.value, gate.why


def _lineage(facts: Facts) -> Iterator[tuple[str, str]]:
    record, lineage = facts.record, facts.record.lineage
    if lineage.log_from is not None and lineage.log_to is not None:
        segments = len(lineage.log_segments)
        yield "log window", f"{_time(lineage.log_from)} to {_time(lineage.log_to)}, {segments} segments"
    digest = facts.dataset_digest()
    if digest:
        yield "training samples", f"`{digest[:_DIGEST_CHARS]}`, {facts.count('collect', 'train'):,} rows"
    yield "teacher", f"`{lineage.teacher}` (`{(lineage.teacher_digest or 'unknown')[:_DIGEST_CHARS]}`)"
    yield "base model", f"`{lineage.base_model}`"
    for stage, key in lineage.manifests.items():
        yield f"stage {stage}", f"`{key[:_DIGEST_CHARS]}`"
    if record.evaluation is not None:
        yield "evaluation requests", f"`{record.evaluation.dataset_digest[:_DIGEST_CHARS]}`"
    yield "artifact", f"`{record.artifact.digest}`"
    yield "code", f"`{lineage.git_revision or 'unknown'}`"
    if lineage.tracking_run is not None:
        yield "MLflow run", f"`{lineage.tracking_run}`"
    yield "made", _time(record.created_at)


def _serving(facts: Facts) -> list[str]:
    name, alias = facts.record.name, facts.config.publish.alias
    ref = f"{name}@{alias}" if alias else f"{name}:VERSION"
    route = facts.config.collect.route or "ROUTE"
    return [
        "Put it before users step by step; it is rolled back when it is shown to be worse:",
        f"```sh\nstillhouse rollout plan {route} {ref}     # how long it would take\n"
        f"stillhouse rollout start {route} {ref}\n```",
        f"The files alone: `stillhouse models download {ref} FOLDER`, then `{_alone(facts)}`. "
        f"`stillhouse models card {name}` shows this card; the version it belongs to is the registry's.",
    ]


def _alone(facts: Facts) -> str:
    if facts.record.artifact.adapter is None:
        return "vllm serve FOLDER"
    return f"vllm serve BASE --enable-lora --lora-modules {facts.record.name}=FOLDER"


def _config_block(facts: Facts) -> str:
    data = facts.config.model_dump(mode="json", exclude_defaults=True, exclude={"workdir", "cache_dir"})
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000).rstrip()
    title = "The configuration, defaults left out"
    return f"<details><summary>{title}</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _section(title: str, blocks: Iterable[str]) -> str:
    return "\n\n".join((f"## {title}", *blocks))


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
