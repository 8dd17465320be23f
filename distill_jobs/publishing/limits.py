"""What a student's own figures say against it: the card's limitations, generated, never a matter of taste.

Pure. Knows nothing about how the figures came to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime

from contracts.gates import Verdict
from distill_jobs.publishing.facts import Facts

_FEW = 30
"""Requests of a class below which its figures say little."""
_WEAK = 0.05
"""F1 below the mean by more than this is weak."""
_NAMED = 5
_Z = 1.96


def limitations(facts: Facts) -> list[str]:
    """Sentences, the gravest first."""
    return [
        *_gates(facts),
        *_sample(facts),
        *_against_teacher(facts),
        *_classes(facts),
        *_stored(facts),
        *_traffic(facts),
        *_always(facts),
    ]


def _gates(facts: Facts) -> Iterator[str]:
    report = facts.gates
    if report.overridden_by is not None:
        why = report.overridden_by
        yield f"**It did not pass its gates** ({report.verdict}) and was published all the same: {why}"
    failed = [r for r in report.results if r.verdict is not Verdict.PASS]
    for result in failed:
        yield f"Gate on `{result.gate.metric}`: {result.verdict}, {result.reason}."


def _sample(facts: Facts) -> Iterator[str]:
    n = facts.samples
    if n == 0:
        yield "Nothing was measured."
        return
    accuracy, interval = facts.value("quantized.accuracy"), facts.intervals.get("quantized.accuracy")
    if accuracy is None:
        yield f"Whether its answers are right was not graded; {n:,} requests compare it with its teacher."
    elif interval is not None:
        low, high = interval
        yield f"Measured on {n:,} requests: its accuracy lies between {low:.1%} and {high:.1%}."
    else:
        low, high = _wilson(accuracy, n)
        yield f"Measured on {n:,} requests: its accuracy of {accuracy:.1%} could be {low:.1%} to {high:.1%}."


def _against_teacher(facts: Facts) -> Iterator[str]:
    own, teacher = facts.value("quantized.accuracy"), facts.value("teacher.accuracy")
    if own is not None and teacher is not None and own < teacher:
        more = round((teacher - own) * facts.samples)
        yield (
            f"It is right {100 * (teacher - own):.1f} points less often than its teacher "
            f"({more:,} of {facts.samples:,} requests)."
        )
    agreement = facts.value("quantized.agreement")
    if agreement is not None:
        yield f"Its likeliest next token is the teacher's at {agreement:.1%} of the positions."
    packed, whole = facts.value("quantized.perplexity"), facts.value("student.perplexity")
    if packed is not None and whole is not None and packed > 1.01 * whole:
        yield f"Quantization raised the perplexity of the teacher's answers by {packed / whole - 1:.1%}."
    ece = facts.value("quantized.ece")
    if ece is not None and ece > 0.05:
        yield f"Its confidence is off by {ece:.1%} on average (ECE): do not threshold on its probabilities."


def _classes(facts: Facts) -> Iterator[str]:
    if not facts.classes:
        return
    few = [str(c["class"]) for c in facts.classes if c["support"] < _FEW]
    known = [c for c in facts.classes if c["support"] >= _FEW]
    if few:
        yield f"Fewer than {_FEW} requests each, so their figures say little: {_listed(few)}."
    if known:
        mean = sum(c["f1"] for c in known) / len(known)
        weak = sorted((c for c in known if c["f1"] < mean - _WEAK), key=lambda c: float(c["f1"]))
        if weak:
            named = [f"{c['class']} ({c['f1']:.2f})" for c in weak]
            yield f"Weak classes (F1 more than {_WEAK:g} below the mean of {mean:.2f}): {_listed(named)}."


def _stored(facts: Facts) -> Iterator[str]:
    """What its stages noted of how its weights lie in the file."""
    for stage, note in (("train", "sparsity"), ("quantize", "container")):
        manifest = facts.manifests.get(stage)
        if manifest is not None and note in manifest.notes:
            said = manifest.notes[note]
            yield said[0].upper() + said[1:] + "."


def _traffic(facts: Facts) -> Iterator[str]:
    lineage, collect = facts.record.lineage, facts.config.collect
    route = f"route `{collect.route}`" if collect.route else "the logged routes"
    if lineage.log_from is not None and lineage.log_to is not None:
        span = f"between {_day(lineage.log_from)} and {_day(lineage.log_to)}"
        yield f"It has seen the traffic of {route} {span}; other requests, and what came later, are untested."
    too_long = facts.count("teach", "too_many_tokens")
    limit = facts.config.teach.max_tokens
    dropped = f" ({too_long:,} were dropped)" if too_long else ""
    yield f"Conversations longer than {limit:,} tokens were not trained on{dropped}."


def _always(facts: Facts) -> Iterator[str]:
    if not facts.config.collect.drop_failed_grades:
        yield "It learns the teacher, mistakes included: answers with failed grades were not left out."
    if not facts.count("collect", "redacted"):
        yield "The training rows are users' requests, with what the log's policy kept of their personal data."


def _wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    centre = share + _Z * _Z / (2 * n)
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    room = 1 + _Z * _Z / n
    return max(0.0, (centre - spread) / room), min(1.0, (centre + spread) / room)


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
