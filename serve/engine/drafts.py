"""May this model draft for that one: same vocabulary, smaller, and there. Looks at files only.

vLLM checks the size of the vocabulary alone: a draft whose tokens mean something else starts, and everything
it proposes is refused. Knows nothing about vLLM or what a draft gains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError
from contracts.speculative import Speculative
from serve.engine.folders import local_model

REGISTRY = "registry:"


def check_draft(model: str, drafting: Speculative) -> Speculative:
    """The setting with the draft's folder in full. Raises: ConfigError naming what does not fit.

    Models that are not folders here are left to vLLM.
    """
    if drafting.draft is None:
        return drafting
    if drafting.draft.startswith(REGISTRY):
        raise ConfigError(
            f"speculative.draft: {drafting.draft!r} was not resolved; only a stack's configuration and "
            "`stillhouse speculate` look into a registry. Give the artifact's folder."
        )
    draft, target = local_model(drafting.draft), local_model(model)
    if draft is None:
        if drafting.draft.startswith((".", "/", "file:", "~")):
            raise ConfigError(f"speculative.draft: there is no folder {drafting.draft!r}. Check the path.")
        return drafting
    if target is not None:
        _same_vocabulary(target, draft)
        _smaller(target, draft)
    return drafting.model_copy(update={"draft": str(draft)})


def _same_vocabulary(target: Path, draft: Path) -> None:
    wants, has = (_json(folder / "config.json").get("vocab_size") for folder in (target, draft))
    if wants != has:
        raise ConfigError(
            f"speculative.draft: {draft} has a vocabulary of {has} tokens, the model one of {wants}. "
            "A draft must be distilled with its teacher's tokenizer."
        )
    files = [folder / "tokenizer.json" for folder in (target, draft)]
    if all(file.is_file() for file in files):
        ours, theirs = (_tokens(_json(file)) for file in files)
        if ours != theirs:
            apart = sum(ours.get(word) != number for word, number in theirs.items())
            raise ConfigError(
                f"speculative.draft: {draft} has another tokenizer: {max(1, apart)} tokens mean something "
                "else than in the model. A draft must be distilled with its teacher's tokenizer."
            )


def _tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Text of a token → its number, of a tokenizer.json."""
    vocab = tokenizer.get("model", {}).get("vocab") or {}
    words = vocab.items() if isinstance(vocab, dict) else ((w[0], n) for n, w in enumerate(vocab))
    added = tokenizer.get("added_tokens") or ()
    return {**dict(words), **{one["content"]: one["id"] for one in added}}


def _smaller(target: Path, draft: Path) -> None:
    wants, has = (sum(file.stat().st_size for file in f.glob("*.safetensors")) for f in (target, draft))
    if wants and has >= wants:
        raise ConfigError(
            f"speculative.draft: {draft} ({has / 1e6:.1f} MB) is no smaller than the model "
            f"({wants / 1e6:.1f} MB), so it can only slow it down."
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"speculative.draft: {file} cannot be read ({err}).") from err
    if not isinstance(found, dict):
        raise ConfigError(f"speculative.draft: {file} does not hold a JSON object.")
    return found
