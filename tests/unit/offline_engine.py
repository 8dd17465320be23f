"""An offline engine that writes answers as the real one does, and dies where a test wants it to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_jobs.config import EngineConfig
from distill_jobs.lines import open_to_append, stream_lines


class Killed(BaseException):
    """SIGKILL, as far as Python can play it."""


class OfflineEngine:
    """Answers each prompt with `reply`, appending; after `dies_after` answers a torn line is its last."""

    def __init__(self, reply: Callable[[dict[str, Any]], str], dies_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.sessions = 0
        self._reply, self._dies_after = reply, dies_after

    def __call__(self, job: dict[str, Any], engine: EngineConfig) -> dict[str, Any]:
        """One session."""
        self.sessions += 1
        with open_to_append(Path(job["out"]) / "answers.jsonl") as sink:
            for prompt in stream_lines(Path(job["answer"]["prompts"])):
                if len(self.asked) == self._dies_after:
                    sink.write('{"id": "d-refund')
                    raise Killed
                self.asked.append(prompt["id"])
                row = {"id": prompt["id"], "text": self._reply(prompt), "finish_reason": "stop"}
                sink.write(json.dumps(row) + "\n")
        return {}
