"""Runs a step's tasks one by one in this process, or by Ray Data over a cluster: the same functions, the same
files.

Rows stay in files; only tasks and reports (small JSON values) travel, so the object store is never the limit.
Knows nothing about what a task does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from contracts.errors import DataError
from distill_jobs.collecting.parts import done
from distill_jobs.ray_session import ray_session

Task = dict[str, Any]
Work = Callable[[Task], Task]
Mapper = Callable[[Work, list[Task]], Iterator[Task]]
"""(work, tasks) → their reports, those of tasks that an earlier run finished first."""


@contextmanager
def executor(kind: str, ray_address: str) -> Iterator[Mapper]:
    """The mapper of an executor, "local" or "ray"."""
    if kind == "local":
        yield partial(_finished_first, _map_local)
        return
    with ray_session(ray_address):
        yield partial(_finished_first, _map_ray)


def _finished_first(mapper: Mapper, work: Work, tasks: list[Task]) -> Iterator[Task]:
    todo = []
    for task in tasks:
        report = done(task)
        if report is None:
            todo.append(task)
        else:
            yield report
    if todo:
        yield from mapper(work, todo)


def _map_local(work: Work, tasks: list[Task]) -> Iterator[Task]:
    for task in tasks:
        yield work(task)


def _map_ray(work: Work, tasks: list[Task]) -> Iterator[Task]:
    import ray.data
    import ray.exceptions

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # As JSON: Arrow would unify the nested configurations and counts of different tasks.
    items = ray.data.from_items([{"task": json.dumps(t)} for t in tasks], override_num_blocks=len(tasks))
    reports = items.map(partial(_as_json, work), num_cpus=1)
    try:
        for row in reports.iter_rows():
            yield json.loads(row["report"])
    except ray.exceptions.RayError as err:
        what = str(err).strip().splitlines()
        raise DataError("collect: a task failed:\n" + "\n".join(what[-8:])) from err


def _as_json(work: Work, row: dict[str, Any]) -> dict[str, Any]:
    return {"report": json.dumps(work(json.loads(row["task"])))}
