"""Results of judges' checks against people's judgements, append-only.

Every method is one short transaction. Knows nothing about judges or prompts.
"""

from __future__ import annotations

from sqlalchemy import Engine, insert, select

from contracts.grading import JudgeCheck
from serve.state.tables import judge_checks


class JudgeState:
    """Typed access to the checks of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, check: JudgeCheck) -> None:
        """Remember a check."""
        values = {"grader": check.grader, "at": check.at, "body": check.model_dump_json()}
        with self._engine.begin() as db:
            db.execute(insert(judge_checks).values(**values))

    def latest(self, grader: str) -> JudgeCheck | None:
        """The last check of a judge's version, or None when it never had one."""
        query = select(judge_checks.c.body).where(judge_checks.c.grader == grader)
        with self._engine.connect() as db:
            body = db.execute(query.order_by(judge_checks.c.id.desc()).limit(1)).scalar()
        return None if body is None else JudgeCheck.model_validate_json(body)
