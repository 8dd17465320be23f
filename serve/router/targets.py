"""The engines behind the routes, as Prometheus' HTTP service discovery wants them (`http_sd_configs`).

Engines are vLLM's own servers on ports of their own, so their `vllm:*` metrics are scraped where they are
made, and who they are is in the state store, which every router reads. Hosted APIs and plain URLs are not
listed: whoever runs those knows where their metrics are. Knows nothing about metrics.
"""

from __future__ import annotations

from typing import Any

from serve.router.pool import Pools
from serve.router.table import RouteTable


def targets(table: RouteTable, pools: Pools) -> list[dict[str, Any]]:
    """One group an upstream in use: host:port of its replicas, labelled with the upstream's name.

    Each engine is listed once: of an adapter, which is on its base's, where no upstream in use is that base.
    """
    groups: dict[str, list[str]] = {}
    seen: set[str] = set()
    for guests in (False, True):
        for name, upstream in sorted(table.upstreams().items()):
            if upstream.app is None:
                continue
            found = pools.replicas(upstream)
            own = {r.url.partition("://")[2] for r in found if r.guest is guests} - seen
            seen |= own
            if own or not found:
                groups[name] = sorted(own)
    return [{"targets": groups[name], "labels": {"upstream": name}} for name in sorted(groups)]
