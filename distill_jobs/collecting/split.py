"""Which side of the split a cluster of samples falls on: a function of its first digest and nothing else.

A later job over more traffic therefore never moves a request from validation to training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from distill_jobs.collecting.dedupe import Sample

SPLITS = ("train", "calibration", "validation")


def side(digest: str, calibration: float, validation: float) -> str:
    """The split of a digest: its hash as a fraction, against the shares."""
    fraction = int(hashlib.sha256(f"split:{digest}".encode()).hexdigest()[:15], 16) / 16**15
    if fraction < validation:
        return "validation"
    return "calibration" if fraction < validation + calibration else "train"


def split(
    groups: Sequence[Sequence[Sample]], calibration: float, validation: float
) -> dict[str, list[Sample]]:
    """Samples by split; a group of near-duplicates stays together."""
    sides: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for group in groups:
        sides[side(group[0]["sample_digest"], calibration, validation)] += group
    return sides
