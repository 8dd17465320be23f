"""Two tokenisations of one text, cut into the smallest groups that begin and end at the same bytes.

A group is a run of the student's tokens and a run of the teacher's that spell the same bytes. Special tokens
spell nothing, so that one side's begin-of-text token shifts nothing (TRL #5885). Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.errors import DataError


@dataclass(frozen=True, slots=True)
class Group:
    """Half-open runs of token places that spell the same bytes."""

    student: tuple[int, int]
    teacher: tuple[int, int]


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Group]:
    """The groups of two spellings of one text, in order; together they hold every token of both.

    Raises: DataError when the texts differ.
    """
    if b"".join(student) != b"".join(teacher):
        raise DataError("the two tokenizers spell different texts; their answers cannot be aligned.")
    groups: list[Group] = []
    i = j = first_i = first_j = at_i = at_j = 0
    while i < len(student) or j < len(teacher):
        if at_i <= at_j and i < len(student):
            at_i, i = at_i + len(student[i]), i + 1
        else:
            at_j, j = at_j + len(teacher[j]), j + 1
        if at_i == at_j and i > first_i and j > first_j:
            groups.append(Group((first_i, i), (first_j, j)))
            first_i, first_j = i, j
    if groups and (first_i < i or first_j < j):  # tokens that spell nothing join the last group
        last = groups.pop()
        groups.append(Group((last.student[0], i), (last.teacher[0], j)))
    return groups
