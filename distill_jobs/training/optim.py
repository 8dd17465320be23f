"""fp32 master weights with AdamW or Muon over a model that computes in bf16, and the learning-rate schedules.

It knows nothing of data or of other workers: gradients are summed before they come here. Parameters may be
shards of FSDP2; states are saved whole and loaded into whatever shards there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill_jobs.training.config import OptimizerConfig


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak rate: linear warm-up, then constant, a line or a cosine to zero, or (wsd, arXiv
    2404.06395) flat with a cosine-shaped fall over the last `decay` share."""
    warm = config.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if config.schedule == "constant":
        return 1.0
    fall = config.decay * steps if config.schedule == "wsd" else steps - warm
    left = min(max((steps - step) / max(fall, 1e-9), 0.0), 1.0)
    return left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in another dtype, in place; buffers stay: rotary frequencies rounded to bf16 turn late
    positions by a radian, which a server that keeps them in fp32 would not."""
    for parameter in model.parameters():
        if parameter.dtype != dtype and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _nothing(_: Tensor) -> None:
    """Summing over a single worker."""


class MasterOptimizer:
    """Steps fp32 masters of the trainable parameters and writes them back in the model's dtype.

    Where the model computes in fp32 its parameters are the masters themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        dtype: torch.dtype = torch.float32,
        extra: Iterable[tuple[str, nn.Parameter]] = (),
        add: Callable[[Tensor], None] = _nothing,
        keep: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Leaves the model's parameters in `dtype`. `extra` parameters are stepped like the model's but are
        somebody else's; `add` sums over the workers that hold shards; where a parameter's mask in `keep` is
        False, it stays zero."""
        self.config, self.add, self.keep = config, add, keep or {}
        own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.named: list[tuple[str, nn.Parameter]] = [*own, *extra]
        added = {id(p) for _, p in self.named[len(own) :]}
        self.masters: dict[str, Tensor] = {}
        for name, p in self.named:
            final = p.dtype if id(p) in added else dtype
            itself = p.dtype == final == torch.float32
            self.masters[name] = p if itself else p.detach().float().clone()
        cast_parameters(model, dtype)
        self.optimizers = self._optimizers(model)

    def _optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        config = self.config
        embedding = {
            id(p)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for p in module.parameters()
        }
        matrices, plain, bare = [], [], []
        for name, parameter in self.named:
            master = self.masters[name]
            if parameter.ndim < 2:
                bare.append(master)
            elif config.kind == "muon" and parameter.ndim == 2 and id(parameter) not in embedding:
                matrices.append(master)
            else:
                plain.append(master)
        groups: list[dict[str, Any]] = [
            {"params": plain, "weight_decay": config.weight_decay},
            {"params": bare, "weight_decay": 0.0},
        ]
        optimizers: list[torch.optim.Optimizer] = []
        if groups := [group for group in groups if group["params"]]:
            optimizers.append(
                torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), eps=1e-8, fused=True)
            )
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        return optimizers

    def accumulate(self) -> None:
        """Add the gradients of one backward pass to the masters', in fp32, and drop them."""
        for name, parameter in self.named:
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def reached(self) -> Tensor:
        """(parameters,) fp32: 1 where this worker's loss gave a gradient."""
        masters = list(self.masters.values())
        return torch.tensor([m.grad is not None for m in masters], device=masters[0].device).float()

    def drop_unreached(self, workers: Tensor) -> None:
        """Leave what no worker's loss reached without a gradient, so that not even weight decay moves it, as
        with one worker; `workers` counts those that reached each parameter."""
        for master, count in zip(self.masters.values(), workers.tolist(), strict=True):
            if not count:
                master.grad = None

    def unsummed(self) -> list[Tensor]:
        """This worker's fp32 gradients of all parameters that are not shards, zeros where it has none."""
        found = []
        for master in self.masters.values():
            if isinstance(master, DTensor):
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            found.append(master.grad)
        return found

    def step(self, factor: float) -> float:
        """One update from the masters' gradients; returns their norm before clipping."""
        self._mask(gradients=True)
        norm = self._clip()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * factor
            optimizer.step()
        self._mask(gradients=False)  # Muon's update of a masked gradient is not masked
        self.write_back()
        return norm

    def _mask(self, gradients: bool) -> None:
        """Zero what `keep` says stays zero."""
        with torch.no_grad():
            for name, mask in self.keep.items():
                one = self.masters[name].grad if gradients else self.masters[name]
                if one is not None:
                    one.mul_(mask)

    def _clip(self) -> float:
        """Scale the gradients to a norm of at most `clip`, over all shards."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        whole = [one for one in gradients if not isinstance(one, DTensor)]
        shards = [one.to_local() for one in gradients if isinstance(one, DTensor)]
        square = _square(whole, gradients)
        if shards:
            of_shards = _square(shards, gradients)
            self.add(of_shards)
            square = square + of_shards
        norm = float(square.sqrt())
        if norm > self.config.clip:
            torch._foreach_mul_([*whole, *shards], self.config.clip / (norm + 1e-6))
        return norm

    def write_back(self) -> None:
        """Copy the masters into the model and drop all gradients."""
        with torch.no_grad():
            for name, parameter in self.named:
                master = self.masters[name]
                if master is not parameter:
                    parameter.copy_(master)
                parameter.grad = master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The whole state, gathered from all shards: every worker must call it."""
        masters = {name: whole(master) for name, master in self.masters.items()}
        return {"masters": masters, "optimizers": [_map(one.state_dict(), whole) for one in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, under any number of workers."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(like(state["masters"][name], master))
        for one, saved in zip(self.optimizers, state["optimizers"], strict=True):
            targets = [p for group in one.param_groups for p in group["params"]]
            shards = {
                number: {key: like(value, targets[number]) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            one.load_state_dict({**saved, "state": shards})
        self.write_back()


def _square(tensors: list[Tensor], known: list[Tensor]) -> Tensor:
    """Sum of squares, a tensor on the device of the gradients."""
    if not tensors:
        return torch.zeros((), device=known[0].device if known else None)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor from a shard, gathered over all workers; others as they are."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def like(value: Any, target: Tensor) -> Any:
    """This worker's shard of a whole tensor, where the target is a shard; else a copy, which needs the
    mapped file no more."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(target, DTensor) or value.shape != target.shape:
        return value.clone()
    placed = value.to(target.to_local().device)
    return distribute_tensor(placed, target.device_mesh, target.placements, src_data_rank=None)


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested dicts and lists with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    return [_map(value, change) for value in tree] if isinstance(tree, list) else tree
