"""Shows single served answers to the judges that score them, while a rollout collects evidence.

Fed by the request log's thread, which has assembled the text anyway; judged on the event loop, in tasks that
nobody waits for. Knows nothing about prompts or budgets.
"""

from __future__ import annotations

import asyncio
import time

from contracts.grading import Mode, ScoreRow
from contracts.traffic import RequestRow
from serve.grading.sampling import sampled
from serve.router.exchange import Exchange
from serve.router.judging import Judging
from serve.router.scores import Scores


class AnswerJudging:
    """The running judgements of single answers of one router process. Made on its event loop."""

    def __init__(self, judging: Judging, scores: Scores) -> None:
        self._judging = judging
        self._scores = scores
        self._judges = {n: j for n, j in judging.judges.items() if j.mode is Mode.SCORE}
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.wants_answers = bool(self._judges)
        """Some judge scores single answers."""

    def answered(self, ex: Exchange, row: RequestRow) -> None:
        """An answer's row was built: called in the log's thread. Only what is evidence is worth a call."""
        if not ex.evidence():
            return
        for name, judge in self._judges.items():
            if judge.grades(row.route) and sampled(name, judge, row.request_id):
                self._loop.call_soon_threadsafe(self._begin, name, ex, row)

    async def close(self) -> None:
        """Give up what is running; nobody waits for it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, name: str, ex: Exchange, row: RequestRow) -> None:
        task = self._loop.create_task(self._judge(name, ex, row))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, name: str, ex: Exchange, row: RequestRow) -> None:
        assert row.response_text is not None
        score = await self._judging.score(name, row.request, row.response_text)
        if score is None:
            return
        grader = self._judging.names[name]
        self._scores.add(
            ex.evidence(),
            ScoreRow(
                id=f"{grader}:{row.request_id}",
                request_id=row.request_id,
                ts=time.time(),
                route=row.route,
                arm=row.arm.value,
                rollout_id=row.rollout_id,
                split_version=row.split_version,
                grader=grader,
                score=score,
                subjects=row.subjects,
            ),
        )
