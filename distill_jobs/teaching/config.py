"""What the teach stage may be told: the form of the teacher's outputs, where they come from, what they cost.

Importable without torch, aiohttp or vllm. Knows nothing about how a distribution is computed.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from contracts.config import StrictConfig

Scheme = Literal["topk", "sampled", "hidden", "text"]

_LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}


class EndpointConfig(StrictConfig):
    """An OpenAI-compatible server that holds a teacher, and what may be asked of it."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset(
        {
            "url", "api_key_env", "never", "allow_production", "concurrency", "tokens_in_flight", "timeout_s",
            "retries", "backoff_s", "max_requests", "max_tokens",
        }
    )  # fmt: skip

    url: str = Field(description="Base URL that ends before /v1, e.g. http://127.0.0.1:8100.")
    model: str = Field(description="Model name that the server expects.")
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds the key; the key itself is never stored."
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields added to every chat request; null takes one out, e.g. {max_tokens: null,"
        " max_completion_tokens: 256}.",
    )
    never: tuple[str, ...] = Field(
        default=(),
        description="URLs of production: the upstreams of the stack's routes and the router itself. A teacher"
        " at one of these hosts and ports is refused, for scoring takes gigabytes that serving needs.",
    )
    allow_production: bool = Field(default=False, description="Ask a URL of `never` all the same.")
    concurrency: int = Field(default=4, ge=1, description="Requests in flight at most.")
    tokens_in_flight: int = Field(
        default=8192,
        ge=16,
        description="Prompt tokens in flight at most (one longer request goes alone): vLLM holds float32"
        " logits"
        " of all of them when it scores, outside of what its memory profile knows.",
    )
    timeout_s: float = Field(default=300.0, gt=0, description="Seconds a request may take.")
    retries: int = Field(default=5, ge=0, description="Times a failed request is sent again.")
    backoff_s: float = Field(
        default=1.0,
        ge=0,
        description="Wait before the first retry in seconds, doubled each time up to 60, times a random"
        " number"
        " from 0.5 to 1.5. A server's Retry-After is honoured when it is longer.",
    )
    max_requests: int | None = Field(
        default=None, ge=1, description="Requests that this job may send in all, over every start of it."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Tokens (prompt and completion) that this job may use in all."
    )

    @field_validator("url")
    @classmethod
    def _base_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or not urlsplit(value).hostname:
            raise ValueError("must be http://HOST or https://HOST")
        return value.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _not_production(self) -> EndpointConfig:
        served = next((u for u in self.never if place_of(u) == place_of(self.url)), None)
        if served is not None and not self.allow_production:
            raise ValueError(
                f"{self.url} is production ({served} in `never`): scoring there can take its memory away from"
                " users. Start a vLLM of its own for the teacher, or set allow_production: true"
            )
        return self


def place_of(url: str) -> tuple[str, int]:
    """(host, port) of a URL; all names of this machine's loopback are one host."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    host = (parts.hostname or "").rstrip(".").lower()
    return "localhost" if host in _LOOPBACK else host, parts.port or (443 if parts.scheme == "https" else 80)


class AnswersConfig(StrictConfig):
    """How the teacher answers offline."""

    which: Literal["missing", "all"] = Field(
        default="missing",
        description="missing: only samples without a teacher's answer. all: every sample,"
        " whatever"
        " was logged (sequence-level distillation); corrections by users stay.",
    )
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the sampling.")
    n: int = Field(default=1, ge=1, description="Answers drawn for each sample; the best is kept.")
    grader: str | None = Field(
        default=None,
        description='"module:function" called with (request, text) that returns True, False, None or a'
        " number:"
        " the answer with the highest stays, and none when all are False. Without one the most frequent text"
        " stays.",
    )

    @model_validator(mode="after")
    def _draws_differ(self) -> AnswersConfig:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n = {self.n} greedy answers are all the same; set temperature above 0, or n to 1"
            )
        return self


class DemonstrationsConfig(StrictConfig):
    """In-context demonstrations that only the teacher sees: the student learns to do without them."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset()

    k: int = Field(default=4, ge=1, description="Demonstrations before a request, the most similar last.")
    pool: int = Field(
        default=2000,
        ge=2,
        description="Training samples to choose from (a choice by digest); bounds the work.",
    )
    max_tokens: int = Field(
        default=3072,
        ge=16,
        description="Longest teacher's prompt with completion; the least similar demonstrations go first.",
    )


