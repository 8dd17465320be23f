"""Scores a mirrored request: the canary's answer against the stable arm's, or against another upstream's.

A canary that failed where the reference answered has lost: it scores 0, so that a student cannot win by
failing on what is hard. Runs after the client has its answer. Knows nothing about how copies are made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from contracts.grading import STABLE, GraderFields, JudgeGrader, ScoreRow
from contracts.metrics import PAIR
from contracts.traffic import Arm, Outcome, Reason
from serve.grading.graders import NamedPreference, pair_graders, paired
from serve.grading.sampling import sampled
from serve.request_log.subjects import subjects_of, with_unit
from serve.router.config import RouterConfig
from serve.router.exchange import Exchange
from serve.router.judging import Judging, Preference
from serve.router.ledger import EvidenceKey
from serve.router.metrics import Metrics
from serve.router.scores import Scores

_log = logging.getLogger("stillhouse.router")


class PairGrading:
    """All pair graders of one router process."""

    def __init__(self, config: RouterConfig, judging: Judging, scores: Scores, metrics: Metrics) -> None:
        self._config = config
        self._judging = judging
        self._scores = scores
        self._metrics = metrics
        self._plain = pair_graders(config.graders)
        self._judges = {n: j for n, j in judging.judges.items() if j.against is not None}
        self._thread = ThreadPoolExecutor(1, "pair-graders")

    def references(self, ex: Exchange) -> list[str]:
        """Upstreams that have to be asked too, because the route's graders compare with them."""
        split = ex.route.split
        wanted = (
            g.against
            for name, g in self._all().items()
            if g.grades(split.route) and sampled(name, g, ex.request_id)
        )
        known = {STABLE, split.stable.name}
        return [w for w in dict.fromkeys(wanted) if w is not None and w not in known]

    async def grade(self, original: Exchange, canary: Exchange, others: Mapping[str, Exchange]) -> None:
        """Score a pair with every grader; one that fails costs its own score only."""
        if canary.outcome is Outcome.CLIENT_CLOSED:  # we left in the middle of it
            return
        loop = asyncio.get_running_loop()
        said = await loop.run_in_executor(self._thread, _text, canary)
        for name, grader in self._all().items():
            if not grader.grades(original.route.split.route) or not sampled(
                name, grader, original.request_id
            ):
                continue
            assert grader.against is not None
            reference = others.get(grader.against, original)
            told = await loop.run_in_executor(self._thread, _text, reference)
            if told is None or (said is None and canary.outcome is Outcome.OK):
                self._metrics.ungraded.labels(self._shown(name), "no_text").inc()
                continue
            found = await self._prefer(name, grader, original, said, told)
            if found is not None:
                self._add(name, grader, found, original, canary, reference)

    def close(self) -> None:
        """Forget what waits; what runs ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _all(self) -> dict[str, GraderFields]:
        return {**{p.name: p.spec for p in self._plain}, **self._judges}

    def _shown(self, name: str) -> str:
        return self._judging.names.get(name, name)

    async def _prefer(
        self, name: str, grader: GraderFields, original: Exchange, said: str | None, told: str
    ) -> Preference | None:
        """`said` is None when the canary failed."""
        if isinstance(grader, JudgeGrader):
            if said is None:
                return await self._lost(name, grader, original, told)
            return await self._judging.prefer(name, original.request_id, original.body, said, told)
        plain = next(p for p in self._plain if p.name == name)
        call = partial(_value, plain, original, said, told)
        try:
            value = await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except Exception as err:  # noqa: BLE001 reason: a grader is the user's code; counted and told
            self._metrics.grader_errors.labels(name).inc()
            _log.error("grader %s failed on a pair: %s", name, type(err).__name__)
            return None
        if value is None:
            self._metrics.ungraded.labels(name, "abstained").inc()
        return None if value is None else Preference(value)

    async def _lost(self, name: str, judge: JudgeGrader, original: Exchange, told: str) -> Preference | None:
        if judge.pairwise:
            return Preference(0.0)
        value = paired(0.0, await self._judging.score(name, original.body, told))
        return None if value is None else Preference(value)

    def _add(
        self,
        name: str,
        grader: GraderFields,
        found: Preference,
        original: Exchange,
        canary: Exchange,
        reference: Exchange,
    ) -> None:
        split, assignment = original.route.split, original.assignment
        order = found.canary_first
        row = ScoreRow(
            id=f"{self._shown(name)}:{canary.request_id}",
            request_id=canary.request_id,
            reference_id=reference.request_id,
            pair_id=original.request_id,
            ts=time.time(),
            route=split.route,
            arm=PAIR,
            rollout_id=split.rollout_id,
            split_version=split.version,
            grader=self._shown(name),
            against=grader.against,
            first=None if order is None else "canary" if order else "reference",
            score=found.value,
            subjects=with_unit(subjects_of(original.body), assignment.unit_kind, assignment.unit_hash),
        )
        self._scores.add(pair_evidence(original), row)


def mirrored(ex: Exchange) -> bool:
    """True for a request whose answer is the stable arm's own, and was not asked for by name."""
    assignment = ex.assignment
    return (
        assignment.arm is Arm.STABLE
        and assignment.reason in (Reason.RANDOM, Reason.ONLY_ARM)
        and not ex.fell_back
    )


def pair_evidence(ex: Exchange) -> tuple[EvidenceKey, ...]:
    """Where a pair counts as evidence: nowhere outside a rollout."""
    split = ex.route.split
    if split.rollout_id is None:
        return ()
    return (EvidenceKey(split.route, split.rollout_id, PAIR, split.version),)


def _text(ex: Exchange) -> str | None:
    """The text of an answer; None when there is none, or the request failed."""
    return ex.answered()[0].text if ex.outcome is Outcome.OK else None


def _value(grader: NamedPreference, original: Exchange, said: str | None, told: str) -> float | None:
    if said is not None:
        return grader.prefer(original.body, said, told)
    return 0.0 if grader.score is None else paired(0.0, grader.score(original.body, told))
