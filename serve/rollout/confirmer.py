"""Asks confirming hooks, in threads: a tick starts a question, a later tick takes its answer.

Nothing is remembered beyond the process; after a kill the hook is asked again, with the same event id. Knows
nothing about what an answer does (see rules/confirming.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from contracts.hooks import HookSpec
from contracts.rollout import RolloutSpec, RolloutStatus
from serve.rollout import webhook
from serve.rollout.notices import question
from serve.rollout.observation import Answer
from serve.rollout.rules.confirming import unanswered

Post = Callable[[HookSpec, str, str, str, float], webhook.Reply]
_Key = tuple[str, str, int]


class Confirmer:
    """Questions under way. `post` and `pool` are for tests."""

    def __init__(self, post: Post = webhook.post, pool: Executor | None = None) -> None:
        self._post = post
        self._pool = pool or ThreadPoolExecutor(4, thread_name_prefix="confirm")
        self._asked: dict[_Key, Future[webhook.Reply]] = {}

    def answers(self, spec: RolloutSpec, status: RolloutStatus, now: float) -> tuple[Answer, ...]:
        """Answers that have come in for the move the status waits with; asks whoever must be asked now."""
        waiting, found = status.confirm, []
        if waiting is None or now < waiting.retry_at:
            return ()
        for index in unanswered(spec, waiting):
            key = (spec.id, waiting.key, index)
            if key not in self._asked:
                body = question(spec, status, waiting.point, waiting.key)
                event_id = f"{spec.id}.{waiting.key}.{index}"
                self._asked[key] = self._pool.submit(
                    self._post, spec.hooks[index], body, waiting.point.value, event_id, now
                )
            if self._asked[key].done():
                found.append(_answer(waiting.key, index, self._asked.pop(key).result()))
        return tuple(found)

    def close(self) -> None:
        """Stop asking; what is under way ends by its timeout."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _answer(key: str, hook: int, reply: webhook.Reply) -> Answer:
    return Answer(key=key, hook=hook, accepted=reply.accepted, refused=reply.refused, words=reply.words)
