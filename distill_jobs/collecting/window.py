"""The log window of a job: which bytes of which segments (requests, feedback) and of which other files, fixed
when it first starts.

Serving goes on writing while a job runs; a job that is killed and started again must see the same rows. The
log is a folder, or any fsspec URL that routers upload to. Knows nothing about what is in a row.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from contracts.config import Record, write_atomic
from contracts.errors import ConfigError, DataError
from distill_jobs.collecting.settings import SourceConfig
from registry.digest import digest_file

_OPEN = ".open.jsonl"
_FEEDBACK = "feedback-"
"""What users said lies beside the rows."""

_CHUNK_BYTES = 4 << 20

Place = Path | str
"""A folder, or an fsspec URL of one."""


class Segment(Record):
    """The first `bytes` bytes of a log file (whole lines only), or a whole file of a further source."""

    name: str
    bytes: int
    digest: str
    torn: int = 0
    """1 when the file went on with an unfinished line at that moment."""
    kind: Literal["log", "jsonl", "parquet"] = "log"
    folder: str | None = None
    """Where a source's file lies; None: in the log's place."""
    source: str = "log"
    """The source's name."""
    route: str | None = None
    """Route that a source's rows count as."""

    @property
    def is_feedback(self) -> bool:
        """True when its lines are users' judgements, not requests."""
        return self.kind == "log" and is_feedback(self.name)


def place(text: str) -> Place:
    """A log's place as configurations and tasks write it."""
    return text if "://" in text else Path(text)


def pin_window(log_dir: Place | None, file: Path, sources: Sequence[SourceConfig] = ()) -> list[Segment]:
    """The window that `file` pins; pinned now when there is none yet.

    Raises: DataError when there are no rows; ConfigError when a source has no files.
    """
    if file.is_file():
        return [Segment.model_validate(s) for s in json.loads(file.read_text(encoding="utf-8"))]
    segments = [] if log_dir is None else _log_segments(log_dir)
    segments += [s for source in sources for s in _source_segments(source) if s.bytes]
    if all(s.is_feedback for s in segments):
        raise DataError(
            f"There are no request-log segments (*.jsonl) with rows in {log_dir}. Send traffic first."
        )
    write_atomic(file, json.dumps([s.model_dump() for s in segments], indent=1) + "\n")
    return segments


def _log_segments(log_dir: Place) -> list[Segment]:
    return [s for name in sorted(log_files(log_dir)) if (s := _measure(log_dir, name)).bytes]


def _source_segments(source: SourceConfig) -> list[Segment]:
    """The files of a source, sorted by name."""
    files = [source.path]
    if source.path.is_dir():
        files = sorted(p for p in source.path.glob(f"*.{source.kind}") if not p.name.startswith("."))
    if not files or not all(f.is_file() for f in files):
        raise ConfigError(f"collect.sources: there are no *.{source.kind} files at {source.path}.")
    return [
        Segment(
            name=file.name,
            bytes=file.stat().st_size,
            digest=digest_file(file),
            kind=source.kind,
            folder=str(file.resolve().parent),
            source=source.name,
            route=source.route,
        )
        for file in files
    ]


def open_segment(log_dir: Place, segment: Segment) -> IO[bytes]:
    """The pinned bytes, wherever they are now: the router may close (rename) an open segment at any moment. A
    local file may go on after them.

    Raises: DataError when they are gone, or are not the pinned ones any more.
    """
    where = log_dir if segment.folder is None else Path(segment.folder)
    # The open name first: when it is gone, the rename has happened, and the closed name is there.
    for name in (segment.name, closed_name(segment.name)):
        try:
            source = _open(where, name, segment.bytes)
        except FileNotFoundError:
            continue
        digest, left = hashlib.sha256(), segment.bytes
        while left and (chunk := source.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        if digest.hexdigest() == segment.digest:
            source.seek(0)
            return source
        source.close()
    raise DataError(
        f"Log segment {segment.name} is gone from {where} or was rewritten since this job fixed its window."
        " Start a job with another workdir to use the logs there are now."
    )


def read_segment(log_dir: Place, segment: Segment) -> bytes:
    """All pinned bytes. Raises: DataError as `open_segment`."""
    with open_segment(log_dir, segment) as source:
        return source.read(segment.bytes)


def lines(log_dir: Place, segment: Segment) -> Iterator[bytes]:
    """The pinned lines, one in memory at a time. Raises: DataError as `open_segment`."""
    with open_segment(log_dir, segment) as source:
        left = segment.bytes
        while left > 0 and (line := source.readline(left)):
            left -= len(line)
            yield line


def log_files(log_dir: Place) -> dict[str, int]:
    """Name → bytes of the log files there are now. A segment that is renamed while the folder is listed may
    appear under both names: it counts once, under the closed one.
    """
    if isinstance(log_dir, Path):
        sizes = {path.name: _size(path) for path in log_dir.glob("*.jsonl")}
    else:
        fs, root = _remote(log_dir)
        try:
            listed = fs.ls(root, detail=True)
        except FileNotFoundError:
            listed = []
        sizes = {str(f["name"]).rstrip("/").rpartition("/")[2]: int(f["size"] or 0) for f in listed}
    names = {closed_name(n): n for n in sorted(sizes, reverse=True) if n.endswith(".jsonl") and n[0] != "."}
    return {name: sizes[name] for name in names.values()}


def read_range(log_dir: Place, name: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a log file under its name or, since it was closed, its closed one; of one that is
    gone, none.
    """
    for known in (name, closed_name(name)):
        try:
            if isinstance(log_dir, Path):
                with (log_dir / known).open("rb") as source:
                    source.seek(start)
                    return source.read(max(0, end - start))
            fs, root = _remote(log_dir)
            data: bytes = fs.cat_file(f"{root}/{known}", start=start, end=end)
            return data
        except FileNotFoundError:
            continue
    return b""


def closed_name(name: str) -> str:
    """What a segment is called once it is closed: the same before and after."""
    return name.removesuffix(_OPEN) + ".jsonl" if name.endswith(_OPEN) else name


def is_feedback(name: str) -> bool:
    """True for a file of users' judgements."""
    return name.startswith(_FEEDBACK)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # closed since the folder was listed: seen at the next look
        return 0


def _open(log_dir: Place, name: str, size: int | None = None) -> IO[bytes]:
    """A local file; of a remote one its first `size` bytes, or all of it. Raises: FileNotFoundError."""
    if isinstance(log_dir, Path):
        return (log_dir / name).open("rb")
    fs, root = _remote(log_dir)
    return io.BytesIO(fs.cat_file(f"{root}/{name}", start=0, end=size))


def _remote(url: str) -> tuple[Any, str]:
    import fsspec  # here: most logs are folders

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as err:
        raise ConfigError(f"collect.log_dir: {url!r} cannot be opened: {err}.") from err
    return fs, root.rstrip("/")


def _measure(log_dir: Place, name: str) -> Segment:
    """Pin a file's whole lines; what follows its last line break is torn, or not written yet."""
    try:
        source = _open(log_dir, name)
    except FileNotFoundError:  # closed since the folder was listed
        name = closed_name(name)
        source = _open(log_dir, name)
    digest, whole, rest = hashlib.sha256(), 0, b""
    with source:
        while chunk := source.read(_CHUNK_BYTES):
            upto = chunk.rfind(b"\n") + 1
            if upto:
                digest.update(rest + chunk[:upto])
                whole += len(rest) + upto
                rest = b""
            rest += chunk[upto:]
    return Segment(name=name, bytes=whole, digest=digest.hexdigest(), torn=int(bool(rest)))
