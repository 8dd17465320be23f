"""The registry on MLflow: a tracking server, or SQLite and a folder on this machine.

A version's ModelRecord is a version tag (with its own checksum), its artifact lies in the run's artifact
store, aliases are MLflow aliases, and every alias event is one more tag that nothing ever rewrites.
Knows nothing about training or serving.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from contracts.errors import ConflictError, DataError, NotFoundError, StateError
from contracts.model import AliasEvent, ModelRecord
from registry.digest import digest_folder
from registry.store import (
    Registry,
    alias_event,
    check_alias,
    check_card,
    check_name,
    no_card,
    parse_ref,
    resolve,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

EXPERIMENT = "stillhouse"
_DIGEST, _RECORD, _CHECKSUM = "stillhouse.digest", "stillhouse.record", "stillhouse.record_sha256"
_CARD_CHECKSUM = "stillhouse.card_sha256"
_EVENT = "stillhouse.alias_event."
_FOLDER = "artifact"
CARD = "MODEL_CARD.md"
"""Name of a version's model card, beside its artifact folder."""
_PARENT = "mlflow.parentRunId"


def sqlite_uri(database: Path) -> str:
    """The tracking URI of a SQLite file."""
    return f"sqlite:///{database.resolve()}"


def open_registry(tracking_uri: str) -> Registry:
    """The registry at a tracking URI; nothing is imported or connected before its first use."""
    return MlflowRegistry(tracking_uri)


