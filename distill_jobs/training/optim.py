"""fp32 master weights with AdamW or Muon over a model that computes in bf16, and the learning-rate schedule.

It knows nothing of data or of other workers: gradients are summed before they come here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distill_jobs.training.config import OptimizerConfig


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak rate: linear warm-up, flat, then a cosine-shaped fall to zero over the last `decay`
    share."""
    warm, fall = config.warmup * steps, config.decay * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    left = (steps - step) / max(fall, 1e-9)
    return 1.0 if left >= 1 else 0.5 * (1 - math.cos(math.pi * max(left, 0.0)))


class MasterOptimizer:
    """Steps fp32 copies of the trainable parameters and writes them back in the model's dtype."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, extra: Iterable[tuple[str, nn.Parameter]] = ()
    ) -> None:
        """`extra` parameters are stepped like the model's but belong to somebody else."""
        self.config = config
        self.named = [(name, p) for name, p in (*model.named_parameters(), *extra) if p.requires_grad]
        self.masters = {name: p.detach().float().clone() for name, p in self.named}
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
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [g for g in groups if g["params"]], lr=config.lr, betas=(0.9, config.beta2), eps=1e-8
            )
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    def step(self, factor: float) -> float:
        """One update from the gradients on the model; returns their norm before clipping."""
        for name, parameter in self.named:
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(nn.utils.clip_grad_norm_(list(self.masters.values()), self.config.clip))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * factor
            optimizer.step()
        self.write_back()
        return norm

    def write_back(self) -> None:
        """Copy the masters into the model."""
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(self.masters[name])
                parameter.grad = None
                self.masters[name].grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        for one, saved in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)
        self.write_back()
