"""An OpenAI-compatible server asked politely: bounded in flight, retried with jitter, within a budget.

Knows nothing about what is asked.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from contracts.config import write_atomic
from contracts.errors import ConfigError, EngineError
from distill_jobs.teaching.config import EndpointConfig

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0
_LONGEST_RETRY_AFTER_S = 600.0
_SAVE_EVERY_S = 1.0
_SAID_CHARS = 300

Body = dict[str, Any]
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Budget:
    """Requests and tokens used by a job in all, kept in a file so that a restart does not get them anew."""

    def __init__(self, file: Path, config: EndpointConfig, field: str) -> None:
        self._file, self._config, self._field = file, config, field
        spent = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.requests: int = spent.get("requests", 0)
        self.tokens: int = spent.get("tokens", 0)
        self._saved = time.monotonic()

    def take(self) -> None:
        """Account for a request that is about to be sent. Raises: EngineError when there is nothing left."""
        for name, used, most in (
            ("max_requests", self.requests, self._config.max_requests),
            ("max_tokens", self.tokens, self._config.max_tokens),
        ):
            if most is not None and used >= most:
                raise EngineError(
                    f"{self._field}.{name} = {most} is used up. What was answered is kept: raise it and run"
                    f" the"
                    " same command again to go on."
                )
        self.requests += 1

    def used(self, usage: object) -> None:
        """Account for an answer's tokens (OpenAI's `usage`)."""
        if isinstance(usage, dict):
            self.tokens += int(usage.get("total_tokens") or 0)
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file."""
        self._saved = time.monotonic()
        write_atomic(self._file, json.dumps({"requests": self.requests, "tokens": self.tokens}) + "\n")


class Endpoint:
    """One server. Use as an async context manager."""

    def __init__(self, config: EndpointConfig, budget: Budget) -> None:
        self.config = config
        self._budget = budget
        self._session: aiohttp.ClientSession | None = None
        self._failed: EngineError | None = None
        self._free = config.tokens_in_flight
        self._slots = config.concurrency
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Endpoint:
        headers = {}
        if self.config.api_key_env is not None:
            key = os.environ.get(self.config.api_key_env, "").strip()
            if not key:
                raise ConfigError(
                    f"endpoint.api_key_env: {self.config.api_key_env} is not set in the environment."
                )
            headers["Authorization"] = f"Bearer {key}"
        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.save()
        if self._session is not None:
            await self._session.close()

    async def ask(self, path: str, body: Body, tokens: int = 0) -> Body:
        """POST a body to /v1/`path`; `tokens` is what it takes of tokens_in_flight. Raises: EngineError."""
        async with self._place(min(tokens, self.config.tokens_in_flight)):
            try:
                return await self._retried(path, body)
            except EngineError as err:
                self._failed = err
                raise

    async def map(self, ask: Callable[[Item], Awaitable[Answer]], items: Sequence[Item]) -> list[Answer]:
        """`ask` for all items at once, as far as the bounds allow. After a failure nothing new is sent, but
        what is in flight (and maybe paid for) ends first. Raises: the first failure.
        """
        done = await asyncio.gather(*(ask(item) for item in items), return_exceptions=True)
        for one in done:
            if isinstance(one, BaseException):
                raise one
        return done  # type: ignore[return-value]

    async def _retried(self, path: str, body: Body) -> Body:
        for attempt in range(self.config.retries + 1):
            if self._failed is not None:
                raise self._failed
            self._budget.take()
            status, text, wait_s = await self._post(path, body)
            if status == 200:
                return self._parsed(text)
            if status is not None and status not in _AGAIN:
                break
            if attempt < self.config.retries:
                await asyncio.sleep(max(wait_s, self._backoff(attempt)))
        told = f"{status}: {text[:_SAID_CHARS]}" if status is not None else text
        raise EngineError(f"{self.config.url}/v1/{path} (model {self.config.model!r}) did not answer: {told}")

    async def _post(self, path: str, body: Body) -> tuple[int | None, str, float]:
        """(status or None, text, seconds the server wants us to wait)."""
        assert self._session is not None
        try:
            async with self._session.post(f"{self.config.url}/v1/{path}", json=body) as reply:
                return reply.status, await reply.text(), retry_after(reply.headers.get("Retry-After"))
        except (TimeoutError, aiohttp.ClientError, UnicodeDecodeError) as err:
            return None, repr(err), 0.0

    def _parsed(self, text: str) -> Body:
        try:
            answer = json.loads(text)
        except json.JSONDecodeError as err:
            raise EngineError(
                f"{self.config.url} answered with something that is not JSON: {text[:80]!r}."
            ) from err
        if (
            not isinstance(answer, dict)
            or not isinstance(answer.get("choices"), list)
            or not answer["choices"]
        ):
            raise EngineError(f"{self.config.url} answered without choices: {text[:80]!r}.")
        self._budget.used(answer.get("usage"))
        return answer

    def _backoff(self, attempt: int) -> float:
        return min(_LONGEST_WAIT_S, self.config.backoff_s * 2.0**attempt) * random.uniform(0.5, 1.5)

    @asynccontextmanager
    async def _place(self, tokens: int) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._slots > 0 and self._free >= tokens)
            self._slots, self._free = self._slots - 1, self._free - tokens
        try:
            yield
        finally:
            async with self._changed:
                self._slots, self._free = self._slots + 1, self._free + tokens
                self._changed.notify_all()


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header (a number or an HTTP date); 0 without one, at most ten minutes."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER_S) if seconds == seconds else 0.0
