"""Where Ray puts the replicas of something: what each takes from a node, and how many a node may have.

The resources are names of our own ({routers: 1}, {students: 1}, {train: 1}): a node has as many as it was
started with, by `ray.nodes` on one machine and by a KubeRay worker group's `rayStartParams` on a cluster, so
that one file places the same way on both. Importable without ray. Knows nothing about what is placed.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from contracts.config import StrictConfig

NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,62}$"
Resources = dict[Annotated[str, Field(pattern=NAME)], Annotated[float, Field(gt=0, le=1_000_000)]]
"""Name → how much."""


class Reservation(StrictConfig):
    """What Ray takes from a node for each replica: it runs where all of it is left."""

    num_cpus: float = Field(default=0.1, ge=0)
    """Logical CPUs (a scheduling weight, not a limit)."""
    resources: Resources = Field(default_factory=dict)
    """Resources of our own naming that a node must have, e.g. {students: 1}; {}: any node will do."""

    def reserved(self) -> dict[str, Any]:
        """As `ray_actor_options` say it."""
        return {"num_cpus": self.num_cpus, "resources": dict(self.resources)}


class Placement(Reservation):
    """And how its replicas spread."""

    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    """So many on one node at most: with 1, two never die with one node. None: Ray spreads them as it can."""
