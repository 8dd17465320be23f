"""The remote folder of the request log: any fsspec URL. Objects appear and are replaced whole.

Knows names and bytes, nothing about rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contracts.errors import ConfigError
from serve.request_log.segments import is_final

_LOCAL = frozenset(("file", "local"))
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Remote:
    """Segments below one URL, e.g. s3://bucket/prefix; credentials come from the environment, as usual."""

    def __init__(self, url: str) -> None:
        """Raises: ConfigError when the URL's protocol is unknown or its package is missing."""
        self.url = url
        import fsspec  # here: whoever only reads configurations need not wait for it

        try:
            found = fsspec.core.url_to_fs(url)
        except ImportError as err:
            package = _EXTRAS.get(url.partition("://")[0], "the fsspec package of that protocol")
            raise ConfigError(f"log.upload: {url!r} needs {package}: pip install {package}. ({err})") from err
        except ValueError as err:
            raise ConfigError(f"log.upload: {url!r} is not a URL that fsspec knows: {err}.") from err
        self._fs: Any = found[0]
        self._root: str = found[1].rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._is_local = bool(protocols & _LOCAL)

    def names(self) -> list[str]:
        """Names of the final segments there, oldest first."""
        self._fs.invalidate_cache()
        try:
            paths = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in paths if is_final(name := str(path).rstrip("/").rpartition("/")[2]))

    def read(self, name: str) -> bytes:
        """One segment. Raises: FileNotFoundError."""
        data: bytes = self._fs.cat_file(self._path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put a segment there, over the one that may be there already."""
        if self._is_local:  # object stores replace whole objects; a file would be seen half written
            path = Path(self._path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{name}.part")
            part.write_bytes(data)
            part.replace(path)
            return
        try:
            self._fs.pipe_file(self._path(name), data)
        except FileNotFoundError:  # a file system with real folders, e.g. SFTP
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(self._path(name), data)

    def delete(self, name: str) -> None:
        """Remove a segment; one that is gone already is fine."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
