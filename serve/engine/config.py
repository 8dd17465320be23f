"""How one vLLM engine is started: its options, its process environment, its command line.

Importable without ray, vllm or torch. Knows nothing about routes, rollouts or who asked for the engine.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Literal

from pydantic import Field, model_validator

from contracts.speculative import Speculative
from serve.engine.drafts import check_draft
from serve.engine.folders import local_model
from serve.engine.lora import LoraOptions, lora_arguments
from serve.engine.settings import read_settings
from serve.placement import Placement


class EngineOptions(Placement):
    """Options of one engine, and where its replicas run; what is None is left to vLLM."""

    settings: str | None = None
    """File of engine settings that `stillhouse tune` or `stillhouse speculate` wrote; what is said beside it
    wins. It is read once, here."""
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
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    """Tokens of one step, prompts and answers together; small ones keep steps short while prompts are read.
    """
    block_size: int | None = Field(default=None, ge=1)
    """Tokens of one block of the key-value cache; what a prefix is shared by."""
    prefix_caching: bool | None = None
    """Keep the key-value cache of prompts for requests that start alike."""
    chunked_prefill: bool | None = None
    """Read long prompts in parts, between steps of answers; off, max_num_batched_tokens must hold a whole
    request."""
    speculative: Speculative | None = None
    """Let a draft propose tokens; see docs/guides/speculative.md."""
    lora: LoraOptions | None = None
    """Serve adapters beside the model, loaded and unloaded while it runs; see docs/guides/adapters.md."""
    extra_args: tuple[str, ...] = ()
    """Further arguments of vLLM's OpenAI server, word for word."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engine's process; they win over ours."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for a replica."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads of the engine; CPU only."""
    bind: str = Field(default="nobind", pattern=r"^(nobind|auto|\d+([-,]\d+)*)$")
    """Cores of these threads (VLLM_CPU_OMP_THREADS_BIND), e.g. 0-1; nobind: the system places them. auto puts
    every engine of a machine on the same cores."""
    start_method: Literal["auto", "fork", "spawn"] = "auto"
    """How vLLM starts its own processes. auto: fork on CPU (ready in 13 s, not 28 s), vLLM's own on GPU."""
    host: str | None = "127.0.0.1"
    """Address the engine listens on; None: the node's address, which routers on other nodes need."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """From start to the first answered completion."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """How long a replica that stops waits for the requests it has."""

    def options(self) -> EngineOptions:
        """What an engine is started with: these fields alone, of a section that has more."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.model_fields})

    @model_validator(mode="before")
    @classmethod
    def _settings(cls, data: Any) -> Any:
        """What the settings file says, under what is said here."""
        if not isinstance(data, dict) or data.get("settings") is None:
            return data
        said = {name: value for name, value in data.items() if name != "settings"}
        try:
            return {**read_settings(data["settings"]), **said}
        except ValueError as err:
            raise ValueError(f"settings: {err}") from err


def engine_command(model: str, served_name: str, options: EngineOptions, host: str, port: int) -> list[str]:
    """The command that starts vLLM's OpenAI server for this model.

    `serve.engine.launch` runs the same entry point as `python -m vllm.entrypoints.openai.api_server`; the
    `vllm` console script is not used because it fails under the `vllm-cpu` distribution.

    Raises: ConfigError for a draft that cannot draft for this model.
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
    if options.max_num_batched_tokens is not None:
        command += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
    if options.block_size is not None:
        command += ["--block-size", str(options.block_size)]
    for flag, wanted in (
        ("enable-prefix-caching", options.prefix_caching),
        ("enable-chunked-prefill", options.chunked_prefill),
    ):
        if wanted is not None:
            command.append(f"--{flag}" if wanted else f"--no-{flag}")
    if options.enforce_eager:
        command.append("--enforce-eager")
    if options.speculative is not None:
        drafting = check_draft(model, options.speculative)
        command += ["--speculative-config", json.dumps(drafting.for_vllm())]
    if options.lora is not None:
        command += lora_arguments(options.lora)
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
        # vLLM's default is 1: on CPUs with AMX it would round what a file of W4A16 does not, and evaluation
        # did not. `env` turns it on.
        VLLM_CPU_INT4_W4A8="0",
        # `auto` would bind every engine of the machine to core 0 without a word.
        VLLM_CPU_OMP_THREADS_BIND=options.bind,
        OMP_NUM_THREADS=str(options.threads),
        STILLHOUSE_ENGINE_START=options.start_method,
    )
    if options.lora is not None:
        # Opens /v1/load_lora_adapter on the engine's own port; the router has no such path.
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if options.enforce_eager:
        # Else the first sampled token waits 4-6 s (90 s on a busy machine) for a helper that is compiled
        # all the same.
        env["TORCHDYNAMO_DISABLE"] = "1"
    if local_model(model) is not None:
        env["HF_HUB_OFFLINE"] = "1"
    env.update(options.env)
    return env