class MlflowRegistry:
    """Registry over one MLflow tracking URI. Making one costs nothing; MLflow is imported at first use."""

    def __init__(
        self, tracking_uri: str, artifact_root: Path | None = None, cache_dir: Path | None = None
    ) -> None:
        """`artifact_root` is for SQLite URIs (default: beside the database); a server has its own."""
        self._uri = tracking_uri
        database = (
            Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None
        )
        self._lock_file = database.with_name(f".{database.name}.lock") if database else None
        self._artifacts = artifact_root or (database.parent / "artifacts" if database else None)
        self._cache = cache_dir or Path.home() / ".cache" / "stillhouse" / "artifacts"
        self._client: MlflowClient | None = None

    def publish(self, record: ModelRecord, artifact_dir: Path, card: str | None = None) -> ModelRecord:
        """Upload the artifact and create the next version; the same digest again returns the version it
        has.
        """
        check_name(record.name)
        check_card(record, card)
        digest = digest_folder(artifact_dir)
        if digest != record.artifact.digest:
            raise DataError(
                f"{artifact_dir} has digest {digest[:12]}, its record says {record.artifact.digest[:12]}."
                " The folder changed after it was evaluated: evaluate it again, then publish."
            )
        with self.client() as client:
            known = self._find_digest(client, record.name, digest)
            if known is not None:
                return _record_of(known)
            self._ensure_model(client, record)
            run = self._run_for(client, record)
            # A run that an earlier attempt left half uploaded is used again: the same names are overwritten.
            client.log_artifacts(run.info.run_id, str(artifact_dir), _FOLDER)
            self._log(client, run.info.run_id, record)
            if card is not None:
                client.log_text(run.info.run_id, card, CARD)
            return self._create_version(client, record, run, card)

    def get(self, ref: str) -> ModelRecord:
        """The record a reference means, its checksum verified."""
        with self.client() as client:
            return _record_of(self._version(client, ref))

    def download(self, ref: str, into: Path | None = None) -> Path:
        """The artifact as a local folder with its digest verified: in place, from the cache, or fetched."""
        record = self.get(ref)
        local = _local_path(record.artifact.uri)
        if local is not None and into is None:
            return _verified(local, record)
        target = into or self._cache / record.artifact.digest
        if target.is_dir() and digest_folder(target) == record.artifact.digest:
            return target
        self._fetch(record, target)
        return target

    def card(self, ref: str) -> str:
        """The model card of a version, from beside its artifact, its checksum verified."""
        with self.client() as client:
            version = self._version(client, ref)
            record, checksum = _record_of(version), version.tags.get(_CARD_CHECKSUM)
            if checksum is None:
                raise no_card(record.ref)
        text = self._text(f"{record.artifact.uri.rpartition('/')[0]}/{CARD}")
        if _sha256(text) != checksum:
            raise DataError(f"The model card of {record.ref} was changed after it was published.")
        return text

    def history(self, name: str) -> list[ModelRecord]:
        """All versions of a model, oldest first."""
        with self.client() as client:
            self._registered(client, name)
            return [_record_of(v) for v in self._versions(client, name)]

    def list_models(self) -> list[str]:
        """Names of all models, sorted."""
        with self.client() as client:
            return sorted(m.name for m in _paged(client.search_registered_models))

    def aliases(self, name: str) -> dict[str, int]:
        """Alias → version, as it is now."""
        with self.client() as client:
            return self._aliases(client, name)

    def set_alias(self, name: str, alias: str, version: int | None, by: str, reason: str) -> AliasEvent:
        """Append the event, then move the alias: a crash between the two is healed by the next call."""
        check_alias(alias)
        with self.client() as client:
            held = self._aliases(client, name)
            if version is not None:
                self._version(client, f"{name}:{version}")
            events = self._events(client, name)
            event, new = alias_event(events, held, name, alias, version, by, reason)
            if new:
                key = f"{_EVENT}{time.time_ns():020d}.{uuid.uuid4().hex[:8]}"
                client.set_registered_model_tag(name, key, event.model_dump_json())
            if version is None and alias in held:
                client.delete_registered_model_alias(name, alias)
            elif version is not None and held.get(alias) != version:
                client.set_registered_model_alias(name, alias, str(version))
            return event

    def alias_events(self, name: str) -> list[AliasEvent]:
        """Every move of every alias of a model, oldest first."""
        with self.client() as client:
            return self._events(client, name)

    @contextmanager
    def client(self) -> Iterator[MlflowClient]:
        """The client; for SQLite under a file lock, because MLflow's schema set-up and writes race
        otherwise. Raises: StateError when the server refuses.
        """
        _quiet()
        from mlflow.exceptions import MlflowException

        try:
            if self._lock_file is None:
                yield self._connect()
                return
            self._lock_file.parent.mkdir(parents=True, exist_ok=True)
            with self._lock_file.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self._connect()
        except MlflowException as err:
            raise StateError(
                f"MLflow at {self._uri} refused: {err}. Check the tracking URI and its server."
            ) from err

    def _connect(self) -> MlflowClient:
        if self._client is None:
            _quiet()
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        return self._client

    def experiment(self, client: MlflowClient) -> str:
        """Id of the experiment that holds every run, made when it is missing."""
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        location = self._artifacts.resolve().as_uri() if self._artifacts else None
        return str(client.create_experiment(EXPERIMENT, artifact_location=location))

    def _ensure_model(self, client: MlflowClient, record: ModelRecord) -> None:
        if record.name not in {m.name for m in _paged(client.search_registered_models)}:
            client.create_registered_model(record.name, description=record.description or None)

    def _run_for(self, client: MlflowClient, record: ModelRecord) -> Run:
        """The unfinished run of an earlier attempt at this digest, or a new one."""
        experiment = self.experiment(client)
        wanted = f"tags.`{_DIGEST}` = '{record.artifact.digest}' and attributes.status = 'RUNNING'"
        runs = client.search_runs([experiment], wanted, max_results=1)
        if runs:
            return runs[0]
        tags = {_DIGEST: record.artifact.digest, "stillhouse.model": record.name} | _lineage_tags(record)
        return client.create_run(
            experiment, tags=tags, run_name=f"{record.name}-{record.artifact.digest[:8]}"
        )

    def _log(self, client: MlflowClient, run_id: str, record: ModelRecord) -> None:
        metrics = dict(record.evaluation.metrics) if record.evaluation else {}
        for name, value in metrics.items():
            if value is not None:
                client.log_metric(run_id, name, value, step=0)
        for name in ("precision", "bytes", "params"):
            client.log_param(run_id, name, getattr(record.artifact, name))
        client.log_text(run_id, record.model_dump_json(indent=2), "record.json")

    def _create_version(
        self, client: MlflowClient, record: ModelRecord, run: Run, card: str | None
    ) -> ModelRecord:
        source = f"{run.info.artifact_uri}/{_FOLDER}"
        local = _local_path(source)
        artifact = record.artifact.model_copy(update={"uri": str(local or source)})
        stored = record.model_copy(update={"artifact": artifact, "version": None})
        if local is not None:
            _verified(local, stored)
        text = stored.model_dump_json()
        tags = {_DIGEST: stored.artifact.digest, _RECORD: text, _CHECKSUM: _sha256(text)}
        if card is not None:
            tags[_CARD_CHECKSUM] = _sha256(card)
        made = client.create_model_version(record.name, source, run.info.run_id, tags=tags)
        client.set_terminated(run.info.run_id)
        first = self._find_digest(client, record.name, stored.artifact.digest)
        if first is None:
            raise ConflictError(
                f"The new version of {record.name!r} vanished while it was published. Publish again."
            )
        if int(first.version) != int(made.version):
            # Two publishers of one digest without a lock (a remote server): the lower version wins for both.
            client.delete_model_version(record.name, str(made.version))
        return _record_of(first)

    def _versions(self, client: MlflowClient, name: str) -> list[ModelVersion]:
        found = _paged(client.search_model_versions, f"name = '{name}'")
        return sorted(found, key=lambda v: int(v.version))

    def _find_digest(self, client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
        return next((v for v in self._versions(client, name) if v.tags.get(_DIGEST) == digest), None)

    def _registered(self, client: MlflowClient, name: str) -> Any:
        models = {m.name: m for m in _paged(client.search_registered_models)}
        if name not in models:
            raise NotFoundError(
                f"There is no model {name!r} at {self._uri}. There are: {sorted(models) or 'none'}."
            )
        return client.get_registered_model(name)

    def _aliases(self, client: MlflowClient, name: str) -> dict[str, int]:
        return {alias: int(version) for alias, version in self._registered(client, name).aliases.items()}

    def _version(self, client: MlflowClient, ref: str) -> ModelVersion:
        name = parse_ref(ref).name
        aliases = self._aliases(client, name)
        versions = {int(v.version): v for v in self._versions(client, name)}
        return versions[resolve(ref, sorted(versions), aliases)]

    def _events(self, client: MlflowClient, name: str) -> list[AliasEvent]:
        tags = self._registered(client, name).tags
        return [AliasEvent.model_validate_json(tags[key]) for key in sorted(tags) if key.startswith(_EVENT)]

    def _text(self, uri: str) -> str:
        local = _local_path(uri)
        if local is not None:
            return local.read_text(encoding="utf-8")
        _quiet()
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as folder:
            got = download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=self._uri)
            return Path(got).read_text(encoding="utf-8")

    def _fetch(self, record: ModelRecord, target: Path) -> None:
        _quiet()
        from mlflow.artifacts import download_artifacts

        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        tmp.mkdir(exist_ok=True)
        got = download_artifacts(artifact_uri=record.artifact.uri, dst_path=str(tmp), tracking_uri=self._uri)
        _verified(Path(got), record)
        if target.exists():
            raise ConflictError(
                f"{target} exists and is not {record.ref}. Remove it, or give another folder."
            )
        Path(got).rename(target)
        if tmp.exists():
            tmp.rmdir()


def _record_of(version: ModelVersion) -> ModelRecord:
    """The record of a version; DataError when somebody edited its tag."""
    text = version.tags.get(_RECORD)
    if text is None or _sha256(text) != version.tags.get(_CHECKSUM):
        raise DataError(
            f"The record of {version.name}:{version.version} was changed or not written by Stillhouse."
            " Records are immutable: publish the model again."
        )
    record = ModelRecord.model_validate_json(text)
    return record.model_copy(update={"version": int(version.version)})


def _verified(folder: Path, record: ModelRecord) -> Path:
    found = digest_folder(folder)
    if found != record.artifact.digest:
        raise DataError(
            f"The files of {record.name} in {folder} have digest {found[:12]}, the record says"
            f" {record.artifact.digest[:12]}. The artifact is damaged: publish the model again."
        )
    return folder


def _lineage_tags(record: ModelRecord) -> dict[str, str]:
    lineage = record.lineage
    tags = {f"stillhouse.manifest.{stage}": key for stage, key in lineage.manifests.items()}
    for name in ("teacher", "teacher_digest", "base_model", "git_revision", "log_from", "log_to"):
        value = getattr(lineage, name)
        if value is not None:
            tags[f"stillhouse.{name}"] = str(value)
    if lineage.tracking_run is not None:
        tags[_PARENT] = lineage.tracking_run  # MLflow's pages then show the version below its job
    return tags


def _local_path(uri: str) -> Path | None:
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return Path(uri) if parsed.scheme == "" else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _paged(search: Any, filter_string: str | None = None) -> list[Any]:
    """Every page of an MLflow search."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def _quiet() -> None:
    """Before MLflow is imported: no telemetry, no progress bars, no migration log on the terminal."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in (
        "alembic",
        "mlflow.store.db.utils",
        "mlflow.store.model_registry.abstract_store",
        "mlflow.tracking",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
