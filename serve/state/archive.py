"""A backup as a file: one zip of rows as JSON lines, and a manifest with counts and digests, written last.

It appears whole or not at all, and is read only after every part was checked against the manifest. Knows
names, rows and bytes; nothing about databases.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contracts.config import Record, parse_config
from contracts.errors import ConfigError, ConflictError, DataError

FORMAT = "stillhouse-state-backup"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_LINES = 1000
"""Rows that are compressed at a time."""


class Part(Record):
    """The rows of one table."""

    file: str
    rows: int
    bytes: int
    """Before compression."""
    sha256: str
    columns: tuple[str, ...]


class Manifest(Record):
    """What an archive holds, and what it does not."""

    format: str
    format_version: int
    schema_version: int
    made_at: str
    """UTC, ISO 8601."""
    release: str
    database: str
    """sqlite or postgresql: where the rows came from; they go into either."""
    parts: dict[str, Part]
    left_out: tuple[str, ...]
    """Tables that speak of running processes only."""
    not_in_it: dict[str, str]
    """What belongs to the installation and lives elsewhere → how to keep it."""


def write_archive(file: Path, tables: Iterable[tuple[str, list[str], Iterable[Any]]], facts: Any) -> Manifest:
    """Write a new archive beside its final name, and give it that name when it is complete.

    Args:
        tables: name, columns and rows (in the order of the columns) of every table.
        facts: fields of the manifest beside format and parts.

    Raises:
        ConflictError: there is a file of that name.
        ConfigError: it cannot be written there.
    """
    if file.exists():
        raise ConflictError(f"{file} is there already; a backup replaces nothing, give another name.")
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # It holds what the store holds (digests of keys, addresses of webhooks): nobody else's to read.
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
                parts = {name: _write_part(archive, name, cols, rows) for name, cols, rows in tables}
                fields = {**facts, "format": FORMAT, "format_version": FORMAT_VERSION, "parts": parts}
                manifest = Manifest(**fields)
                archive.writestr(MANIFEST, manifest.model_dump_json(indent=2))
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except OSError as err:
        raise ConfigError(f"the backup cannot be written to {file}: {err}.") from err
    finally:
        part.unlink(missing_ok=True)
    return manifest


def _write_part(archive: zipfile.ZipFile, name: str, columns: list[str], rows: Iterable[Any]) -> Part:
    file, digest, count, size = f"rows/{name}.jsonl", hashlib.sha256(), 0, 0
    with archive.open(file, "w", force_zip64=True) as out:
        for lines in _blocks(rows):
            data = b"".join(lines)
            digest.update(data)
            out.write(data)
            count, size = count + len(lines), size + len(data)
    return Part(file=file, rows=count, bytes=size, sha256=digest.hexdigest(), columns=tuple(columns))


def _blocks(rows: Iterable[Any]) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    for row in rows:
        # Not orjson: it writes an infinite float as null.
        lines.append(json.dumps(list(row), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        if len(lines) == _LINES:
            yield lines
            lines = []
    if lines:
        yield lines


class Archive:
    """An archive whose every part was checked; rows are read as they are asked for."""

    def __init__(self, file: Path, name: str) -> None:
        """Raises: DataError naming what is wrong with it."""
        self._name = name
        try:
            self._zip = zipfile.ZipFile(file)
        except FileNotFoundError:
            raise DataError(f"there is no backup at {name}.") from None
        except (zipfile.BadZipFile, OSError) as err:
            raise DataError(f"{name} is no backup, or only the beginning of one ({err}).") from err
        self.manifest = self._read_manifest()
        for table, part in self.manifest.parts.items():
            self._check(table, part)

    def _read_manifest(self) -> Manifest:
        try:
            found = json.loads(self._zip.read(MANIFEST))
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as err:
            raise DataError(f"{self._name} is no backup of a state store: {MANIFEST}: {err}.") from err
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise DataError(f"{self._name} is no backup of a state store: {MANIFEST} is of something else.")
        if found.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{self._name} has format {found.get('format_version')!r}; this release reads "
                f"{FORMAT_VERSION}. Restore it with the release that wrote it ({found.get('release')!r})."
            )
        return parse_config(found, Manifest, f"{self._name}: {MANIFEST}")

    def _check(self, table: str, part: Part) -> None:
        digest, rows = hashlib.sha256(), 0
        try:
            with self._zip.open(part.file) as lines:
                for line in lines:
                    digest.update(line)
                    rows += 1
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as err:
            raise DataError(f"{self._name} is damaged: part {part.file!r}: {err}.") from err
        if digest.hexdigest() != part.sha256:
            raise DataError(f"{self._name} is damaged: part {part.file!r} does not match its sha256.")
        if rows != part.rows:
            raise DataError(
                f"{self._name} is damaged: part {part.file!r} holds {rows} rows of {table!r}, "
                f"the manifest says {part.rows}."
            )

    def rows(self, table: str) -> Iterator[dict[str, object]]:
        """The rows of a table, by column. Raises: DataError when a line is none of its rows."""
        part = self.manifest.parts[table]
        with self._zip.open(part.file) as lines:
            for number, line in enumerate(lines, 1):
                values = self._values(part, number, line)
                yield dict(zip(part.columns, values, strict=True))

    def _values(self, part: Part, number: int, line: bytes) -> list[object]:
        try:
            values = json.loads(line)
        except ValueError as err:
            raise DataError(f"{self._name}: {part.file!r} line {number} is no JSON: {err}.") from err
        if not isinstance(values, list) or len(values) != len(part.columns):
            raise DataError(f"{self._name}: {part.file!r} line {number} has not {len(part.columns)} values.")
        return values

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


@contextmanager
def local_copy(place: str) -> Iterator[Path]:
    """A file to read: the path itself, or a URL's content. Raises: ConfigError, DataError."""
    if "://" not in place:
        yield Path(place)
        return
    filesystem, path = _filesystem(place)
    with tempfile.TemporaryDirectory(prefix="stillhouse-restore-") as folder:
        file = Path(folder) / "backup.zip"
        try:
            filesystem.get_file(path, str(file))
        except FileNotFoundError:
            raise DataError(f"there is no backup at {place}.") from None
        except Exception as err:
            raise DataError(f"the backup {place} cannot be read: {err}.") from err
        yield file


@contextmanager
def written_to(place: str) -> Iterator[Path]:
    """A file to write: the path itself, or one that is put at the URL afterwards. Raises: ConfigError."""
    if "://" not in place:
        yield Path(place)
        return
    filesystem, path = _filesystem(place)
    if filesystem.exists(path):
        raise ConflictError(f"{place} is there already; a backup replaces nothing, give another name.")
    with tempfile.TemporaryDirectory(prefix="stillhouse-backup-") as folder:
        file = Path(folder) / "backup.zip"
        yield file
        try:
            filesystem.put_file(str(file), path)
        except Exception as err:
            raise ConfigError(f"the backup cannot be written to {place}: {err}.") from err


def _filesystem(place: str) -> tuple[Any, str]:
    if urlsplit(place).password is not None:
        raise ConfigError("the backup's URL holds a password; give credentials in the environment.")
    import fsspec  # here: a path needs none

    try:
        filesystem, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except (ImportError, ValueError) as err:
        raise ConfigError(f"{place!r}: {err}.") from err
    return filesystem, str(path)
