"""Conversations to token ids through a model's own chat template: the one definition for teach and evaluate.

Knows nothing about logits.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTokenizer:
    """A tokenizer with a chat template."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"The tokenizer in {folder} has no chat template, so requests cannot be rendered."
            )
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                f"The tokenizer in {folder} has no end-of-text token, so a student would never stop."
            )
        self.eos: int = self._tokenizer.eos_token_id
        self.pad: int = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self.eos

    @property
    def digest(self) -> str:
        """sha256 of the vocabulary: two tokenizers with one digest mean the same by an id."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def prompt(
        self, request: str | dict[str, Any], messages: str | list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids of a request's prompt, as a server renders it: messages, tools and template arguments."""
        body = json.loads(request) if isinstance(request, str) else request
        spoken = json.loads(messages) if isinstance(messages, str) else messages
        text = self._tokenizer.apply_chat_template(
            spoken or body["messages"],
            tools=body.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
            **(body.get("chat_template_kwargs") or {}),
        )
        return self._ids(text)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with its end."""
        return [*self._ids(text), self.eos]

    def _ids(self, text: Any) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
