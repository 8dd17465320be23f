"""Commands that live in other packages and are imported only when they are called.

Knows typer and click; knows nothing about what the commands do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

_HOMES: dict[str, tuple[str, str]] = {}


class Group(TyperGroup):
    """A typer group whose registered commands may be placeholders; the real one is loaded when it is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Swap a placeholder for the real command just before it parses its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in _HOMES:
            return name, _load(name), rest
        return name, command, rest


def add(app: typer.Typer, name: str, home: str, summary: str) -> None:
    """Register `module:attribute` (a typer app or a command function) under `name`.

    A command that needs the stack's Ray gets it through `join_running_stack`.
    """
    _HOMES[name] = (home, summary)

    def placeholder() -> None:
        raise AssertionError("never run: Group.resolve_command swaps it for the real command")

    app.command(name, help=summary)(placeholder)


def _load(name: str) -> TyperCommand | TyperGroup:
    home, _ = _HOMES[name]
    module, _, attribute = home.partition(":")
    found = import_module(module)
    target = getattr(found, attribute)
    if isinstance(target, typer.Typer):
        return get_command(target)  # type: ignore[return-value]
    from cli.stack import join_running_stack

    join_running_stack()
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, epilog=getattr(found, "EPILOG", None))(target)
    return get_command(single)  # type: ignore[return-value]
