"""The bytes that a token spells, for byte-level and for SentencePiece-like tokenizers.

Knows nothing of models. Special tokens spell nothing.
"""

from __future__ import annotations

import re
from typing import Any

from contracts.errors import ConfigError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level() -> dict[str, int]:
    """GPT-2's table of a printable character for each byte, the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    moved = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(256 + place): byte for place, byte in enumerate(moved)}


_TABLE = _byte_level()


class Spelling:
    """Token ids of one tokenizer to bytes, and text to its ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token.")
        self.end: int = tokenizer.eos_token_id
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._bytes = self._of_byte_level if "ByteLevel" in decoder else self._of_pieces

    def bytes_of(self, token: int) -> bytes:
        """What a token spells."""
        if token in self.special:
            return b""
        return self._bytes(self.tokenizer.convert_ids_to_tokens(token))

    def _of_byte_level(self, piece: str) -> bytes:
        if any(one not in _TABLE for one in piece):  # an added token is written as it is
            return piece.encode()
        return bytes(_TABLE[one] for one in piece)

    def _of_pieces(self, piece: str) -> bytes:
        found = _BYTE.fullmatch(piece)
        return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()

    def ids(self, text: str, start: bool) -> list[int]:
        """Ids of a text; `start` puts the tokenizer's own begin-of-text token first, where it has one."""
        found: list[int] = self.tokenizer(text, add_special_tokens=start)["input_ids"]
        return found

    def text(self, ids: list[int]) -> str:
        """The text of a prompt, special tokens written out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
