"""The registry's protocol: the only door between the jobs that make models and the side that serves them.

A model version is an immutable ModelRecord plus its artifact folder; an alias is the only thing that moves,
and each move is an append-only AliasEvent. Knows nothing about how either is stored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from contracts.config import Record
from contracts.errors import ConfigError, DataError, NotFoundError
from contracts.model import AliasEvent, ModelRecord

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_REASON_CHARS = 2_000
"""MLflow's column for a registered model's tag holds 5,000 characters; an event must fit."""
_ALIAS = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")


class Ref(Record):
    """What a person typed: `name:3`, `name@champion`, or `name` for the latest version."""

    name: str
    version: int | None = None
    alias: str | None = None


class Registry(Protocol):
    """Publish, look up and alias model versions. Every method may be called from several processes at
    once.
    """

    def publish(self, record: ModelRecord, artifact_dir: Path, card: str | None = None) -> ModelRecord:
        """Store the artifact, its record and its model card as the next version; the same digest again
        returns the version it has, card and all.

        Raises: DataError when the folder's digest is not the record's, or a student of the pipeline comes
        without a card.
        """

    def get(self, ref: str) -> ModelRecord:
        """The record of `name:3`, `name@alias` or `name` (latest). Raises: NotFoundError listing what
        exists.
        """

    def download(self, ref: str, into: Path | None = None) -> Path:
        """A local folder with the artifact, its digest verified. In place when it already is local and `into`
        is None.

        Raises: DataError when the stored files no longer match the record's digest.
        """

    def card(self, ref: str) -> str:
        """The model card (Markdown) of a version, beside its artifact. Raises: NotFoundError without one."""

    def history(self, name: str) -> list[ModelRecord]:
        """All versions of a model, oldest first. Raises: NotFoundError for an unknown name."""

    def list_models(self) -> list[str]:
        """Names of all models, sorted."""

    def aliases(self, name: str) -> dict[str, int]:
        """Alias → version, as it is now."""

    def set_alias(self, name: str, alias: str, version: int | None, by: str, reason: str) -> AliasEvent:
        """Point an alias at a version (None removes it) and append the event; already there: the last
        event.
        """

    def alias_events(self, name: str) -> list[AliasEvent]:
        """Every move of every alias of a model, oldest first."""


def alias_event(
    events: Sequence[AliasEvent],
    held: Mapping[str, int],
    name: str,
    alias: str,
    version: int | None,
    by: str,
    reason: str,
) -> tuple[AliasEvent, bool]:
    """The event of a move, and whether it is new: a move that was the alias's last is not made twice.

    Args:
        events: all events of the model, oldest first.
        held: where its aliases point now.
    """
    mine = [e for e in events if e.alias == alias]
    if mine and mine[-1].version == version:
        return mine[-1], False
    made = AliasEvent(
        name=name,
        alias=alias,
        version=version,
        previous=held.get(alias),
        at=time.time(),
        by=by,
        reason=reason[:_REASON_CHARS],
    )
    return made, True


def parse_ref(ref: str) -> Ref:
    """Take apart `name:3`, `name@alias` or `name`. Raises: ConfigError with the three forms."""
    forms = (
        f"{ref!r} is not a model reference."
        " Write 'name:3', 'name@champion', or 'name' for the latest version."
    )
    name, colon, version = ref.partition(":")
    if colon:
        if not version.isdigit() or not _NAME.match(name):
            raise ConfigError(forms)
        return Ref(name=name, version=int(version))
    name, at, alias = ref.partition("@")
    if not _NAME.match(name) or (at and not _ALIAS.match(alias)):
        raise ConfigError(forms)
    return Ref(name=name, alias=alias or None)


def check_name(name: str) -> None:
    """Raises: ConfigError when a model name cannot be part of a reference."""
    if not _NAME.match(name):
        raise ConfigError(
            f"{name!r} is not a model name. Use letters, digits, '.', '_' and '-', at most 128 of them."
        )


def check_card(record: ModelRecord, card: str | None) -> None:
    """Raises: DataError when a student that the pipeline made (its lineage names stages) has no card."""
    if record.lineage.manifests and not (card or "").strip():
        raise DataError(
            f"{record.name} has no model card: nobody could tell what it is. Publish it with its card"
            " (distill_jobs.publishing.card)."
        )


def no_card(ref: str) -> NotFoundError:
    """A version that was published without one."""
    return NotFoundError(f"{ref} has no model card: it was not made by the distillation pipeline.")


def check_alias(alias: str) -> None:
    """Raises: ConfigError when an alias cannot be part of a reference."""
    if not _ALIAS.match(alias) or re.fullmatch(r"v\d+|latest", alias):
        raise ConfigError(
            f"{alias!r} is not an alias. Use lower-case letters, digits, '_' and '-', starting with a letter;"
            " 'latest' and 'v1' and the like are taken by versions."
        )


def resolve(ref: str, versions: list[int], aliases: dict[str, int]) -> int:
    """The version a reference means, given what the model has.

    Raises: NotFoundError naming the versions and aliases there are.
    """
    parsed = parse_ref(ref)
    have = f"It has versions {versions} and aliases {aliases or 'none'}."
    if parsed.alias is not None:
        if parsed.alias not in aliases:
            raise NotFoundError(f"Model {parsed.name!r} has no alias {parsed.alias!r}. {have}")
        return aliases[parsed.alias]
    if parsed.version is None and versions:
        return max(versions)
    if parsed.version not in versions:
        raise NotFoundError(f"Model {parsed.name!r} has no version {parsed.version}. {have}")
    assert parsed.version is not None
    return parsed.version
