"""Tokens/s of several models served side by side by vLLM: all engines are up, turns of one batch alternate,
each on a quiet machine.

`measure` is the caller's side; `python -m benchmarks.compression.side_by_side JOB.json` is the process that
loads the engines: {"models": {name: folder}, "prompts": JSON lines of {"ids"}, "batches": [n], "tokens": n,
"rounds": n, "engine": EngineConfig, "result": FILE}. Knows nothing about what the models are.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.config import write_atomic
from contracts.errors import EngineError
from distill_jobs.config import EngineConfig
from distill_jobs.engine import engine_env, load, read_lines
from distill_jobs.worker_process import die_with_parent, run_worker

if TYPE_CHECKING:
    from vllm import LLM

QUIET_S = 1.5
"""Before a turn. vLLM's processes spin for a second after their last message, and a turn of a small student
is over in half of one: without this the teacher's spinning was measured with it."""
TURN_S = 2.0
"""Shortest turn: whole batches one after the other until then, since single ones of half a second scatter by
half."""
Speeds = dict[str, dict[str, list[float]]]
"""Model → batch (as text) → tokens/s of each round."""


def measure(
    models: dict[str, Path],
    prompts: Path,
    out: Path,
    engine: EngineConfig,
    batches: tuple[int, ...],
    tokens: int,
    rounds: int,
) -> Speeds:
    """Every model answers the same batches with `tokens` greedy tokens a prompt, `rounds` times, in turns.

    Raises: EngineError with the end of vLLM's log.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = (out / "speeds.json").resolve()
    job = {
        "models": {name: str(folder.resolve()) for name, folder in models.items()},
        "prompts": str(prompts.resolve()),
        "batches": batches,
        "tokens": tokens,
        "rounds": rounds,
        "engine": engine.model_dump(),
        "result": str(result),
    }
    write_atomic(out / "job.json", json.dumps(job) + "\n")
    argv = [sys.executable, "-m", "benchmarks.compression.side_by_side", str(out / "job.json")]
    run_worker(argv, result, out / "engines.log", engine_env(engine), engine.timeout_s, EngineError)
    found: Speeds = json.loads(result.read_text(encoding="utf-8"))
    return found


def main(job_file: str) -> None:
    """The worker: load all, warm up, take turns, write the result last."""
    die_with_parent()
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    engines = {name: load(folder, job["engine"]) for name, folder in job["models"].items()}
    prompts = [row["ids"] for row in read_lines(Path(job["prompts"]))]
    speeds: Speeds = {name: {str(batch): [] for batch in job["batches"]} for name in engines}
    for engine in engines.values():
        _turn(engine, prompts, 2, job["tokens"])
    for number in range(job["rounds"]):
        for batch in job["batches"]:
            for name in list(engines) if number % 2 == 0 else reversed(list(engines)):
                time.sleep(QUIET_S)
                speeds[name][str(batch)].append(_turn(engines[name], prompts, batch, job["tokens"]))
    write_atomic(Path(job["result"]), json.dumps(speeds) + "\n")


def _turn(engine: LLM, prompts: list[list[int]], batch: int, tokens: int) -> float:
    """Tokens/s of whole batches for `TURN_S`, every answer `tokens` long."""
    from vllm import SamplingParams

    asked: Any = [{"prompt_token_ids": prompts[i % len(prompts)]} for i in range(batch)]
    how = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    began, answered = time.monotonic(), 0
    while answered == 0 or time.monotonic() - began < TURN_S:
        outputs = engine.generate(asked, how, use_tqdm=False)
        answered += sum(len(o.outputs[0].token_ids) for o in outputs)
    return answered / (time.monotonic() - began)


if __name__ == "__main__":
    main(sys.argv[1])
