"""Which side of the split a cluster of samples falls on: a function of its first digest and nothing else.

A later job over more traffic therefore never moves a request from validation to training.
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "calibration", "validation")


def side(digest: str, calibration: float, validation: float) -> str:
    """The split of a digest: its hash as a fraction, against the shares."""
    fraction = int(hashlib.sha256(f"split:{digest}".encode()).hexdigest()[:15], 16) / 16**15
    if fraction < validation:
        return "validation"
    return "calibration" if fraction < validation + calibration else "train"
