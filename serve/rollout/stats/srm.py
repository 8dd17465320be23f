"""Sequential sample-ratio check: does the canary get the share of traffic that its split says?

A mismatch means that assignment or counting is broken (dropped requests, a router with an old split, retries
that change arms), and that the arms cannot be compared. Feed it what is assigned independently:
conversations, not the requests inside them, or clusters of requests will look like a mismatch.

With a Beta(kρ, k(1-ρ)) mixture over the true share against the intended ρ,

    E = B(kρ + n_c, k(1-ρ) + n_o) / (B(kρ, k(1-ρ)) ρ^n_c (1-ρ)^n_o)

is a martingale under H0: share = ρ. Each share of the ramp is a block of its own; blocks multiply, since each
one's factors are e-values given the past. Does not know what a share is used for, nor the threshold (1/0.001
is usual: it should never happen).

Source: Lindon & Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022, arXiv 2011.03567,
eq. 6 and section 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.special import betaln

CONCENTRATION = 100.0
"""k: the mixture expects a mismatch of about sqrt(ρ(1-ρ)/k)."""


class Block(NamedTuple):
    """Everything assigned under one share."""

    share: float
    canary: float
    other: float


class State(NamedTuple):
    """Blocks in the order of their first look."""

    blocks: tuple[Block, ...] = ()


def start() -> State:
    """Nothing assigned yet."""
    return State()


def look(state: State, n_canary: int, n_total: int, share: float) -> State:
    """Add what was assigned under one share; late counts of an earlier share join its block.

    A share of 0 or 1 assigns nothing at random and is left out. Raises: ValueError for impossible counts.
    """
    if not 0 <= n_canary <= n_total or not 0.0 <= share <= 1.0:
        raise ValueError(f"sample ratio: cannot have {n_canary} of {n_total} at a share of {share}")
    if n_total == 0 or share in (0.0, 1.0):
        return state
    known = {b.share: b for b in state.blocks}
    before = known.get(share, Block(share, 0.0, 0.0))
    known[share] = Block(share, before.canary + n_canary, before.other + n_total - n_canary)
    return State(tuple(known.values()))


def log_e(state: State) -> float:
    """Log of the e-process against H0: every share was the intended one."""
    return math.fsum(block_log_e(b) for b in state.blocks)


def block_log_e(block: Block, k: float = CONCENTRATION) -> float:
    """Log of one block's Bayes factor against the intended share."""
    a, b = k * block.share, k * (1.0 - block.share)
    fit = float(betaln(a + block.canary, b + block.other) - betaln(a, b))
    return fit - block.canary * math.log(block.share) - block.other * math.log1p(-block.share)


def dump(state: State) -> dict[str, list[float]]:
    """The state as lists of floats, exact through JSON."""
    return {"blocks": [value for block in state.blocks for value in block]}


def load(stored: dict[str, list[float]]) -> State:
    """The state from `dump`; fresh from an empty dict."""
    flat = stored.get("blocks", [])
    return State(tuple(Block(*flat[i : i + 3]) for i in range(0, len(flat), 3)))
