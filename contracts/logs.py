"""Log lines of every process: one JSON object a line, or text on a terminal, made off the caller's path.

A line about a request carries its `request_id`, and its `trace_id` when tracing is on. No line carries a text
of a user or a secret: messages are searched for secrets, and of an exception only our own errors' words are
kept (others quote what they choked on), with its type and the places it passed. Knows nothing about what is
logged.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import sys
import time
import traceback
from logging.handlers import QueueHandler, QueueListener
from typing import IO, Any, Literal

from pydantic import Field

from contracts.config import StrictConfig, parse_config
from contracts.errors import StillhouseError
from contracts.masking import mask

_FIELDS = "stillhouse_fields"
OURS = ("stillhouse", "contracts", "registry", "serve", "cli")
"""Loggers whose lines are ours, in a process that is somebody else's."""
_WAITING = 10_000
"""Lines waiting to be written; above it they are dropped: a log must not fill the memory of a router."""


class LogConfig(StrictConfig):
    """How processes log. The request log (`router.log`) is something else: rows with texts."""

    format: Literal["auto", "json", "text"] = "auto"
    """auto: text on a terminal, JSON lines elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """debug also shows whole exceptions, which may quote users' texts."""
    slow_request_s: float | None = Field(default=30.0, gt=0)
    """A request that took longer has a line of its own, like every failed one; None: only failed ones."""
    request_lines_per_s: float = Field(default=20.0, gt=0)
    """Most lines about requests a second and process; those left out are counted in the next one."""


def levelled(config: LogConfig, level: str | None) -> LogConfig:
    """The configuration with a level of the command line's, where one was given. Raises: ConfigError."""
    if level is None:
        return config
    return parse_config({**config.model_dump(), "level": level.lower()}, LogConfig, "--log-level")


def about(request_id: str | None, trace_id: str | None = None, **fields: Any) -> dict[str, Any]:
    """For a logging call's `extra`: whose line it is, and further facts (no texts) as fields of their own."""
    named = {"request_id": request_id, "trace_id": trace_id, **fields}
    return {_FIELDS: {key: value for key, value in named.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the fields first that every line has."""

    def __init__(self, process: str = "", whole_exceptions: bool = False) -> None:
        super().__init__()
        self._process, self._whole = process, whole_exceptions

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "ts": _utc(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": mask(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _exception(record.exc_info[1], self._whole)
        return json.dumps(line, ensure_ascii=False, default=str, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """For people at a terminal: the same facts in one line, an exception's places below it."""

    def __init__(self, whole_exceptions: bool = False) -> None:
        super().__init__()
        self._whole = whole_exceptions

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        text = f"{_utc(record)} {record.levelname} {record.name}: {mask(record.getMessage())}{fields}"
        if record.exc_info and record.exc_info[1] is not None:
            found = _exception(record.exc_info[1], self._whole)
            where = "".join(f"\n  {place}" for place in found.get("at", ()))
            text += f"\n{found['type']}: {found.get('message', '')}{where}"
        return text


def _utc(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    given = getattr(record, _FIELDS, {})
    return {key: mask(value) if isinstance(value, str) else value for key, value in given.items()}


def _exception(err: BaseException, whole: bool) -> dict[str, Any]:
    places = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(err.__traceback__)]
    found: dict[str, Any] = {"type": type(err).__name__, "at": places[-12:]}
    if isinstance(err, StillhouseError) or whole:
        found["message"] = mask(str(err))[:2000]
    cause = err.__cause__ or err.__context__
    if cause is not None and not err.__suppress_context__:
        found["cause"] = type(cause).__name__
    return found


class _Queued(QueueHandler):
    """Hands records over as they are: formatting is the other thread's, dropping is no error."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            pass  # the metrics count what matters; a flood of lines says nothing new


def start(
    config: LogConfig, process: str, names: tuple[str, ...] = (), stream: IO[str] | None = None
) -> QueueListener:
    """Send this process' lines to stderr from now on; what an earlier call set up is replaced.

    Args:
        process: what it is: router, controller, admin, engine, supervisor.
        names: loggers whose lines are ours, in a process that is somebody else's (a Ray worker); none: all.
        stream: instead of stderr.
    """
    out = stream or sys.stderr
    as_json = config.format == "json" or (config.format == "auto" and not out.isatty())
    whole = config.level == "debug"
    writer = logging.StreamHandler(out)
    writer.setFormatter(JsonFormatter(process, whole) if as_json else TextFormatter(whole))
    lines: queue.Queue[Any] = queue.Queue(_WAITING)
    listener = QueueListener(lines, writer)
    listener.start()
    atexit.register(_stop, listener)
    handler = _Queued(lines)
    for name in names or ("",):
        logger = logging.getLogger(name)
        for old in [h for h in logger.handlers if isinstance(h, _Queued) or not names]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(config.level.upper())
        logger.propagate = not names
    return listener


def _stop(listener: QueueListener) -> None:
    """At the end of the process: write what waits. Stopping twice is fine."""
    if listener._thread is not None:
        listener.stop()
