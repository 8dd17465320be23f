"""Hooks that must say yes before a move: whom to ask, and what an answer, a refusal or an error does.

The controller asks; here the answers are part of the observation, so that a replay hears the same ones.
Knows nothing about HTTP.
"""

from __future__ import annotations

from contracts.hooks import HookPoint
from contracts.rollout import Confirming, RolloutSpec, RolloutStatus
from serve.rollout.draft import Draft
from serve.rollout.observation import Answer
from serve.rollout.rules.budgets import back_off_s

REFUSED_AGAIN_S = 30.0
"""A hook that refused is asked again after this long, or after a look where looks are rarer."""


def asked_hooks(spec: RolloutSpec, point: HookPoint) -> list[int]:
    """Indices of the hooks that confirm this kind of move."""
    return [i for i, hook in enumerate(spec.hooks) if hook.confirm is point]


def may_start(spec: RolloutSpec, status: RolloutStatus) -> bool:
    """True when the student may be deployed: nobody wants to be asked, or all said yes."""
    return not asked_hooks(spec, HookPoint.BEFORE_START) or HookPoint.BEFORE_START in status.confirmed


def confirmed(d: Draft, point: HookPoint, key: str) -> bool:
    """True when every hook said yes to this move; otherwise they are asked from the next tick on."""
    if not asked_hooks(d.spec, point) or key in d.status.confirmed:
        return True
    if d.status.confirm is None or d.status.confirm.key != key:
        d.set(confirm=Confirming(key=key, point=point, retry_at=d.seen.now))
    return False


def hear(d: Draft) -> str | None:
    """Take in this tick's answers; returns what failed when the error budget is gone."""
    for answer in d.seen.answers:
        waiting = d.status.confirm
        if waiting is None or answer.key != waiting.key:
            continue
        if answer.accepted:
            _accept(d, waiting, answer)
        elif answer.refused:
            later = max(REFUSED_AGAIN_S, d.spec.look_s)
            words = f"{d.spec.hooks[answer.hook].label} refused: {answer.words}"
            d.set(confirm=_changed(waiting, errors=0, words=words, retry_at=d.seen.now + later))
        elif (failed := _error(d, waiting, answer)) is not None:
            return failed
    return None


def waits_for(d: Draft, what: str) -> str:
    """Why a move has not happened yet."""
    waiting = d.status.confirm
    if waiting is not None and waiting.words:
        return f"{what} is not confirmed: {waiting.words}"
    left = [d.spec.hooks[i].label for i in unanswered(d.spec, waiting)] if waiting is not None else []
    return f"{what} waits until it is confirmed by {', '.join(left)}"


def unanswered(spec: RolloutSpec, waiting: Confirming) -> list[int]:
    """Indices of the hooks that have not said yes yet."""
    return [i for i in asked_hooks(spec, waiting.point) if i not in waiting.accepted]


def _accept(d: Draft, waiting: Confirming, answer: Answer) -> None:
    now = _changed(waiting, accepted=(*waiting.accepted, answer.hook), errors=0, words="")
    if unanswered(d.spec, now):
        d.set(confirm=now)
    else:
        d.set(confirm=None, confirmed=(*d.status.confirmed, now.key))
        d.notes.append(f"{now.key} confirmed by {d.spec.hooks[answer.hook].label}")


def _error(d: Draft, waiting: Confirming, answer: Answer) -> str | None:
    hook, errors = d.spec.hooks[answer.hook], waiting.errors + 1
    words = f"{hook.label} failed, try {errors} of {hook.retries + 1}: {answer.words}"
    if errors > hook.retries:
        d.set(confirm=None)
        return words
    d.set(confirm=_changed(waiting, errors=errors, words=words, retry_at=d.seen.now + back_off_s(errors)))
    return None


def _changed(waiting: Confirming, **values: object) -> Confirming:
    return waiting.model_copy(update=values)
