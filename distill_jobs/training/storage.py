"""Where a run's checkpoints live: a folder, or a URL that fsspec knows (s3://bucket/prefix). Knows no models.

Credentials, and the endpoint of a store that is not the provider's own, come from the environment as the
protocol's package reads it: for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL_S3.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs

from contracts.errors import ConfigError

_PASSWORD = re.compile(r"^[^:/]+://[^/@:]*:(?!\d+/).*@")


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder on some file system, as Ray Train takes it."""

    filesystem: pyarrow.fs.FileSystem
    path: str

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Put a small file there; it appears whole (objects by themselves, files by a rename)."""
        place = f"{self.path}/{name}"
        self.filesystem.create_dir(place.rpartition("/")[0], recursive=True)
        local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
        with self.filesystem.open_output_stream(f"{place}.part" if local else place) as out:
            out.write(json.dumps(value).encode())
        if local:
            self.filesystem.move(f"{place}.part", place)

    def read_jsons(self, folder: str) -> list[dict[str, Any]]:
        """All small files of a folder there, by name."""
        chosen = pyarrow.fs.FileSelector(f"{self.path}/{folder}", allow_not_found=True)
        found = []
        for info in sorted(self.filesystem.get_file_info(chosen), key=lambda one: one.path):
            if info.path.endswith(".json"):
                with self.filesystem.open_input_stream(info.path) as source:
                    found.append(json.loads(source.read()))
        return found

    def below(self, name: str) -> Storage:
        """A folder in this one."""
        return Storage(self.filesystem, f"{self.path}/{name}")


def open_storage(place: str) -> Storage:
    """The storage that a configuration names. Raises: ConfigError for a URL that cannot be used."""
    if _PASSWORD.match(place):
        raise ConfigError(
            "train.storage: the URL holds a password; give credentials in the environment, "
            "e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if "://" not in place:
        return Storage(pyarrow.fs.LocalFileSystem(), str(Path(place).resolve()))
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except (ImportError, ValueError) as err:
        raise ConfigError(f"train.storage: {place!r} is not usable: {err}.") from err
    handler = pyarrow.fs.FSSpecHandler(filesystem)
    return Storage(pyarrow.fs.PyFileSystem(handler), path.rstrip("/"))
