"""lm-eval's tasks on one model, in a process of its own (`python -m distill_jobs.measuring.harness`).

A task is a YAML file of the user's beside its data, or one that lm-eval comes with and whose data is on this
machine; nothing is fetched. Knows nothing about the other metrics.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from contracts.config import parse_config, write_atomic
from contracts.errors import ConfigError, EngineError
from distill_jobs.config import EngineConfig, EvaluateConfig
from distill_jobs.keys import sha256_of
from distill_jobs.measuring.statistics import Statistic, mean_of
from distill_jobs.worker_process import die_with_parent, run_worker
from registry.digest import digest_folder

RESULT = "lm-eval.json"


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Raises: ConfigError for a path that is not there or holds no YAML; names are lm-eval's to know."""
    for task in tasks:
        path = Path(task)
        if not path.exists() and (path.suffix in (".yaml", ".yml") or "/" in task):
            raise ConfigError(f"evaluate.lm_eval: there is no {path}.")
        if path.is_dir() and not _files(path):
            raise ConfigError(f"evaluate.lm_eval: {path} holds no *.yaml task.")


def tasks_digest(tasks: tuple[str, ...]) -> str:
    """What the tasks are: the content of the user's files, the names of lm-eval's own."""
    return sha256_of([digest_folder(Path(t)) if Path(t).exists() else t for t in tasks])


def run_tasks(config: EvaluateConfig, model: Path, out: Path) -> None:
    """Run the tasks on a model and leave `lm-eval.json`. Raises: EngineError with the end of the log."""
    job = {
        "model": str(model.resolve()),
        "out": str(out.resolve()),
        "tasks": [str(Path(t).resolve()) if Path(t).exists() else t for t in config.lm_eval],
        "limit": config.lm_eval_limit,
        "engine": config.engine.model_dump(),
    }
    root = str(Path(__file__).resolve().parents[2])
    write_atomic(out / "lm-eval-job.json", json.dumps(job) + "\n")
    env = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str((out / "lm-eval-data").resolve()),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
    }
    argv = [sys.executable, "-m", "distill_jobs.measuring.harness", str(out / "lm-eval-job.json")]
    run_worker(argv, out / RESULT, out / "lm-eval.log", env, 2 * config.engine.timeout_s, EngineError)


def read_tasks(folder: Path) -> tuple[dict[str, Statistic], dict[str, float | None]]:
    """Of a finished run, by `lm_eval.TASK.METRIC`: means over a task's examples, and other figures."""
    file = folder / RESULT
    if not file.is_file():
        return {}, {}
    found = json.loads(file.read_text(encoding="utf-8"))
    means, figures = {}, {}
    for name, one in found.items():
        values = one["examples"]
        if values and math.isclose(sum(values) / len(values), one["value"], rel_tol=1e-6, abs_tol=1e-9):
            means[name] = mean_of(values)
        else:
            figures[name] = one["value"]
    return means, figures


def main(job_file: str) -> None:
    """The worker: every folder's tasks from inside it, so that data is found beside them."""
    die_with_parent()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    from distill_jobs.measuring.harness_model import EngineModel

    out = Path(job["out"])
    model = EngineModel(
        Path(job["model"]), parse_config(job["engine"], EngineConfig), out / "lm-eval-requests"
    )
    found: dict[str, Any] = {}
    for task in job["tasks"]:
        found |= _evaluate(model, Path(task), job["limit"])
    write_atomic(out / RESULT, json.dumps(found) + "\n")


def _evaluate(model: Any, task: Path, limit: int | None) -> dict[str, Any]:
    """Results of a folder's (or file's, or name's) tasks: name → {"value", "examples"}."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = task.exists()
    folder = task if task.is_dir() else task.parent
    if own:
        os.chdir(folder)
    manager = TaskManager(include_path=str(folder) if own else None, include_defaults=not own)
    names = [_name(f) for f in (_files(folder) if task.is_dir() else [task])] if own else [str(task)]
    done = simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager,
        limit=limit,
        log_samples=True,
        apply_chat_template=True,
        bootstrap_iters=0,
        confirm_run_unsafe_code=False,
    )
    found = {}
    for name, results in done["results"].items():
        examples = done["samples"].get(name, [])
        for key, value in results.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or not chosen or not isinstance(value, int | float):
                continue
            label = _safe(f"lm_eval.{name}.{metric}" + ("" if chosen == "none" else f"_{chosen}"))
            mine = [e.get(metric) for e in examples if e.get("filter", chosen) == chosen]
            numbers = [float(v) for v in mine if isinstance(v, int | float)]
            found[label] = {"value": float(value), "examples": numbers if len(numbers) == len(mine) else []}
    return found


def _files(folder: Path) -> list[Path]:
    """A folder's tasks; a file that starts with '_' is one that others include."""
    return sorted(p for p in folder.glob("*.y*ml") if not p.name.startswith("_"))


def _name(file: Path) -> str:
    """The task's name in its YAML. Its tags (!function) are lm-eval's, so the file is not parsed here."""
    found = re.search(r"^task:\s*[\"']?([\w.-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ConfigError(f"evaluate.lm_eval: {file} has no line 'task: NAME'.")
    return found.group(1)


def _safe(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name)


if __name__ == "__main__":
    main(sys.argv[1])
