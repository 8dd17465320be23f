"""How a student was made, in words: from the configuration that its stages ran with.

Reads the resolved configuration as plain data, so that a new setting is at worst left out of the words; the
whole of it stands below them. Knows nothing about files.
"""

from __future__ import annotations

from typing import Any

from distill_jobs.publishing.facts import Facts

_DIVERGENCES = {
    "forward_kl": "forward KL divergence",
    "reverse_kl": "reverse KL divergence",
    "jsd": "generalised Jensen-Shannon divergence",
    "skew_kl": "skew KL divergence",
    "skew_reverse_kl": "skew reverse KL divergence",
    "total_variation": "total variation distance",
}


def recipe(facts: Facts) -> list[str]:
    """A sentence for each stage that made the student."""
    return [*_data(facts), _teacher(facts), _training(facts), _quantization(facts)]


def _data(facts: Facts) -> list[str]:
    read, train = facts.count("collect", "read"), facts.count("collect", "train")
    if not train:
        return []
    window = "" if not read else f" out of {read:,} logged"
    said = [f"**Data.** {train:,} requests{window} with the teacher's answers"]
    corrected = facts.count("collect", "corrected")
    if corrected:
        said.append(f", {corrected:,} of them corrected by users")
    near = facts.config.collect.near_duplicates
    if near is not None:
        said.append(f"; near-duplicates from a Jaccard similarity of {near:g} were dropped")
    held_out = facts.count("collect", "held_out")
    said.append(f"; requests that resemble the evaluation were kept out ({held_out:,} dropped).")
    return ["".join(said)]


def _teacher(facts: Facts) -> str:
    teach = _config(facts, "teach")
    positions = facts.count("teach", "positions")
    scheme = str(teach.get("scheme", "topk"))
    what = f"the {teach.get('k', '?')} likeliest tokens" if scheme == "topk" else f"scheme `{scheme}`"
    return f"**Teacher.** `{facts.record.lineage.teacher}` scored {positions:,} positions ({what} of each)."


def _training(facts: Facts) -> str:
    train = _config(facts, "train")
    loss, optimizer = train.get("loss") or {}, train.get("optimizer") or {}
    divergence = _DIVERGENCES.get(str(loss.get("divergence", "forward_kl")), str(loss.get("divergence")))
    parts = [f"{loss.get('kd_weight', 1):g} · {divergence} at temperature {loss.get('temperature', 1):g}"]
    if loss.get("hard_weight"):
        parts.append(f"{loss['hard_weight']:g} · cross-entropy of the teacher's answers")
    metrics = facts.manifests["train"].metrics if "train" in facts.manifests else {}
    steps = f", {metrics['step']:,.0f} steps" if metrics.get("step") else ""
    how = f"{optimizer.get('kind', 'an optimizer')} (learning rate {optimizer.get('lr', '?')})"
    lora = " with LoRA adapters" if train.get("lora") else ""
    return (
        f"**Training.** From `{facts.config.student}`{_cut(facts, train)}{lora}: {' + '.join(parts)}; {how}, "
        f"{_number(train.get('epochs'))} epochs of batches of {train.get('batch_rows', '?')}{steps}, "
        f"seed {train.get('seed', '?')}."
    )


def _cut(facts: Facts, train: dict[str, Any]) -> str:
    """What was left out of the checkpoint that training started from."""
    shrink = train.get("shrink") or {}
    sizes = [f"{name} {size}" for name, size in shrink.items() if isinstance(size, int) and name != "rows"]
    sparse = shrink.get("sparsify") or {}
    said = [f"cut by importance to {', '.join(sizes)}"] if sizes else []
    if sparse:
        share = sparse.get("pattern") or f"{sparse.get('share', 0):.0%}"
        said.append(f"pruned by {sparse.get('method')} ({share})")
    return f", {' and '.join(said)}" if said else ""


def _quantization(facts: Facts) -> str:
    config = _config(facts, "quantize")
    if (adapter := facts.record.artifact.adapter) is not None:
        return (
            f"**Quantization.** None: an adapter of rank {adapter.rank}, served beside its base (digest"
            f" `{adapter.digest[:12]}`), where it was measured."
        )
    if "fake_quant" in config:
        grid = config["fake_quant"]
        return (
            f"**Quantization.** None after the training: it computed with weights of {grid['bits']} bits in"
            f" groups of {grid['group_size']}, and the artifact holds just these."
        )
    return (
        f"**Quantization.** {config.get('scheme', facts.record.artifact.precision)} by AWQ, groups of "
        f"{config.get('group_size', '?')}, calibrated on {config.get('samples', '?')} logged requests; "
        f"`{'`, `'.join(config.get('ignore') or ['nothing'])}` kept in 16 bits."
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "?"


def _config(facts: Facts, stage: str) -> dict[str, Any]:
    """A stage's resolved configuration as data."""
    manifest = facts.manifests.get(stage)
    return dict(manifest.config) if manifest else {}
