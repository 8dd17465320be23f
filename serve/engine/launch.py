"""The entry point of an engine's process: vLLM's OpenAI server, started quicker on CPU.

vLLM's CPU platform makes every one of its three processes import everything again ("spawn"), 28 s to ready
on two cores; forking them from the server, as vLLM does on GPU machines, takes 13 s. Spawn is there so that
each worker can bind OpenMP threads before they exist; we run with `nobind`, so nothing is lost. Knows
nothing about Ray or about who started it. Only this file touches a name of vLLM's that is not public API.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

BUSY_S = 1.0
"""How long after a message vLLM's processes expect the next one at once (vLLM's own figure)."""
NAP_MS = 1
"""How long they sleep at most in that time, where vLLM spins."""


def wants_fork(start: str, is_cpu: bool) -> bool:
    """True when vLLM's processes shall be forked: asked for, or `auto` on CPU."""
    return start == "fork" or (start == "auto" and is_cpu)


def prefer_fork(platform: Any) -> None:
    """Make vLLM fork its processes, although the platform asks for spawn when it checks the configuration."""
    cls = type(platform)
    check = cls.check_and_update_config.__func__

    def check_then_fork(owner: Any, vllm_config: Any) -> None:
        check(owner, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    cls.check_and_update_config = classmethod(check_then_fork)


def allow_amx() -> None:
    """Ask Linux for the AMX registers, which forked workers inherit.

    Without it vLLM 0.29's attention dies of SIGILL when an engine's first request has under five tokens:
    only oneDNN asks, and only for larger products.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def nap_while_busy(condition: Any) -> None:
    """Make vLLM's processes nap on their socket while they wait for each other, instead of spinning.

    vLLM spins for a second after every message, which costs an engine under load two whole cores. `condition`
    is vLLM's SpinCondition; its writer pings a socket on every write, so a napping reader wakes at once. A
    ping can be lost (the socket holds one, and ZeroMQ sees it taken up to a millisecond late), so in that
    second no nap is longer than a millisecond; afterwards everything is as vLLM has it.
    """
    make, wait = condition.__init__, condition.wait

    def without_spinning(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "busy_loop_s": 0})

    def nap(self: Any, timeout_ms: int | None = None) -> None:
        busy = time.monotonic() <= self.last_read + BUSY_S
        wait(self, timeout_ms=NAP_MS if busy else timeout_ms)

    condition.__init__, condition.wait = without_spinning, nap


def expand_for_drafts(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: Any = 0, replace_to: Any = 0
) -> Any:
    """A request's value for each token that was drafted for it: [a, b] with [2, 5] → [a, a, b, b, b].

    Takes the place of vLLM 0.29's own on CPU, which casts to int64, expands the copy and returns memory that
    nobody wrote: temperatures, top-k and top-p of sampled requests, so that drafting changed what was sampled
    (a pair of tokens 282 times of 1,200 instead of 81).
    """
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts)[:num_tokens]


def keep_base_plain(users: list[Any]) -> None:
    """Let requests without an adapter be answered by the base, in every module of vLLM's in `users`.

    Their slot is -1, with which vLLM 0.29 on CPU indexes its stack of adapters: beside any adapter's request
    the base answered as the adapter in the last slot, exactly and without a word. Their rows of the shrunk
    product are set to nought, and so is then what they are given of an adapter.
    """
    shrink = users[0].bgmv_shrink

    def shrink_adapted(inputs: Any, weights: Any, out: Any, slots: Any, *more: Any, **named: Any) -> None:
        shrink(inputs, weights, out, slots, *more, **named)
        out[(slots < 0).nonzero(as_tuple=True)[0]] = 0

    for module in users:
        module.bgmv_shrink = shrink_adapted


def main() -> None:
    """Run vLLM's OpenAI server with the arguments of this process."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        allow_amx()
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        nap_while_busy(SpinCondition)
        import vllm.v1.sample.rejection_sampler as rejection_sampler

        rejection_sampler.expand_batch_to_tokens = expand_for_drafts
        if "--enable-lora" in sys.argv:
            from vllm.lora.ops.torch_ops import lora_ops
            from vllm.lora.punica_wrapper import punica_cpu

            keep_base_plain([lora_ops, punica_cpu])
    if wants_fork(os.environ.get("STILLHOUSE_ENGINE_START", "auto"), current_platform.is_cpu()):
        prefer_fork(current_platform)
    elif current_platform.is_cpu():
        # What is mended above reaches only processes that are forked from this one.
        for flag, what in (
            ("--speculative-config", "samples wrongly with a draft"),
            ("--enable-lora", "answers the base's requests as an adapter"),
        ):
            if any(a.startswith(flag) for a in sys.argv):
                sys.exit(f"start_method: spawn {what} on CPU (vLLM 0.29); use auto or fork.")
    from vllm.entrypoints.launchers.api_server.entry import main as serve_openai

    serve_openai()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
