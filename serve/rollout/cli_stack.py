"""The seam between the rollout commands and the stack's configuration: what a command needs, opened lazily.

Tests give their own StackHandle. Knows nothing about the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from contracts.price import Price
from registry.store import Registry
from serve.rollout.policy import RolloutPolicy
from serve.rollout.sources import Sources
from serve.state.judges import JudgeState
from serve.state.outbox import OutboxState
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState


@dataclass(frozen=True)
class StackHandle:
    """What the commands work with."""

    rollouts: RolloutState
    traffic: TrafficState
    outbox: OutboxState
    policies: dict[str, RolloutPolicy]
    open_registry: Callable[[], Registry]
    """Opened only by the command that needs it: importing MLflow takes seconds."""
    request_log: Path | None = None
    """Folder of the request log."""
    reports: Path = Path("reports")
    """Where reports are written unless told otherwise."""
    prices: dict[str, Price] = field(default_factory=dict)
    """Upstream → what it costs, as far as the configuration says."""
    student_price: Price | None = None
    sources: Sources | None = None
    """What the configuration says of graders, judges and Prometheus; None: metrics are taken as they are."""


def open_stack(config_path: str | None) -> StackHandle:
    """Open the state store that the stack's configuration names.

    Raises: ConfigError when the configuration is wrong, StateError when the store cannot be opened.
    """
    # By name: the stack's configuration knows both planes, and this plane must not import the other one.
    config = import_module("serve.config").load_serve_config(config_path)
    engine = open_state(config.state_url)

    def open_registry() -> Registry:
        from registry.mlflow_store import MlflowRegistry

        return MlflowRegistry(config.registry_uri)

    log = config.router_config().log
    sources = Sources(
        graders=config.graders,
        upstreams={upstream.name: upstream for upstream in config.upstream_nouns()},
        prometheus=config.prometheus,
        latest_check=JudgeState(engine).latest,
    )
    return StackHandle(
        RolloutState(engine),
        TrafficState(engine),
        OutboxState(engine),
        dict(config.policies),
        open_registry,
        request_log=None if log is None else Path(log.dir),
        reports=config.run_dir / "reports",
        prices={name: u.cost for name, u in config.upstreams.items() if u.cost is not None},
        student_price=config.students.cost,
        sources=sources,
    )
