"""A connection to Ray for as long as a stage needs it: the running cluster if there is one, else a local Ray.

Knows nothing about what is run there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contracts.errors import StillhouseError

# Ray gives a starting node 30 s, fixed in its source; two busy cores have needed a second attempt.
_ATTEMPTS = 3


@contextmanager
def ray_session(
    address: str = "auto", cpus: int = 1, resources: dict[str, float] | None = None
) -> Iterator[None]:
    """Connect, and leave Ray as it was found. "auto": the running cluster if any; "local": one of its own.

    A local Ray gets at least `cpus` CPUs and these resources, so that workers that were asked for also fit on
    a small machine.
    """
    import ray

    with _own_signals():
        if ray.is_initialized():
            yield
            return
        _connect(address, cpus, resources or {})
        try:
            yield
        finally:
            ray.shutdown()


def _connect(address: str, cpus: int, resources: dict[str, float]) -> None:
    """Join or start Ray. Raises: StillhouseError when it does not come up."""
    import ray

    handlers = _handlers()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _init(address, cpus, resources)
            break
        except Exception as err:  # Ray raises bare Exception when a part of it does not come up in time
            ray.shutdown()
            if attempt == _ATTEMPTS:
                raise StillhouseError(
                    f"Ray did not start or could not be joined (ray: {address}): {err}"
                    " An overloaded machine does this: run the same command again when it is quieter."
                ) from err
    _restore(handlers)


def _init(address: str, cpus: int, resources: dict[str, float]) -> None:
    import ray

    options: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": _code_path()}},
        "logging_level": "WARNING",
        "log_to_driver": False,
    }
    if address == "local" or not _joined(address, options):
        room = max(cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=room, resources=resources, include_dashboard=False, **options)


def _joined(address: str, options: dict[str, Any]) -> bool:
    """True when a cluster was there to join; only "auto" may find none."""
    import ray

    try:
        ray.init(address=address, **options)
    except ConnectionError:
        if address != "auto":
            raise
        return False
    return True


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM mean after the session what they meant before; Ray Train leaves its own handlers.

    Its answer to Ctrl-C ends in sys.exit(0), which would look like success: an interrupt it stays.
    """
    handlers = _handlers()
    try:
        yield
    except SystemExit as err:
        raise KeyboardInterrupt from err
    finally:
        _restore(handlers)


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may set them, so nobody can have changed them from here
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in found.items() if handler is not None}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _code_path() -> str:
    """Workers start elsewhere; they find this package where the driver did."""
    code = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(p for p in (code, os.environ.get("PYTHONPATH")) if p)
