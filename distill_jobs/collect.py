"""collect: request-log segments and users' feedback in, disjoint parquet files of samples out (train,
calibration, validation).

Unit of work: a segment. Ray Data maps the segments; duplicates and the split are decided over all of them.
Knows nothing about tokens or the teacher's weights.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import ConfigError, DataError
from distill_jobs.collecting.dedupe import Sample, clusters, drop_exact, drop_resembling
from distill_jobs.collecting.judgements import read_judgements, write_judged
from distill_jobs.collecting.rows import SCHEMA, conversation, normalise, parse_segment, request_text
from distill_jobs.collecting.split import split
from distill_jobs.collecting.window import Segment
from distill_jobs.config import CollectConfig
from distill_jobs.keys import output_file
from distill_jobs.progress import Progress
from distill_jobs.ray_session import ray_session
from distill_jobs.stage import Result

OUT_SCHEMA = pa.schema([f for f in SCHEMA if f.name != "signature"])

_JUDGED = "judged.json"

Mapper = Callable[[list[dict[str, Any]]], Iterator[dict[str, Any]]]


def run(
    config: CollectConfig,
    window: list[Segment],
    held_out: list[Path],
    folder: Path,
    progress: Progress,
    ray_address: str = "auto",
) -> Result:
    """Collect the window's samples into `folder`. Raises: DataError when too few are left."""
    segments = [s for s in window if not s.is_feedback]
    mapper: Mapper = _map_local if config.executor == "local" else partial(_map_ray, ray_address)
    counts: Counter[str] = Counter(segments=len(segments), torn_tail=sum(s.torn for s in segments))
    judged = read_judgements(config.log_dir, (s for s in window if s.is_feedback), counts)
    write_judged(folder / _JUDGED, judged)
    tasks = [_task(config, segment, folder) for segment in segments]
    malformed: dict[str, list[int]] = {}
    for done, report in enumerate(_finished_first(tasks, mapper), start=1):
        counts.update(report["counts"])
        if report["malformed_lines"]:
            malformed[report["name"]] = report["malformed_lines"]
        progress.update(done, len(tasks), "segments")
    samples = [row for task in tasks for row in pq.read_table(task["out"]).to_pylist()]
    sides = _decide(config, samples, held_out, counts)
    outputs = {}
    for name, rows in sides.items():
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=OUT_SCHEMA), path)
        outputs[name] = output_file(path, rows=len(rows))
        counts[name] = len(rows)
    if counts["train"] < config.min_rows:
        raise DataError(
            f"Only {counts['train']} samples are left to train on; collect.min_rows is {config.min_rows}."
            f" Counts: {dict(counts)}. Log more traffic, or relax the filters."
        )
    notes = {
        "segments": json.dumps({s.name: s.digest for s in window}),
        "malformed_lines": json.dumps(malformed),
    }
    times = [s["ts"] for rows in sides.values() for s in rows]
    return Result(outputs, dict(counts), {"log_from": min(times), "log_to": max(times)}, notes)


def _task(config: CollectConfig, segment: Segment, folder: Path) -> dict[str, Any]:
    return {
        "segment": segment.model_dump(),
        "log_dir": str(config.log_dir.resolve()) if isinstance(config.log_dir, Path) else config.log_dir,
        "judged": str((folder / _JUDGED).resolve()),
        "out": str((folder / "segments" / f"{segment.digest[:24]}.parquet").resolve()),
        "config": config.model_dump(mode="json"),
    }


def _decide(
    config: CollectConfig, samples: list[Sample], held_out: list[Path], counts: Counter[str]
) -> dict[str, list[Sample]]:
    """Duplicates and held-out requests dropped and counted, the rest split."""
    unique = drop_exact(samples)
    counts["exact_duplicate"] = len(samples) - len(unique)
    texts = [text for path in [*config.holdout, *held_out] for text in held_out_texts(path)]
    free = drop_resembling(unique, texts, config.near_duplicates)
    counts["held_out"] = len(unique) - len(free)
    groups = [g[: config.keep_per_cluster] for g in clusters(free, config.near_duplicates)]
    counts["near_duplicate"] = len(free) - sum(len(g) for g in groups)
    if config.max_rows is not None:
        groups = groups[: config.max_rows]
    sides = split(groups, config.calibration, config.validation)
    counts["samples"] = sum(len(rows) for rows in sides.values())
    counts["over_max_rows"] = len(free) - counts["near_duplicate"] - counts["samples"]
    return sides


def held_out_texts(path: Path) -> list[str]:
    """The normalised texts of a held-out file: JSON lines with a request, or plain lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"collect.holdout: {path} cannot be read ({err}).") from err
    return [_held_out_text(line, path) for line in lines if line.strip()]


def _held_out_text(line: str, path: Path) -> str:
    if not line.lstrip().startswith("{"):
        return normalise(line)
    try:
        messages = conversation(json.loads(line)["request"])
    except (json.JSONDecodeError, KeyError, AttributeError) as err:
        raise ConfigError(
            f'{path}: a line is neither plain text nor {{"request": ...}}: {line[:80]}'
        ) from err
    if messages is None:
        raise ConfigError(f"{path}: a request has no text messages: {line[:80]}")
    return request_text(messages)


def _finished_first(tasks: list[dict[str, Any]], mapper: Mapper) -> Iterator[dict[str, Any]]:
    """Reports of all segments; those that an earlier run finished never reach a worker."""
    todo = []
    for task in tasks:
        if Path(task["out"]).with_suffix(".json").is_file():
            yield parse_segment(task)
        else:
            todo.append(task)
    if todo:
        yield from mapper(todo)


def _map_local(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield parse_segment(task)


def _map_ray(address: str, tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same through Ray Data; rows stay in the segments' files, only reports travel."""
    with ray_session(address):
        import ray.data
        import ray.exceptions

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # As JSON: Arrow would unify the nested configurations and counts of different segments.
        items = ray.data.from_items([{"task": json.dumps(t)} for t in tasks], override_num_blocks=len(tasks))
        reports = items.map(_parse_json_task, num_cpus=0.5)
        try:
            for row in reports.iter_rows():
                yield json.loads(row["report"])
        except ray.exceptions.RayError as err:
            what = str(err).strip().splitlines()
            raise DataError("A log segment could not be collected:\n" + "\n".join(what[-8:])) from err


def _parse_json_task(row: dict[str, Any]) -> dict[str, Any]:
    return {"report": json.dumps(parse_segment(json.loads(row["task"])))}
