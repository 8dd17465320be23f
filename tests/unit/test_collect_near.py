"""Near-duplicates, leakage and the split at scale's code path, against brute force over all pairs."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_jobs.collecting import compare, parts
from distill_jobs.collecting.bands import MISSED, choose_bands, may_resemble, sketches
from distill_jobs.collecting.choose import choose
from distill_jobs.collecting.near import merge
from distill_jobs.collecting.rows import normalise
from distill_jobs.collecting.shingles import PERMUTATIONS, jaccard, shingles, signatures
from distill_jobs.collecting.split import side
from tests.integration.pipeline_world import log_row
from tests.unit.test_collect import chat, collect

Sides = dict[str, list[tuple[str, str]]]
WORDS = [
    "refund",
    "order",
    "parcel",
    "invoice",
    "late",
    "cancel",
    "物流",
    "状态",
    "passwort",
    "größe",
    "coupon",
]


def texts(count: int, seed: int) -> list[str]:
    """Requests of which many are near-duplicates of an earlier one, by chance at every similarity."""
    rng = random.Random(seed)
    made: list[str] = []
    for number in range(count):
        if made and rng.random() < 0.5:
            words = rng.choice(made).split()
            for _ in range(rng.randint(1, 4)):
                words[rng.randrange(len(words))] = rng.choice(WORDS) + rng.choice("abc")
        else:
            words = [rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(rng.randint(1, 24))]
        made.append(" ".join(words) if number % 17 else rng.choice(made or ["hi"]).upper())
    return made


def similarities(left: list[str], right: list[str]) -> Any:
    """Jaccard of 5-grams of all pairs, by one product of membership matrices."""
    every = {gram: n for n, gram in enumerate(sorted(set().union(*map(shingles, left + right))))}

    def member(some: list[str]) -> Any:
        matrix = np.zeros((len(some), len(every)), np.float32)
        for at, text in enumerate(some):
            matrix[at, [every[gram] for gram in shingles(text)]] = 1
        return matrix

    a, b = member(left), member(right)
    shared = (a @ b.T).astype(np.float64)
    return shared / (a.sum(1)[:, None] + b.sum(1)[None] - shared)


def brute_force(rows: list[dict[str, Any]], held: list[str], threshold: float | None, keep: int) -> Sides:
    """What collect must do, pair by pair: (digest, answer) by side. `rows` are to_sample's."""
    latest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (r["ts"], r["request_id"])):
        latest[row["sample_digest"]] = row
    free = [latest[d] for d in sorted(latest)]
    bound = 2.0 if threshold is None else threshold
    unlike = (similarities([row["text"] for row in free], held) < min(bound, 1)).all(axis=1)
    free = [row for row, keep_it in zip(free, unlike, strict=True) if keep_it]
    group = np.arange(len(free))
    alike = similarities([row["text"] for row in free], [row["text"] for row in free]) >= bound
    for i, j in zip(*np.nonzero(np.tril(alike, -1)), strict=True):
        group[group == max(group[i], group[j])] = min(group[i], group[j])
    sides: Sides = {name: [] for name in ("train", "calibration", "validation")}
    for first in sorted(set(group)):
        for at in [i for i, g in enumerate(group) if g == first][:keep]:
            where = side(free[first]["sample_digest"], 0.2, 0.2)
            sides[where].append((free[at]["sample_digest"], free[at]["answer"]))
    return {name: sorted(rows) for name, rows in sides.items()}


@pytest.mark.parametrize("partition_bytes", [64 << 20, 25_000])
@pytest.mark.parametrize(("threshold", "keep"), [(0.8, 1), (0.5, 2), (0.95, 1), (1.0, 1), (None, 1)])
def test_what_is_kept_is_what_brute_force_keeps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    partition_bytes: int,
    threshold: float | None,
    keep: int,
) -> None:
    """Samples, answers and sides over 300 requests are those of comparing all pairs, however many partitions
    there are; counts add up.
    """
    from tests.unit.test_collect import row, settings, to_sample

    monkeypatch.setattr(parts, "PARTITION_BYTES", partition_bytes)
    asked = texts(300, seed=5)
    lines = [log_row(n, chat(t), response_text=f"answer {n}") for n, t in enumerate(asked)]
    held = [normalise(t) for t in (asked[3], asked[40] + " x", "nobody asked this")]
    (tmp_path / "held.txt").write_text("\n".join(held))
    result, rows = collect(
        tmp_path,
        [json.dumps(line) for line in lines],
        near_duplicates=threshold,
        keep_per_cluster=keep,
        holdout=(tmp_path / "held.txt",),
        validation=0.2,
        calibration=0.2,
    )
    samples = [to_sample(row(**line), settings()) for line in lines]
    ours = {name: [(r["sample_digest"], r["answer"]) for r in side_rows] for name, side_rows in rows.items()}
    assert ours == brute_force(samples, held, threshold, keep)
    dropped = ("exact_duplicate", "held_out", "near_duplicate", "over_max_rows")
    assert result.counts["kept"] == 300 == sum(result.counts[n] for n in dropped) + result.counts["samples"]
    assert result.counts["held_out"] > 0
    written = len(list((tmp_path / "collect" / "train").glob("part-*.parquet")))
    assert written == 1 if partition_bytes > 25_000 else written > 5