class WhenConfig(StrictConfig):
    """Which samples a teacher answers for: all conditions that are given must hold."""

    route: str | None = Field(default=None, description="The sample's route.")
    label: str | None = Field(default=None, description="The sample's class, see teach.label.")
    pattern: str | None = Field(
        default=None, description="Regular expression found in the last user message."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as err:
            raise ValueError(f"is not a regular expression ({err})") from err
        return value


class TeacherConfig(StrictConfig):
    """One of several teachers; all must have the same vocabulary."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in counts and folders.")
    model: str | None = Field(
        default=None, description="HF id or checkpoint folder; None is the job's teacher."
    )
    source: Literal["local", "vllm"] = Field(default="local", description="Where it is asked for its scores.")
    endpoint: EndpointConfig | None = Field(default=None, description="The server of source: vllm.")
    weight: float = Field(default=1.0, gt=0, description="Share of it where several are averaged.")
    when: WhenConfig = Field(default_factory=WhenConfig, description="Samples it is asked for.")

    @model_validator(mode="after")
    def _has_endpoint(self) -> TeacherConfig:
        if (self.source == "vllm") != (self.endpoint is not None):
            raise ValueError(f"teacher {self.name!r}: source: vllm and endpoint go together")
        return self


class TeachConfig(StrictConfig):
    """The cache of the teacher's text and distributions."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset(
        {"batch_tokens", "threads", "max_cache_gb", "cache", "window"}
    )

    scheme: Scheme = Field(
        default="topk",
        description="topk: the k largest log-probabilities and a tail. sampled: tokens drawn from the"
        " teacher with"
        " importance weights (unbiased, arXiv 2503.16870). hidden: last hidden states and the head. text:"
        " none.",
    )
    k: int = Field(
        default=20, ge=1, description="Teacher log-probabilities kept at each completion position."
    )
    draws: int = Field(
        default=50,
        ge=1,
        description="Tokens drawn at each position (scheme: sampled); equal ones are kept once, so 50 of a"
        " language model are about 12 tokens.",
    )
    proposal: float = Field(
        default=1.0,
        gt=0,
        le=2,
        description="Tokens are drawn from q ∝ p^proposal and weighted by p/q; 1 draws from the teacher"
        " itself.",
    )
    seed: int = Field(default=0, ge=0, description="Of the draws, beside each sample's digest.")
    source: Literal["local", "vllm", "api"] = Field(
        default="local",
        description="local: a Hugging Face model in this process. vllm: prompt_logprobs of a server that"
        " holds"
        " the job's teacher (never a production one). api: any OpenAI-compatible chat API, text only.",
    )
    endpoint: EndpointConfig | None = Field(default=None, description="The server of source: vllm or api.")
    teachers: tuple[TeacherConfig, ...] = Field(
        default=(), description="Several teachers in place of `source`: routed by tag, or averaged."
    )
    combine: Literal["first", "average"] = Field(
        default="first",
        description="Of the teachers whose `when` holds for a sample: the first alone, or all, by weight.",
    )
    label: str | None = Field(
        default=None,
        description='"module:function" called with (request, answer) that returns a sample\'s class or None.',
    )
    answers: AnswersConfig = Field(default_factory=AnswersConfig, description="Offline answers.")
    demonstrations: DemonstrationsConfig | None = Field(
        default=None, description="Demonstrations that the teacher sees and the student does not."
    )
    max_tokens: int = Field(
        default=1024,
        ge=8,
        description="Longest prompt plus completion in tokens; longer samples are dropped and counted.",
    )
    answer_tokens: int = Field(
        default=256, ge=1, description="Longest answer when the teacher answers offline, in tokens."
    )
    window: int = Field(
        default=20_000,
        ge=1,
        description="Samples in memory at a time, whatever the collection's size; what is written does not"
        " depend on it.",
    )
    shard_rows: int = Field(
        default=512, ge=1, description="Samples in one part file: the unit of work that a killed run repeats."
    )
    batch_tokens: int = Field(
        default=2048,
        ge=16,
        description="Padded tokens in one forward pass. Small fits a CPU's caches (2,048 took 25 % less CPU"
        " time"
        " than 8,192).",
    )
    threads: int = Field(default=1, ge=1, description="Torch threads.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Of a local teacher.")
    cache: bool = Field(
        default=True,
        description="Share the outputs with other jobs, in cache_dir, by sample, tokens and teacher.",
    )
    max_cache_gb: float = Field(
        default=100.0, gt=0, description="Refuse to start when the outputs would take more, in GB."
    )

    @model_validator(mode="after")
    def _possible(self) -> TeachConfig:
        if (self.source == "local") != (self.endpoint is None):
            raise ValueError("endpoint goes with source: vllm or source: api, and with no other")
        if self.source == "api" and self.scheme != "text":
            raise ValueError(
                "source: api gives text only. The top_logprobs of a chat API belong to its own answer's"
                " tokens, as"
                " strings, which cannot be aligned with a student's token ids; set scheme: text, or score"
                " with"
                " source: vllm or local"
            )
        served = self.source == "vllm" or any(t.source == "vllm" for t in self.teachers)
        if served and self.scheme in ("sampled", "hidden"):
            raise ValueError(
                f"scheme: {self.scheme} needs the teacher's whole distribution, which prompt_logprobs does"
                f" not give;"
                " set scheme: topk, or source: local"
            )
        if self.teachers and self.scheme in ("hidden", "text"):
            raise ValueError(
                f"several teachers cannot be combined under scheme: {self.scheme}; use topk or sampled"
            )
        if self.teachers and self.source != "local":
            raise ValueError("give `source` to each of `teachers`, not beside them")
        names = [t.name for t in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: two have the same name ({', '.join(sorted(names))})")
        return self

    @property
    def width(self) -> int:
        """Values kept at each completion position; 0 for text and (not known here) hidden states."""
        return {"topk": self.k, "sampled": self.draws}.get(self.scheme, 0)
