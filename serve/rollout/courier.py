"""Delivers the outbox: at least once, in order within a stream, with back-off, and a dead letter at the end.

Runs in a thread of the controller that leads. A message that was sent but not marked (a kill in between) is
sent again under the same event id. Knows nothing about what the messages say.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from serve.rollout import webhook
from serve.rollout.confirmer import Post
from serve.state.outbox import Message, OutboxState

log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 300.0
_THREADS = 4


class Courier:
    """Delivers what is due. `leading` says whether this process may; `post` is for tests."""

    def __init__(
        self,
        engine: Engine,
        leading: Callable[[], bool] = lambda: True,
        post: Post = webhook.post,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox, self._leading, self._post, self._clock = OutboxState(engine), leading, post, clock

    def run_forever(self, stop: threading.Event, every_s: float = 0.5) -> None:
        """Deliver until `stop` is set."""
        while not stop.is_set():
            try:
                busy = self._leading() and self.deliver() > 0
            except SQLAlchemyError as err:  # a store that is away comes back
                log.warning("outbox: the state store did not answer: %s", err)
                busy = False
            stop.wait(0.01 if busy else every_s)

    def deliver(self) -> int:
        """Try the first waiting message of every stream that is due; returns how many were tried."""
        now = self._clock()
        due = [message for message in self._outbox.heads() if message.next_at <= now]
        if due:
            with ThreadPoolExecutor(min(_THREADS, len(due)), thread_name_prefix="courier") as pool:
                list(pool.map(self._one, due))
        return len(due)

    def _one(self, message: Message) -> None:
        if not self._leading():
            return
        reply = self._post(message.hook, message.body, message.event, message.event_id, self._clock())
        now = self._clock()
        if reply.accepted:
            self._outbox.delivered(message, now)
        elif message.tries >= message.hook.retries:
            log.warning("hook %s: %s is a dead letter: %s", message.hook.label, message.event_id, reply.words)
            self._outbox.given_up(message, reply.words, now)
        else:
            self._outbox.failed(message, reply.words, now + retry_s(message.tries))


def retry_s(tries: int) -> float:
    """Seconds to the next try after this many before: doubling, with jitter so that streams do not march."""
    longest = min(FIRST_RETRY_S * 2.0 ** min(tries, 20), LONGEST_RETRY_S)
    return longest * random.uniform(0.5, 1.0)
