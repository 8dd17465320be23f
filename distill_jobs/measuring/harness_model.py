"""A model as lm-eval asks it: its requests become the same engine jobs that evaluation runs.

lm-eval's own vLLM backend wants a distribution named `vllm`, which a CPU installation has not; and what is
measured here is measured by the engine that serves. Greedy only. Knows nothing about tasks.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from contracts.errors import ConfigError
from distill_jobs.config import EngineConfig
from distill_jobs.engine import read_lines, run_engine, write_lines

_ANSWER_TOKENS = 256
"""Longest answer where a task does not say."""


class EngineModel(TemplateLM):
    """One checkpoint; every batch of requests is an engine job in a folder of its own, `NNN`, under `out`."""

    def __init__(self, model: Path, engine: EngineConfig, out: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model, self._engine, self._out = model, engine, out
        self._jobs = 0

    @property
    def eot_token_id(self) -> int:
        """End of text: what an empty context is."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """lm-eval keys its caches by it."""
        return str(self._model).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids without special tokens of the tokenizer's own: the chat template has put them."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The model's own template around a conversation."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the first of a request's stop texts. Raises: ConfigError for sampling."""
        found: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = defaultdict(list)
        settings = [normalize_gen_kwargs(r.args[1], _ANSWER_TOKENS) for r in requests]
        for i, one in enumerate(settings):
            if one.get("temperature"):
                raise ConfigError(
                    "evaluate.lm_eval: a task samples (temperature above 0), which would give other answers"
                    " each time. Set do_sample: false in its generation_kwargs."
                )
            by_length[int(one["max_gen_toks"])].append(i)
        for tokens, mine in by_length.items():
            room = self._engine.max_model_len - tokens
            if room < 1:
                raise ConfigError(
                    f"evaluate.lm_eval: a task's max_gen_toks ({tokens}) leaves no room in"
                    f" evaluate.engine.max_model_len ({self._engine.max_model_len})."
                )
            prompts = [{"id": i, "ids": self.tok_encode(requests[i].args[0])[-room:]} for i in mine]
            for row in self._answers(prompts, tokens):
                stops = settings[row["id"]]["until"]
                found[row["id"]] = postprocess_generated_text(row["text"], stops, None)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that fit the engine."""
        pairs, owner = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self._engine.max_model_len - 2,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((("", ""), context, continuation))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(pairs), strict=True):
            totals[i] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        rows = []
        for i, (_, context, continuation) in enumerate(requests):
            room = self._engine.max_model_len - len(continuation) - 1
            if room < 1:
                raise ConfigError(
                    f"evaluate.lm_eval: a continuation has {len(continuation)} tokens:"
                    " raise evaluate.engine.max_model_len."
                )
            rows.append({"id": i, "ids": context[-room:], "completion": continuation})
        out = self._folder()
        write_lines(out / "to-score.jsonl", rows)
        score = {"rows": str(out / "to-score.jsonl"), "limit": len(rows), "topk": 1}
        self._run(out, {"score": score})
        scored = {row["id"]: row for row in pq.read_table(out / "scores.parquet").to_pylist()}
        return [
            (float(sum(scored[i]["actual"])), scored[i]["topk_ids"] == row["completion"])
            for i, row in enumerate(rows)
        ]

    def _answers(self, prompts: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        out = self._folder()
        write_lines(out / "prompts.jsonl", prompts)
        self._run(out, {"answer": {"prompts": str(out / "prompts.jsonl"), "max_tokens": tokens}})
        return read_lines(out / "answers.jsonl")

    def _run(self, out: Path, parts: dict[str, Any]) -> None:
        run_engine({"model": str(self._model), "out": str(out), **parts}, self._engine)

    def _folder(self) -> Path:
        """Requests come in the same order each time, so an interrupted job's answers are found again."""
        self._jobs += 1
        return self._out / f"{self._jobs:03d}"
