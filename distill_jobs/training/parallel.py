"""Workers of one run: sums over them, and FSDP2, which shards parameters, gradients and moments over them.

Under FSDP2 the fp32 shards are the masters: all-gathered in the compute dtype, gradients reduced in fp32, so
a step is that of "ddp" on whole masters. Knows torch.distributed; nothing of Ray, data or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

BUCKET = 8 << 20
"""Elements that are summed at a time: a copy of 32 MB instead of one of all gradients."""


def _nothing(_: Tensor) -> None:
    """Summing over a single worker."""


@dataclass(frozen=True, slots=True)
class Workers:
    """This worker among its equals; `add` sums a tensor over all of them in place."""

    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], None] = _nothing


def joined() -> Workers:
    """The workers of the process group that this process is in; one worker without a group."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Workers()
    return Workers(
        distributed.get_rank(), distributed.get_world_size(), lambda one: distributed.all_reduce(one)
    )


def sum_over(workers: Workers, tensors: Iterable[Tensor]) -> None:
    """Sum tensors over the workers in place, some of them at a time through one flat copy."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > BUCKET:
            _sum_bucket(workers, bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum_bucket(workers, bucket)


def _sum_bucket(workers: Workers, tensors: list[Tensor]) -> None:
    flat = torch.cat([one.flatten() for one in tensors])
    workers.add(flat)
    for tensor, part in zip(tensors, torch.split(flat, [one.numel() for one in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def shard(model: Any, dtype: torch.dtype, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Shard a causal language model block by block, in place; returns `loss` with the parameters gathered
    around it.

    `loss` calls parts of the model (its decoder, its head) and so bypasses the model's own forward, where
    FSDP2 would gather.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.get_decoder().layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the tokens of the whole step
            module.set_force_sum_reduction_for_comms(True)
    model.step_loss = loss
    register_fsdp_forward_method(model, "step_loss")
    gathered: Callable[..., Any] = model.step_loss
    return gathered
