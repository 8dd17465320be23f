"""Makes candidates, measures each through vLLM and against its own file, and keeps what was found.

`OUT/<candidate>/measured.json` is written last, so a killed comparison goes on with the candidate it was in.
A candidate that cannot be made or is damaged is a row that says why, not the end; one whose engine died is
measured again by the next run. Knows nothing about terminals.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contracts.config import write_atomic
from contracts.errors import ConfigError, DataError, EngineError, StillhouseError
from distill_jobs.config import EngineConfig
from distill_jobs.engine import engine_name, run_engine, write_lines
from distill_jobs.evaluation_set import read_rows
from distill_jobs.keys import key_config, sha256_of
from distill_jobs.measuring.scores import against_teacher, likelihood
from distill_jobs.quantize import check, make
from distill_jobs.quantizing.calibration import calibration_rows
from distill_jobs.quantizing.candidates import Measured
from distill_jobs.quantizing.checkpoints import weight_bytes
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.quantizing.verify import verify_served
from distill_jobs.samples import each
from distill_jobs.tokens import ChatTokenizer
from registry.digest import digest_folder

Say = Callable[[str], None]
BF16 = "bf16"


@dataclass(frozen=True)
class Comparison:
    """What to measure, and on what."""

    model: Path
    out: Path
    candidates: tuple[QuantizeConfig, ...]
    rows: list[dict[str, Any]]
    """{"id", "ids", "completion"}: texts that calibrated nothing."""
    calibration: list[dict[str, Any]]
    """{"ids"}."""
    engine: EngineConfig
    topk: int = 20
    batch: int = 32
    tokens: int = 64
    """Speed: so many greedy tokens of each of so many prompts."""


def read_data(
    data: Path, model: Path, config: QuantizeConfig, wanted: int, max_model_len: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to measure on, rows to calibrate on) of a collect stage's folder, or of a JSONL file of requests
    with answers, of which every second calibrates.

    Raises: DataError, ConfigError saying what is missing.
    """
    tokenizer = ChatTokenizer(str(model))
    if (data / "calibration").is_dir():
        collected = {name: data / name for name in ("calibration", "train")}
        calibration = calibration_rows(tokenizer, collected, config.samples, config.max_tokens)
        samples = (s for s in each(data / "validation") if s["answer"] is not None)
        pairs = [
            (tokenizer.prompt(s["request"], s["messages"]), tokenizer.answer(s["answer"]))
            for _, s in zip(range(wanted), samples, strict=False)
        ]
    elif data.is_file():
        told = [r for r in read_rows(data, 2 * max(wanted, config.samples)) if "answer" in r]
        both = [(tokenizer.prompt(r["request"]), tokenizer.answer(r["answer"])) for r in told]
        calibration = [{"ids": (p + a)[: config.max_tokens]} for p, a in both[1::2]][: config.samples]
        pairs = both[::2][:wanted]
    else:
        raise ConfigError(
            f"--data: {data} is neither a folder of the collect stage (with calibration/, validation/ and"
            ' train/) nor a JSONL file of {"request": …, "answer": …} rows.'
        )
    rows = [
        {"id": i, "ids": prompt, "completion": answer}
        for i, (prompt, answer) in enumerate(pairs)
        if len(prompt) + len(answer) < max_model_len
    ]
    if not rows or not calibration:
        raise DataError(
            f"{data} holds too little: {len(rows)} answered requests to measure on (shorter than"
            f" {max_model_len} tokens), {len(calibration)} to calibrate on; each needs one at least."
        )
    return rows, calibration


def compare(job: Comparison, say: Say) -> tuple[Measured, list[Measured]]:
    """bf16 and every candidate, measured. Raises: ConfigError when OUT holds a comparison of something
    else.
    """
    _pin(job)
    write_lines(job.out / "rows.jsonl", job.rows)
    say(f"{BF16}: measuring through {engine_name()}")
    base = _bf16(job)
    found = []
    for config in job.candidates:
        known = job.out / config.precision / "measured.json"
        _start_anew_if_changed(config, known.parent)
        if known.is_file():
            found.append(Measured.model_validate_json(known.read_text(encoding="utf-8")))
            say(f"{config.precision}: measured before")
            continue
        died = False
        try:
            one = _candidate(job, config, base, say)
        except StillhouseError as err:
            one = Measured(name=config.precision, artifact="", refused=str(err))
            say(f"{config.precision}: refused. {err}")
            died = isinstance(err, EngineError)  # which says nothing about the candidate
        if not died:
            write_atomic(known, one.model_dump_json(indent=1) + "\n")
        found.append(one)
    return base, found


