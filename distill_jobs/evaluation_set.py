"""The requests an evaluation asks: a JSONL file, or what a user's function yields, pinned by its digest.

Knows nothing about models or graders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contracts.config import canonical_json, write_atomic
from contracts.errors import ConfigError, DataError
from contracts.plugins import load_function
from distill_jobs.config import EvaluateConfig
from distill_jobs.keys import sha256_of
from registry.digest import digest_file


def pin_dataset(config: EvaluateConfig, workdir: Path) -> tuple[Path, str]:
    """The evaluation requests as a JSONL file, and its digest; a function's rows are written to the workdir
    once.
    """
    source = Path(config.dataset)
    if ":" not in config.dataset:
        if not source.is_file():
            raise ConfigError(f"evaluate.dataset: there is no file {source}.")
        return source.resolve(), digest_file(source)
    wanted = sha256_of([config.dataset, config.dataset_args, config.samples])[:12]
    file = workdir / f"evaluation-{wanted}.jsonl"
    if not file.is_file():
        function = load_function(config.dataset, "evaluate.dataset")
        rows = [
            _as_row(r) for _, r in zip(range(config.samples), function(**config.dataset_args), strict=False)
        ]
        write_atomic(file, "".join(canonical_json(r) + "\n" for r in rows))
    return file.resolve(), digest_file(file)


def read_rows(file: Path, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows of a dataset file: {"request": body}, and "answer" where there is a
    reference text."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if len(rows) == limit:
            break
        if line.strip():
            try:
                rows.append(_as_row(json.loads(line)))
            except json.JSONDecodeError as err:
                raise DataError(f"{file}:{number}: is not JSON ({err}).") from err
    if not rows:
        raise DataError(f"{file} holds no requests to evaluate on.")
    return rows


def _as_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"An evaluation row must be a mapping, not {type(row).__name__}.")
    body = row.get("request", row)
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise DataError('An evaluation row must be {"request": {"messages": [...], ...}}.')
    answer = row.get("answer") if "request" in row else None
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"An evaluation row's answer must be a text, not {type(answer).__name__}.")
    return {"request": body} if answer is None else {"request": body, "answer": answer}
