"""The teacher asked for text: through an offline engine of its own, or over a chat API.

Answers are appended as they come, so an interrupted run goes on with the questions that are left. Knows
nothing about what the questions are for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError
from distill_jobs.config import EngineConfig
from distill_jobs.engine import run_engine, seed_of
from distill_jobs.lines import LineIndex, chunks, open_to_append, write_stream
from distill_jobs.teaching.config import EndpointConfig
from distill_jobs.teaching.endpoint import Body, Budget, Endpoint
from distill_jobs.tokens import ChatTokenizer

Answerer = Callable[[dict[str, Any], EngineConfig], dict[str, Any]]

_CHUNK = 64
_BODY_KEPT = ("tools", "tool_choice", "response_format", "stop", "chat_template_kwargs")
"""Fields of a logged request that shape its answer and that a chat API is told of."""


@dataclass(frozen=True, slots=True)
class Question:
    """One conversation to be continued."""

    id: str
    messages: list[dict[str, Any]]
    request: dict[str, Any]
    """The OpenAI body that the conversation is of: its tools and template arguments count too."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; the seed of each question comes of its id."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1


Answers = Mapping[str, list[str]]
"""Finished texts by question; unfinished ones (cut by max_tokens) are left out, a question may have none."""


class Said(Mapping[str, list[str]]):
    """The answers in a file of lines, read when asked for. 28 bytes of memory a question."""

    def __init__(self, file: Path) -> None:
        self._rows = LineIndex([file] if file.is_file() else [], "id")

    def __getitem__(self, question: str) -> list[str]:
        row = self._rows.find(question)
        if row is None:
            raise KeyError(question)
        drawn = row.get("choices") or [row]
        return [c["text"] for c in drawn if c["finish_reason"] == "stop" and c["text"]]

    def __contains__(self, question: object) -> bool:
        return question in self._rows

    def __iter__(self) -> Iterator[str]:
        return (row["id"] for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class EngineVoice:
    """The teacher's checkpoint in an offline vLLM (a process of its own, see engine.py)."""

    def __init__(
        self,
        model: Path,
        engine: EngineConfig,
        tokenizer: ChatTokenizer,
        field: str,
        answer: Answerer = run_engine,
    ) -> None:
        """`field` is the section of the configuration to name when something has to be set."""
        self._model, self._engine, self._tokenizer = model, engine, tokenizer
        self._field, self._answer = field, answer

    def ask(self, questions: Iterable[Question], sampling: Sampling, folder: Path) -> Answers:
        """Answers to all questions that fit, in one session of the engine however many they are; none when
        an earlier run has them all. Raises: ConfigError when none can fit; EngineError.
        """
        answers, prompts = folder / "answers.jsonl", folder / "prompts.jsonl"
        said = Said(answers)
        left = (q for q in questions if q.id not in said)
        if write_stream(prompts, self._prompts(left, sampling)) == 0:
            return said
        job = {"prompts": str(prompts), **_sampling(sampling)}
        self._answer({"model": str(self._model), "out": str(folder), "answer": job}, self._engine)
        return Said(answers)

    def _prompts(self, questions: Iterable[Question], sampling: Sampling) -> Iterator[dict[str, Any]]:
        room = self._engine.max_model_len - sampling.max_tokens
        for question in questions:
            if room <= 0:
                raise ConfigError(
                    f"{self._field}.answer_tokens = {sampling.max_tokens} leaves no room for a prompt in"
                    f" evaluate.engine.max_model_len = {self._engine.max_model_len}. Lower the one or raise"
                    " the other."
                )
            ids = self._tokenizer.prompt(question.request, question.messages)
            if len(ids) <= room:
                yield {"id": question.id, "ids": ids}


class ApiVoice:
    """A teacher behind an OpenAI-compatible chat API."""

    def __init__(self, endpoint: EndpointConfig, field: str, spent: Path) -> None:
        self._endpoint = endpoint
        self._budget = Budget(spent, endpoint, field)

    def ask(self, questions: Iterable[Question], sampling: Sampling, folder: Path) -> Answers:
        """Answers to all questions. Raises: EngineError when the server or the budget refuses; what was
        answered is kept.
        """
        path = folder / "answers.jsonl"
        with open_to_append(path) as sink:

            def keep(row: dict[str, Any]) -> None:
                sink.write(json.dumps(row) + "\n")
                sink.flush()

            known = Said(path)
            for chunk in chunks((q for q in questions if q.id not in known), _CHUNK):
                asyncio.run(self._chunk(chunk, sampling, keep))
        return Said(path)

    async def _chunk(
        self, questions: Sequence[Question], sampling: Sampling, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        async with Endpoint(self._endpoint, self._budget) as server:
            await server.map(lambda question: self._one(server, question, sampling, keep), questions)

    async def _one(
        self, server: Endpoint, question: Question, sampling: Sampling, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        body: Body = {k: question.request[k] for k in _BODY_KEPT if k in question.request}
        body |= {"model": self._endpoint.model, "messages": question.messages, **_sampling(sampling)}
        if sampling.temperature > 0:
            body["seed"] = seed_of(question.id)
        body |= self._endpoint.extra
        answer = await server.ask("chat/completions", {k: v for k, v in body.items() if v is not None})
        choices = [
            {"text": (c.get("message") or {}).get("content"), "finish_reason": c.get("finish_reason")}
            for c in answer["choices"]
            if isinstance(c, dict)
        ]
        keep({"id": question.id, "choices": choices})


Voice = EngineVoice | ApiVoice


def _sampling(sampling: Sampling) -> dict[str, Any]:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "n": sampling.n}
    return {"max_tokens": sampling.max_tokens, **drawn}
