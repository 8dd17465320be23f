"""`summary.json`: what the demo measured, and whether it met the bars it promises.

Reads manifests, the registry and counts; measures nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demo.load import Served
    from demo.stack import Stack
    from demo.traffic import TrafficStats

BROKEN_MAX_WEIGHT = 0.10


def facts(
    stack: Stack, served: dict[str, Served], rollouts: list[dict[str, Any]], traffic: TrafficStats
) -> dict[str, Any]:
    """Everything `summary.json` holds except the total time."""
    metrics = stack.manifests()["evaluate"]["metrics"]
    teacher_tps, student_tps = served["teacher"].tokens_per_s, served["student"].tokens_per_s
    bf16_tps = served["student bf16"].tokens_per_s
    return {
        "teacher": {**_of(metrics, "teacher"), "tokens_per_s": round(teacher_tps, 1)},
        "student": {**_of(metrics, "student"), "tokens_per_s": round(bf16_tps, 1)},
        "quantized": {
            **_of(metrics, "quantized"),
            "format": stack.manifests()["quantize"]["notes"]["format"],
            "bf16_perplexity": metrics["student.perplexity"],
            "tokens_per_s": round(student_tps, 1),
        },
        "ratios": {
            "accuracy": metrics["quantized.accuracy"] / metrics["teacher.accuracy"],
            "params": metrics["teacher.params"] / metrics["student.params"],
            "tokens_per_s": student_tps / teacher_tps,
            "perplexity": metrics["quantized.perplexity"] / metrics["student.perplexity"],
        },
        "rollouts": rollouts,
        "traffic": {"requests": traffic.requests, "failed": traffic.failed, "errors": traffic.errors},
        "stages": {s: m["seconds"] for s, m in stack.manifests().items()},
    }


def problems(facts: dict[str, Any]) -> list[str]:
    """What the demo promises and did not keep, one sentence each."""
    found = []
    first, second = facts["rollouts"]
    if first["decision"] != "promoted":
        found.append(f"the student was {first['decision']}, not promoted: {first['reason']}")
    if second["decision"] != "rolled_back":
        found.append(f"the broken student was {second['decision']}, not rolled back: {second['reason']}")
    if second["max_weight"] > BROKEN_MAX_WEIGHT:
        found.append(f"the broken student reached {second['max_weight']:.0%} of the traffic")
    if facts["traffic"]["failed"]:
        found.append(f"{facts['traffic']['failed']} client requests failed: {facts['traffic']['errors'][:2]}")
    return found


def _of(metrics: dict[str, Any], model: str) -> dict[str, Any]:
    prefix = f"{model}."
    found = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    return {k: int(v) if k in ("params", "bytes", "graded") else v for k, v in found.items()}
