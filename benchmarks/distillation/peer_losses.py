"""TRL's and ModelOpt's losses and gradients on tensors from a file. Runs in the peers' environment.

`python peer_losses.py IN OUT`: IN holds hidden states, output matrices and cases, OUT gets a loss and two
gradients for each case. Imports nothing of Stillhouse.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from modelopt.torch.distill.losses import LogitsDistillationLoss
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


def gkd(one: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """TRL's GKD loss on full logits, summed over the rows and divided by their number."""
    logits, theirs = one["hidden"] @ one["weight"].T, one["teacher_hidden"] @ one["teacher_head"].T
    loss: Tensor = GKDTrainer.generalized_jsd_loss(
        logits, theirs, beta=case["beta"], temperature=case["temperature"], reduction="batchmean"
    )
    return loss


def chunked(one: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """TRL's chunked divergence, as DistillationTrainer calls it."""
    matrices = one["hidden"], one["weight"], None, one["teacher_hidden"], one["teacher_head"], None
    rows: Tensor = ChunkedDivergenceFunction.apply(*matrices, case["beta"], case["temperature"])[0]
    return rows.mean()


def modelopt(one: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """ModelOpt's logits loss, with T^2; it averages over rows."""
    logits, theirs = one["hidden"] @ one["weight"].T, one["teacher_hidden"] @ one["teacher_head"].T
    loss: Tensor = LogitsDistillationLoss(temperature=case["temperature"], reduction="batchmean")(
        logits, theirs
    )
    return loss


def main() -> None:
    """Every case of the file."""
    given = torch.load(sys.argv[1])
    found = []
    for case in given["cases"]:
        one = {k: v.clone() for k, v in given["tensors"].items()}
        leaves = [one[k].requires_grad_() for k in ("hidden", "weight")]
        loss = {"gkd": gkd, "chunked": chunked, "modelopt": modelopt}[case["peer"]](one, case)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
