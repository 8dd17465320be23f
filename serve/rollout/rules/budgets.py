"""What an engine's or a registry's errors cost: a budget of their own, never held against the student.

Knows nothing about what was tried.
"""

from __future__ import annotations

from serve.rollout.draft import Draft, end

ENGINE_ERROR_BUDGET = 6
"""Engine errors in a row before a rollout gives up; with the back-off below that is about half a minute."""
NOT_ITS_FAULT = "engine error, not the student's failure"


def spend(d: Draft) -> bool:
    """Count the tick's engine error and back off; False when the budget is gone with it."""
    errors = d.status.engine_errors + 1
    d.set(engine_errors=errors)
    if errors < ENGINE_ERROR_BUDGET:
        d.set(retry_at=d.seen.now + back_off_s(errors))
        return True
    return False


def back_off_s(errors: int) -> float:
    """Seconds until the next try after this many errors in a row."""
    return float(0.5 * 2 ** min(errors, 10))


def said_error(d: Draft) -> str:
    """Which error of how many, and what it said."""
    return (
        f"engine error {d.status.engine_errors} of {ENGINE_ERROR_BUDGET}, trying again: {d.seen.engine_error}"
    )


def engine_error(d: Draft, what: str) -> bool:
    """Before traffic: back off, and give up without a verdict on the student when the budget is gone."""
    if d.seen.engine_error is None:
        return False
    if spend(d):
        d.set(reason=said_error(d))
    else:
        tries = d.status.engine_errors
        end(d, "aborted", f"{NOT_ITS_FAULT}: it {what} in {tries} tries: {d.seen.engine_error}")
    return True