def test_very_large_buckets_are_split_and_still_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more texts share a band than are compared all with all, further bands divide them: same
    result.
    """
    asked = [f"{t} please help me with this as soon as it is possible" for t in texts(150, seed=6)]
    lines = [json.dumps(log_row(n, chat(t), response_text="a")) for n, t in enumerate(asked)]
    for folder in ("whole", "split"):
        (tmp_path / folder).mkdir()
    whole, rows = collect(tmp_path / "whole", lines, near_duplicates=0.6)
    monkeypatch.setattr(compare, "MOST_IN_BUCKET", 12)
    split, again = collect(tmp_path / "split", lines, near_duplicates=0.6)
    assert again == rows
    assert whole.counts["near_duplicate"] == split.counts["near_duplicate"] > 20
    assert whole.counts["near_unchecked_pairs"] == 0


def test_equal_texts_under_different_instructions_are_one_cluster(tmp_path: Path) -> None:
    """A system prompt with a date makes every request another sample; the student still learns it once."""
    lines = [
        json.dumps(
            log_row(n, {"messages": [{"role": "system", "content": f"day {n}"}, chat("hi")["messages"][0]]})
        )
        for n in range(9)
    ]
    result, _ = collect(tmp_path, lines, validation=0, calibration=0)
    assert (result.counts["exact_duplicate"], result.counts["near_duplicate"]) == (0, 8)


def test_max_rows_takes_whole_clusters_in_order_of_their_first_digest() -> None:
    """The choice is by digest alone, a cluster is never torn, and no more than asked for are kept."""
    roots = np.array([0, 1, 0, 3, 1, 5], np.int32)
    sides = np.array([2, 1, 0, 0, 0, 1], np.uint8)
    counts: Counter[str] = Counter()
    everything = np.ones(6, bool)
    found = choose(roots, sides, everything, 2, 3, counts)
    assert found.copies.tolist() == [1, 0, 1, 0, 0, 0]
    assert found.side.tolist() == [2, 1, 2, 0, 1, 1]
    assert counts == {"near_duplicate": 0, "over_max_rows": 4}
    assert choose(roots, sides, everything, 1, None, Counter()).copies.tolist() == [1, 1, 0, 1, 0, 1]
    without = np.array([False, True, True, True, True, True])
    assert choose(roots, sides, without, 1, None, Counter()).copies.tolist() == [0, 1, 1, 1, 0, 1]


def test_clusters_are_joined_through_chains_and_named_by_their_least_member() -> None:
    """Edges of several workers over the same clusters meet; what no edge touches stays."""
    roots = np.array([0, 1, 1, 3, 4, 5, 4], np.int32)
    edges = [np.array([[1, 4]], np.int32), np.empty((0, 2), np.int32), np.array([[3, 4]], np.int32)]
    assert merge(roots, edges).tolist() == [0, 1, 1, 1, 1, 5, 1]


def test_signatures_estimate_jaccard() -> None:
    """The share of equal values is the similarity (within five standard deviations), short texts included,
    and does not depend on which texts are hashed together.
    """
    some = texts(120, seed=9)
    signed = signatures(some)
    assert (signatures(some[7:9]) == signed[7:9]).all()
    assert signatures([]).shape == (0, PERMUTATIONS)
    for i in range(0, 118, 2):
        true = jaccard(shingles(some[i]), shingles(some[i + 1]))
        assert abs((signed[i] == signed[i + 1]).mean() - true) <= 5 * (0.25 / PERMUTATIONS) ** 0.5
    same, other = signatures(["ab", "ab", "ba", "", "\ud800x"]), signatures(["ab"])
    assert (same[0] == same[1]).all()
    assert (same[0] == other[0]).all()
    assert (same[0] != same[2]).mean() > 0.9


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.98, 1.0])
def test_bands_miss_next_to_nothing_and_sketches_refuse_strangers(threshold: float) -> None:
    """A pair at the threshold shares a band but for two chances in ten thousand, and no sketch refuses it."""
    bands = choose_bands(threshold)
    assert bands.count * bands.rows <= PERMUTATIONS
    assert (1 - min(threshold, 0.98) ** bands.rows) ** bands.count <= MISSED
    some = texts(200, seed=11)
    drawn = sketches(signatures(some))
    left, right = np.triu_indices(len(some), 1)
    passed = may_resemble(drawn[left], drawn[right], threshold)
    true = similarities(some, some)[left, right]
    assert passed[true >= threshold].all()
    assert threshold < 0.7 or not passed[true < 0.2].any()
