"""Which answers and pairs a grader is shown: a function of the request's id alone.

So the sample has nothing to do with the arm, the answer or the time, and every router draws the same one.
"""

from __future__ import annotations

from hashlib import sha256

from contracts.grading import GraderFields

_TWO_64 = float(2**64)


def sampled(name: str, spec: GraderFields, request_id: str) -> bool:
    """True when a request is in a grader's sample; a larger share only adds requests."""
    return spec.sample >= 1.0 or _fraction(f"grade:{name}", request_id) < spec.sample


def canary_first(name: str, pair_id: str) -> bool:
    """Whose answer a judge sees first: a fair coin, thrown the same way by everybody and in every replay."""
    return _fraction(f"order:{name}", pair_id) < 0.5


def _fraction(salt: str, unit: str) -> float:
    digest = sha256(f"{salt}\x1f{unit}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / _TWO_64
