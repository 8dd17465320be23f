"""The teacher behind a vLLM server: top-k log-probabilities of given token ids, over /v1/completions.

`prompt_logprobs` of prompt + completion as token ids is what stock vLLM offers (one token is generated and
thrown away). vLLM's sampling settings and its `processed_` modes leave prompt log-probabilities alone;
`--logprobs-mode raw_logits` does not, and is refused. Knows nothing about files.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from contracts.errors import EngineError
from distill_jobs.lines import chunks
from distill_jobs.teaching.config import EndpointConfig, TeachConfig
from distill_jobs.teaching.endpoint import Budget, Endpoint
from distill_jobs.teaching.local import Scored
from distill_jobs.teaching.rows import Row

_CHUNK = 64
"""Rows asked for at a time: what a failing server makes us lose."""
_MASS_ABOVE_ONE = 1e-3
_LIMIT = re.compile(r"max allowed:? *(\d+)")


class ServedScorer:
    """A vLLM server that holds the teacher. Raises: EngineError that says what to set on the server."""

    def __init__(self, endpoint: EndpointConfig, config: TeachConfig, spent: Path) -> None:
        self._endpoint = endpoint
        self._k = config.k
        self._budget = Budget(spent, endpoint, "teach.endpoint")

    def score(self, rows: Sequence[Row]) -> Iterator[Scored]:
        """What the teacher thinks of every row, in order."""
        for chunk in chunks(rows, _CHUNK):
            yield from asyncio.run(self._chunk(chunk))

    async def _chunk(self, rows: Sequence[Row]) -> list[Scored]:
        async with Endpoint(self._endpoint, self._budget) as server:
            return await server.map(partial(self._one, server), rows)

    async def _one(self, server: Endpoint, row: Row) -> Scored:
        body = {
            "model": self._endpoint.model,
            "prompt": row.teacher_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self._k,
            "add_special_tokens": False,
        }
        try:
            answer = await server.ask("completions", body, tokens=len(row.teacher_ids))
        except EngineError as err:
            raise self._explained(err, row) from err
        found = answer["choices"][0].get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(row.teacher_ids):
            raise EngineError(
                f"{self._endpoint.url} gave no prompt_logprobs for {len(row.teacher_ids)} tokens: it is not"
                f" a vLLM"
                " server, or one that ignores them. Use source: local, or source: api with scheme: text."
            )
        tops = [self._top(place) for place in found[row.teacher_prompt_len :]]
        return {
            "topk_ids": np.array([ids for ids, _ in tops], dtype=np.int32),
            "topk_logprobs": np.array([values for _, values in tops], dtype=np.float16),
        }

    def _top(self, place: dict[str, Any] | None) -> tuple[list[int], list[float]]:
        """The k largest of one position; the actual token is among the entries too, whatever its rank."""
        try:
            entries = [
                (int(e["rank"]), int(token), float(e["logprob"])) for token, e in (place or {}).items()
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise EngineError(f"{self._endpoint.url} returned malformed prompt_logprobs ({err!r}).") from err
        ranked = sorted(entries)[: self._k]
        values = [value for _, _, value in ranked]
        if len(ranked) < self._k or ranked[-1][0] > self._k:
            raise EngineError(
                f"{self._endpoint.url} returned {sum(r <= self._k for r, _, _ in ranked)} log-probabilities a"
                f" position where teach.k = {self._k} were asked for. Start it with --max-logprobs {self._k}"
                f" (or"
                " -1), or lower teach.k."
            )
        if max(values) > 0 or float(np.exp(values).sum()) > 1 + _MASS_ABOVE_ONE:
            raise EngineError(
                f"{self._endpoint.url} returned values that are no log-probabilities (the largest is"
                f" {max(values):.3g}). Start it with --logprobs-mode raw_logprobs."
            )
        return [token for _, token, _ in ranked], values

    def _explained(self, err: EngineError, row: Row) -> EngineError:
        """What vLLM refuses, as what to set."""
        said = str(err)
        limit = _LIMIT.search(said)
        if "prompt logprobs" in said and limit:
            return EngineError(
                f"{self._endpoint.url} gives at most {limit[1]} log-probabilities a position, and teach.k ="
                f" {self._k}. Start it with --max-logprobs {self._k} (or -1), or lower teach.k."
            )
        if "maximum context length" in said or "max_model_len" in said:
            return EngineError(
                f"{self._endpoint.url} refuses {len(row.teacher_ids)} tokens and one more. Start it with"
                f" --max-model-len {len(row.teacher_ids) + 1} or above, or lower teach.max_tokens. It said:"
                f" {said}"
            )
        return err
