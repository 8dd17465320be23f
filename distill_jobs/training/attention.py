"""Causal attention for training: by two matrix products on CPUs, fused on GPUs; packed rows never meet.

PyTorch's fused attention takes 68 ms backward in bf16 where two matrix products take 14 (64 rows of 56
tokens, 6 heads, one AMX core, torch 2.13): its backward is not blocked for short sequences. A packed sequence
is laid out as padded rows for the attention alone: it computes what a block-diagonal causal mask would,
without the blocks outside the diagonal, and nothing can leak over a boundary. Knows nothing of losses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from contracts.errors import TrainingError
from distill_jobs.training.data import Packing

NAME = "stillhouse_causal"
FUSED = {"cuda"}
"""Kinds of devices whose fused kernel is faster."""


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """(B, heads, S, D) queries, (B, kv_heads, S, D) keys and values -> (B, S, heads, D).

    Rows are right-padded, or one packed row whose layout `packing` gives. `sliding_window` is the number of
    tokens that a token sees, itself included.

    Raises: TrainingError for what it does not compute (soft caps, sinks, dropout).
    """
    if others.get("softcap") is not None or others.get("s_aux") is not None or dropout:
        raise TrainingError("Attention with soft caps, sinks or dropout is not supported.")
    if packing is None:
        return _attend(query, key, value, scaling, sliding_window).transpose(1, 2).contiguous(), None
    query, key, value = (unpack(one, packing) for one in (query, key, value))
    mixed = _attend(query, key, value, scaling, sliding_window).transpose(1, 2)  # (rows, longest, heads, D)
    flat = mixed.reshape(packing.rows * packing.longest, *mixed.shape[2:])
    return flat.index_select(0, packing.places)[None], None


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """(1, heads, S, D) -> (rows, heads, longest, D), zeros after a row's end."""
    _, heads, _, width = packed.shape
    padded = packed.new_zeros(packing.rows * packing.longest, heads, width)
    padded = padded.index_copy(0, packing.places, packed[0].transpose(0, 1))
    return padded.view(packing.rows, packing.longest, heads, width).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """(B, heads, S, D) causal mixtures of the values."""
    groups = query.shape[1] // key.shape[1]
    batch, heads, length, width = query.shape
    narrow = window is not None and window < length
    if query.device.type in FUSED and not narrow:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    key = key[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, heads, length, width)
    value = value[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, heads, length, width)
    unseen = torch.full((length, length), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    if narrow:
        assert window is not None
        unseen = unseen + torch.full_like(unseen, float("-inf")).tril(-window)
    scores = torch.matmul(query * scaling, key.transpose(2, 3)) + unseen
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def register() -> str:
    """Make the attention known to transformers; returns its name.

    Turns cuDNN's attention off in this process, which PyTorch prefers on Hopper: it plans for every shape
    anew, 18 ms forward and 28 ms backward where the kernels take 8 and 22 µs (H200, torch 2.11), and shapes
    of packed rows and of answers in the making hardly repeat.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME
