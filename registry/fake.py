"""An in-memory registry for tests: the same contract as the real one, nothing on disk but the artifacts.

Artifacts stay where the publisher put them. Knows nothing about MLflow; both run
tests/contract/test_registry.py.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from contracts.errors import DataError, NotFoundError
from contracts.model import AliasEvent, ModelRecord
from registry.digest import digest_folder
from registry.store import alias_event, check_alias, check_card, check_name, no_card, parse_ref, resolve


class FakeRegistry:
    """Registry held in three dictionaries under one lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._versions: dict[str, list[ModelRecord]] = {}
        self._aliases: dict[str, dict[str, int]] = {}
        self._events: dict[str, list[AliasEvent]] = {}
        self._cards: dict[str, str] = {}

    def publish(self, record: ModelRecord, artifact_dir: Path, card: str | None = None) -> ModelRecord:
        """Store the record as the next version; the same digest again returns the version it has."""
        check_name(record.name)
        check_card(record, card)
        if digest_folder(artifact_dir) != record.artifact.digest:
            raise DataError(
                f"{artifact_dir} does not have the digest its record names. Publish the folder again."
            )
        with self._lock:
            known = self._versions.setdefault(record.name, [])
            for old in known:
                if old.artifact.digest == record.artifact.digest:
                    return old
            artifact = record.artifact.model_copy(update={"uri": str(artifact_dir.resolve())})
            new = record.model_copy(update={"version": len(known) + 1, "artifact": artifact})
            known.append(new)
            if card is not None:
                self._cards[new.ref] = card
            return new

    def get(self, ref: str) -> ModelRecord:
        """The record a reference means."""
        name = parse_ref(ref).name
        records = self.history(name)
        version = resolve(ref, [r.version or 0 for r in records], self.aliases(name))
        return records[version - 1]

    def download(self, ref: str, into: Path | None = None) -> Path:
        """The artifact's folder, or a copy of it, with its digest verified."""
        record = self.get(ref)
        folder = Path(record.artifact.uri)
        if digest_folder(folder) != record.artifact.digest:
            raise DataError(f"The files of {record.ref} no longer match its digest. Publish the model again.")
        if into is None:
            return folder
        shutil.copytree(folder, into, dirs_exist_ok=True)
        return into

    def card(self, ref: str) -> str:
        """The model card of a version."""
        record = self.get(ref)
        if record.ref not in self._cards:
            raise no_card(record.ref)
        return self._cards[record.ref]

    def history(self, name: str) -> list[ModelRecord]:
        """All versions of a model, oldest first."""
        with self._lock:
            if name not in self._versions:
                raise NotFoundError(f"There is no model {name!r}. There are: {self.list_models() or 'none'}.")
            return list(self._versions[name])

    def list_models(self) -> list[str]:
        """Names of all models, sorted."""
        return sorted(self._versions)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias → version, as it is now."""
        self.history(name)
        return dict(self._aliases.get(name, {}))

    def set_alias(self, name: str, alias: str, version: int | None, by: str, reason: str) -> AliasEvent:
        """Point an alias at a version and append the event; already there: the last event."""
        check_alias(alias)
        with self._lock:
            current = self.aliases(name)
            if version is not None:
                resolve(f"{name}:{version}", [r.version or 0 for r in self.history(name)], current)
            events = self._events.setdefault(name, [])
            event, new = alias_event(events, current, name, alias, version, by, reason)
            if not new:
                return event
            events.append(event)
            held = self._aliases.setdefault(name, {})
            held.pop(alias, None)
            if version is not None:
                held[alias] = version
            return event

    def alias_events(self, name: str) -> list[AliasEvent]:
        """Every move of every alias of a model, oldest first."""
        self.history(name)
        return list(self._events.get(name, []))
