"""What the teacher's outputs will take on disk, before any of them is computed.

Raw bytes; Parquet makes them a little smaller. Knows nothing about files.
"""

from __future__ import annotations

from contracts.errors import ConfigError
from distill_jobs.teaching.config import TeachConfig

_PAIR = 6  # int32 id, float16 log-probability
_HALF = 2


def bytes_a_position(config: TeachConfig, hidden: int) -> int:
    """Bytes of one completion position; `hidden` is the width of the teacher's last hidden state."""
    return _HALF * hidden if config.scheme == "hidden" else _PAIR * config.width


def cache_size(config: TeachConfig, rows: int, positions: int, vocabulary: int, hidden: int) -> str:
    """One line about what will be written, beside what full logits in 16 bits would take.

    Raises: ConfigError when it is more than teach.max_cache_gb.
    """
    if config.scheme == "text":
        return f"teach: {rows} samples, {positions} positions, text alone: nothing is cached"
    each = bytes_a_position(config, hidden)
    what = {"topk": f"top {config.k}", "sampled": f"{config.draws} draws", "hidden": f"{hidden} hidden"}
    total, full = positions * each, positions * _HALF * vocabulary
    if total > config.max_cache_gb * 1e9:
        smaller = positions * _PAIR * 12 / 1e9
        raise ConfigError(
            f"teach would write {total / 1e9:.3g} GB of teacher outputs, more than teach.max_cache_gb ="
            f" {config.max_cache_gb:g}. Raise it, collect fewer samples (collect.max_rows), or set"
            f" teach.scheme:"
            f" sampled (12 draws take {smaller:.3g} GB)."
        )
    return (
        f"teach: {rows} samples, {positions} positions x {what[config.scheme]}: the cache takes about"
        f" {total / 1e6:.1f} MB ({each} bytes a position, 1/{full / max(1, total):.3g} of full logits)"
    )
