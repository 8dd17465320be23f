"""The seam between the rollout commands and the stack's configuration: what a command needs, opened lazily.

Tests give their own StackHandle. Knows nothing about the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from registry.store import Registry
from serve.rollout.policy import RolloutPolicy
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState


@dataclass(frozen=True)
class StackHandle:
    """What the commands work with."""

    rollouts: RolloutState
    traffic: TrafficState
    policies: dict[str, RolloutPolicy]
    open_registry: Callable[[], Registry]
    """Opened only by the command that needs it: importing MLflow takes seconds."""
    requests: Path | None = None
    """The routers' request log."""


def open_stack(config_path: str | None) -> StackHandle:
    """Open the state store that the stack's configuration names.

    Raises: ConfigError when the configuration is wrong, StateError when the store cannot be opened.
    """
    # By name: the stack's configuration knows both planes, and this plane must not import the other one.
    config = import_module("serve.config").load_serve_config(config_path)
    engine = open_state(config.state_url)
    requests = Path(config.router_config().log.dir)

    def open_registry() -> Registry:
        from registry.mlflow_store import MlflowRegistry

        return MlflowRegistry(config.registry_uri)

    return StackHandle(
        RolloutState(engine), TrafficState(engine), dict(config.policies), open_registry, requests
    )
