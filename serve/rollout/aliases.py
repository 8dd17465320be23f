"""What a decision does to the registry: hooks that move the champion and challenger aliases.

The wiring gives them to the controller. Idempotent, as the controller may call them again after a kill.
Knows nothing about traffic.
"""

from __future__ import annotations

from collections.abc import Callable

from contracts.rollout import RolloutSpec
from registry.store import Registry, parse_ref

CHAMPION, CHALLENGER = "champion", "challenger"


def promoted_hook(registry: Registry) -> Callable[[RolloutSpec], None]:
    """Point `champion` at the promoted version; it is nobody's challenger any more."""

    def on_promoted(spec: RolloutSpec) -> None:
        ref = parse_ref(spec.model_ref)
        registry.set_alias(ref.name, CHAMPION, ref.version, _by(spec), f"promoted on route {spec.route}")
        _no_challenger(registry, spec, "promoted")

    return on_promoted


def rolled_back_hook(registry: Registry) -> Callable[[RolloutSpec], None]:
    """The thrown-back version is no challenger any more; `champion` stays where it is."""
    return lambda spec: _no_challenger(registry, spec, "rolled back")


def restored_hook(registry: Registry) -> Callable[[RolloutSpec], None]:
    """Late harm took a promotion back: `champion` goes back, unless others moved it since."""

    def on_restored(spec: RolloutSpec) -> None:
        ref = parse_ref(spec.model_ref)
        mine = [e for e in registry.alias_events(ref.name) if e.alias == CHAMPION and e.by == _by(spec)]
        promoted = next((e for e in reversed(mine) if e.version == ref.version), None)
        if promoted is not None and registry.aliases(ref.name).get(CHAMPION) == ref.version:
            registry.set_alias(
                ref.name, CHAMPION, promoted.previous, _by(spec), f"restored on route {spec.route}"
            )

    return on_restored


def _no_challenger(registry: Registry, spec: RolloutSpec, what: str) -> None:
    ref = parse_ref(spec.model_ref)
    if registry.aliases(ref.name).get(CHALLENGER) == ref.version:
        registry.set_alias(ref.name, CHALLENGER, None, _by(spec), f"{what} on route {spec.route}")


def _by(spec: RolloutSpec) -> str:
    return f"rollout {spec.id}"
