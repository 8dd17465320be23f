"""What happens inside a model during one forward pass: block outputs, queries, keys and values.

Block outputs come from forward hooks; queries, keys and values (after rotary embedding) from a wrapper of
whatever attention the model uses, so eager, SDPA and ours all work. What was packed is laid out as padded
rows. Knows nothing of what it is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from contracts.errors import ConfigError
from distill_jobs.training.attention import unpack
from distill_jobs.training.data import Packing

_PREFIX = "stillhouse_recording_"


@dataclass(frozen=True, slots=True)
class Heads:
    """One block's attention inputs."""

    query: Tensor  # (B, heads, S, D)
    key: Tensor  # (B, kv_heads, S, D)
    value: Tensor  # (B, kv_heads, S, D)
    scaling: float


@dataclass(slots=True)
class Seen:
    """What one forward pass left; blocks count from 1, 0 is the embedding's output."""

    packing: Packing | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)  # (B, S, d)
    heads: dict[int, Heads] = field(default_factory=dict)

    def add_hidden(self, block: int, states: Tensor) -> None:
        """Keep a block's output."""
        self.hidden[block] = states if self.packing is None else unpack(states[:, None], self.packing)[:, 0]

    def add_heads(self, block: int, seen: Heads) -> None:
        """Keep a block's attention inputs."""
        if self.packing is not None:
            query, key, value = (unpack(one, self.packing) for one in (seen.query, seen.key, seen.value))
            seen = Heads(query, key, value, seen.scaling)
        self.heads[block] = seen


def _record(inner: Any) -> Any:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        listener = getattr(module, "_stillhouse_listener", None)
        if listener is not None:
            listener(Heads(query, key, value, float(kwargs.get("scaling") or module.scaling)))  # type: ignore[arg-type]
        return inner(module, query, key, value, *args, **kwargs)

    return attention


class Recorder:
    """Records the given blocks of a decoder while it is open; recomputation under gradient checkpointing
    finds it closed and leaves what it saw alone."""

    def __init__(self, decoder: Any, hidden: set[int], heads: set[int]) -> None:
        self.decoder, self.hidden, self.heads = decoder, hidden, heads
        layers = getattr(decoder, "layers", None)
        if layers is None or not hasattr(decoder, "embed_tokens"):
            raise ConfigError(f"{type(decoder).__name__} has no layers and embed_tokens; terms need both.")
        worst = max([0, *hidden, *heads])
        if worst > len(layers):
            raise ConfigError(f"terms: the layer map names block {worst}, the model has {len(layers)}.")
        self._open: Seen | None = None
        for block in hidden:
            module = layers[block - 1] if block else decoder.embed_tokens
            module.register_forward_hook(self._hook(block))
        for block in heads:
            layers[block - 1].self_attn._stillhouse_listener = self._listener(block)
        if heads:
            self._wrap()

    def _wrap(self) -> None:
        """Put the recording attention around the model's own."""
        inner = self.decoder.config._attn_implementation
        if inner.startswith(_PREFIX):
            return
        name = _PREFIX + inner
        function = _eager(self.decoder) if inner == "eager" else ALL_ATTENTION_FUNCTIONS[inner]
        AttentionInterface.register(name, _record(function))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
        self.decoder.set_attn_implementation(name)

    def _hook(self, block: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._open is not None:
                self._open.add_hidden(block, output[0] if isinstance(output, tuple) else output)

        return hook

    def _listener(self, block: int) -> Any:
        def listener(seen: Heads) -> None:
            if self._open is not None:
                self._open.add_heads(block, seen)

        return listener

    @contextmanager
    def recording(self, packing: Packing | None = None) -> Iterator[Seen]:
        """Open for one forward pass, of rows packed so."""
        self._open = Seen(packing)
        try:
            yield self._open
        finally:
            self._open = None


def _eager(decoder: Any) -> Any:
    """The eager attention of the model's own file, which transformers registers nowhere."""
    import sys

    return sys.modules[type(decoder).__module__].eager_attention_forward