def _start_anew_if_changed(config: QuantizeConfig, folder: Path) -> None:
    """What was made with another budget or other samples is removed: the name does not tell them apart."""
    file, wanted = folder / "config.json", json.dumps(key_config(config))
    if not file.is_file() or file.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(file, wanted)


def _pin(job: Comparison) -> None:
    """Results of another model, of other rows or another engine must not stand in one table."""
    inputs = {
        "model": digest_folder(job.model),
        "rows": sha256_of([job.rows, job.calibration]),
        "engine": [engine_name(), job.engine.model_dump(mode="json", exclude={"timeout_s", "threads"})],
    }
    file = job.out / "inputs.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in inputs if before.get(name) != inputs[name]]
        if changed:
            raise ConfigError(
                f"--out: {job.out} holds a comparison with another {' and another '.join(changed)}."
                " Take another folder, or remove it."
            )
    write_atomic(file, json.dumps(inputs) + "\n")


def _bf16(job: Comparison) -> Measured:
    folder = job.out / BF16
    done = _engine(job, job.model, folder)
    return Measured(
        name=BF16, artifact=str(job.model), bytes=weight_bytes(job.model), perplexity=_perplexity(job,
        folder), loss=0.0, kl=0.0, tokens_per_s=done["speed"]["tokens_per_s"],
    )  # fmt: skip


def _candidate(job: Comparison, config: QuantizeConfig, base: Measured, say: Say) -> Measured:
    """Make it unless it is there, measure it through the engine, hold it against its file."""
    folder = job.out / config.precision
    check(config, job.model)
    seconds = 0.0
    if not (folder / "result.json").is_file() or not (folder / "artifact").is_dir():
        say(f"{config.precision}: quantizing")
        seconds = make(config, job.model, job.calibration, folder, lambda *_: None).seconds
    say(f"{config.precision}: measuring through {engine_name()}")
    artifact = folder / "artifact"
    done = _engine(job, artifact, folder / "engine")
    verdict = verify_served(
        job.model, artifact, job.out / BF16, folder / "engine", folder / "offline", job.engine.kv_cache_dtype
    )
    verdict.check(config.precision)
    kl = against_teacher(_scores(job.out / BF16), _scores(folder / "engine"), len(job.rows))["kl_to_teacher"]
    perplexity = _perplexity(job, folder / "engine")
    return Measured(
        name=config.precision,
        artifact=str(artifact),
        bytes=weight_bytes(artifact),
        perplexity=perplexity,
        loss=perplexity / (base.perplexity or math.nan) - 1,
        kl=kl.value(),
        served_gap=math.expm1(verdict.served_gap),
        tokens_per_s=done["speed"]["tokens_per_s"],
        seconds=seconds,
    )


def _engine(job: Comparison, model: Path, folder: Path) -> dict[str, Any]:
    """One engine start: speed and scores, unless they are there."""
    done = folder / "done.json"
    if done.is_file():
        before: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return before
    rows = str((job.out / "rows.jsonl").resolve())
    task = {
        "model": str(model.resolve()),
        "out": str(folder.resolve()),
        "score": {"rows": rows, "limit": len(job.rows), "topk": job.topk},
        "speed": {"prompts": rows, "batch": job.batch, "tokens": job.tokens, "ttft": 1},
    }
    shutil.rmtree(folder, ignore_errors=True)
    result = run_engine(task, job.engine)
    write_atomic(done, json.dumps(result) + "\n")
    return result


def _scores(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / "scores.parquet").to_pylist()
    return found


def _perplexity(job: Comparison, folder: Path) -> float:
    scores = _scores(folder)
    size = 1 + max(row["id"] for row in job.rows)
    value = likelihood(scores, dict.fromkeys(range(size), "x"), size)["perplexity"].value()
    return math.inf if value is None else value
