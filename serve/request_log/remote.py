"""The remote folder of the request log: any fsspec URL. Objects appear and are replaced whole.

Knows names and bytes, nothing about rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError
from serve.request_log.segments import is_final

_PASSWORD = re.compile(r"^[^:/]+://[^/@:]*:(?!\d+/).*@")
"""Also one with slashes, as secrets of S3 have; a port is none."""
_LOCAL = frozenset(("file", "local"))
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Remote:
    """Segments below one URL, e.g. s3://bucket/prefix.

    Credentials, and the endpoint of a store that is not the provider's own, come from the environment as the
    protocol's package reads it: for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3 or a
    profile or role, for every protocol FSSPEC_<PROTOCOL>_<OPTION>. The bucket must exist.
    """

    def __init__(self, url: str) -> None:
        """Raises: ConfigError when the URL holds a password, is of no known protocol, or needs a package."""
        if _PASSWORD.match(url):  # the URL is in log lines; it is not quoted here either
            raise ConfigError(
                "log.upload: the URL holds a password; give credentials in the environment, "
                "e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
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
        self._has_buckets = bool(protocols & set(_EXTRAS))

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
            if self._has_buckets:
                raise  # a bucket is nobody's to make in passing: a wrong name would fill one nobody knows of
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
