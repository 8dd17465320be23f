"""What the process of a vLLM worker needs before its first pass; vLLM imports it there. Knows nothing else.

`worker_extension_cls` is vLLM's way to put code into its workers, which are started afresh ("spawn") and
inherit nothing but the environment.
"""

from __future__ import annotations

import torch


class AllowAmx:
    """Nothing is added to the worker: importing this asks Linux for the AMX registers.

    vLLM 0.29's kernels die of SIGILL without: only oneDNN asks, and a model whose layers are all INT4, or a
    first request of under five tokens, meets other kernels first.
    """


if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()
