"""One of two gloo workers that `test_training_parallel` starts: gradients and short runs, saved by rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from distill_jobs.training.config import OptimizerConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.models import save_model
from distill_jobs.training.optim import whole
from distill_jobs.training.parallel import Workers, joined, sum_over
from tests.unit.test_training_loop import config, tiny_model

RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-checkpointing": {"parallel": "fsdp2", "gradient_checkpointing": True},
    "fsdp2-muon": {"parallel": "fsdp2", "optimizer": OptimizerConfig(kind="muon", lr=1e-2)},
}
INDICES = np.arange(11)


def trainer(data: Path, workers: Workers, **changes: Any) -> Trainer:
    """Micro-batches of 30 tokens: the workers have unequal numbers of them."""
    return Trainer(tiny_model(), Rows(data, 64, True), config(micro_tokens=30, **changes), workers)


def gradient(data: Path, workers: Workers, **changes: Any) -> torch.Tensor:
    """The summed gradient of one step, flat."""
    one = trainer(data, workers, **changes)
    one.accumulate(0, INDICES)
    sum_over(workers, one.optimizer.unsummed())
    return torch.cat([whole(m.grad).flatten() for m in one.optimizer.masters.values() if m.grad is not None])


def main(rank: int, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    workers = joined()
    results: dict[str, Any] = {
        f"gradient {parallel}{name}": gradient(data, workers, parallel=parallel, dtype=dtype)
        for parallel in ("ddp", "fsdp2")
        for name, dtype in (("", "float32"), (" bf16", "bfloat16"))
    }
    for name, changes in RUNS.items():
        one = trainer(data, workers, **changes)
        history = []
        for metrics in one.run():
            history.append([metrics["kd"], metrics["ce"], metrics["grad_norm"]])
            if name == "fsdp2" and metrics["step"] == 3:
                one.save(out / "state")
        weights = one.weights()
        results[name] = {"weights": weights, "history": history}
        if name == "fsdp2":
            results["held"] = sum(m.to_local().numel() for m in one.optimizer.masters.values())  # type: ignore[attr-defined]
            if rank == 0:
                save_model(one.model, sys.argv[4], out / "model", weights)
    if rank == 0:
        torch.save(results, out / "results.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
