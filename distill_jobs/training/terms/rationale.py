"""Distilling step-by-step (arXiv 2305.02301): answers and rationales as two tasks of one model.

The loss is a * mean over answer tokens + (1 - a) * mean over rationale tokens, both over the whole step. Here
it is a factor on each token's weight, so the chunked op stays as it is. Knows nothing of models.
"""

from __future__ import annotations

import numpy as np

from contracts.errors import DataError

ANSWER, RATIONALE = "answer", "rationale"


def task_factors(tasks: np.ndarray, tokens: np.ndarray, answer_weight: float) -> np.ndarray:
    """(rows,) factors f such that sum of f * tokens is all tokens, and the tasks' shares are a and 1 - a.

    `tokens` are the rows' (weighted) token counts in this step. A step with one task alone gives it all.
    Raises: DataError for a task of another name.
    """
    unknown = set(np.unique(tasks)) - {ANSWER, RATIONALE}
    if unknown:
        raise DataError(f"column task holds {sorted(unknown)}; rows are {ANSWER!r} or {RATIONALE!r}.")
    total, answers = tokens.sum(), tokens[tasks == ANSWER].sum()
    if answers in (0, total):
        return np.ones(len(tasks))
    share = np.where(tasks == ANSWER, answer_weight / answers, (1 - answer_weight) / (total - answers))
    return np.asarray(share * total)
