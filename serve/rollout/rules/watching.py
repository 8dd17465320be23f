"""Rules of `watching`: the student is promoted, the former stable is the control arm, and late harm restores
it. Counts arrive by the split's arms and are swapped here, once: whoever reads the watch sees the student as
'canary', as in the ramp.
"""

from __future__ import annotations

from contracts.rollout import Phase, WatchStatus
from serve.rollout import late, schedule, sentences
from serve.rollout.draft import Draft, end, finish_promotion, ours, roll_back, said
from serve.rollout.observation import Action, Asked, SeenWindow
from serve.rollout.rules.budgets import said_error, spend
from serve.rollout.rules.looking import kill_switch, plus


def watching(d: Draft) -> None:
    """One tick of the watch."""
    watch = d.status.watch
    assert watch is not None
    if not ours(d):
        _taken_over(d)
        return
    windows = [swapped(w) for w in d.seen.windows if w.split_version == watch.split_version]
    student = sum(w.canary.n for w in windows), sum(w.canary.errors for w in windows)
    if (kill := kill_switch(d.spec, student, (0, 0))) is not None:
        _restore(d, kill)
        return
    if d.seen.now >= d.status.next_look_at and _look(d, watch, windows):
        return
    for command in d.seen.commands:
        _command(d, command)
    if d.status.phase is Phase.WATCHING:
        _tell_registry(d)
        _end_when_over(d, watch)


def swapped(window: SeenWindow) -> SeenWindow:
    """The window with the student as canary, the former stable as stable; pairs count the canary's side."""
    mirrored = {grader: counts[::-1] for grader, counts in window.pairs.scores.items()}
    pairs = window.pairs.model_copy(update={"scores": mirrored})
    return window.model_copy(update={"stable": window.canary, "canary": window.stable, "pairs": pairs})


def _look(d: Draft, watch: WatchStatus, windows: list[SeenWindow]) -> bool:
    """Feed the detectors; True when one of them rang and the former champion is back."""
    d.looked = True
    for window in windows:
        watch = late.update(d.spec, watch, window)
        watch = watch.model_copy(update={"counts": plus(watch.counts, window)})
    cursor = {**d.status.cursor, **d.seen.cursor}
    d.set(watch=watch, cursor=cursor, next_look_at=d.seen.now + d.spec.look_s)
    if not late.alarmed(d.spec, watch):
        d.set(reason=sentences.watching(d.spec, watch, d.seen.now))
        return False
    _restore(d, sentences.late_harm(d.spec, watch))
    return True


def _restore(d: Draft, why: str) -> None:
    roll_back(d, f"after the promotion: {why}; the former stable is restored", blame=True)


def _taken_over(d: Draft) -> None:
    """Somebody else wrote the route's split; the watch ends with what they left standing."""
    what = f"the split of route {d.spec.route!r} was changed by somebody else"
    if d.seen.split is not None and d.seen.split.stable == d.spec.candidate:
        d.go(Phase.PROMOTING, f"the watch ends: {what}", weight=1.0, engine_errors=0, retry_at=d.seen.now)
    else:
        end(d, "aborted", what)


def _command(d: Draft, command: Asked) -> None:
    d.done.append(command.id)
    if d.status.phase is not Phase.WATCHING:
        d.notes.append(f"{command.verb} by {command.by} came too late: it is {d.status.phase.value}")
    elif command.verb == "abort":
        end(d, "aborted", said(command, "the promotion was taken back"))
    elif command.verb == "promote":
        finish_promotion(d, said(command, "the watch was ended early"))
    else:
        d.notes.append(f"{command.verb} by {command.by} was ignored: it is promoted and being watched")


def _tell_registry(d: Draft) -> None:
    """The champion alias moves when the watch begins, with an error budget of its own; the watch goes on."""
    if d.status.champion or d.seen.now < d.status.retry_at:
        return
    if d.seen.engine_error is None:
        d.actions = (Action.NOTIFY_PROMOTED,)
        d.set(champion="promoted", engine_errors=0)
    elif spend(d):
        d.notes.append(said_error(d))
    else:
        d.notes.append(f"the registry was not told of the champion, see to it: {d.seen.engine_error}")
        d.set(champion="promoted", engine_errors=0)


def _end_when_over(d: Draft, watch: WatchStatus) -> None:
    if d.seen.now < watch.until or d.actions or not d.status.champion:
        return
    if schedule.is_open(d.spec.windows, d.seen.now):
        finish_promotion(d, sentences.watched(d.spec, watch))
    elif d.looked:
        opening = schedule.said_opening(d.spec.windows, d.seen.now)
        d.set(reason=f"{d.status.reason}; the watch goes on until the schedule opens {opening}")
