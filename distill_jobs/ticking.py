"""Something done now and then in a thread, while something else runs. Knows nothing about what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def every(seconds: float, what: Callable[[], None], name: str) -> Iterator[None]:
    """Call `what` at this interval, and once more when the block ends, whichever way it does."""
    over = threading.Event()

    def tick() -> None:
        while True:
            last = over.wait(seconds)
            what()
            if last:
                return

    thread = threading.Thread(target=tick, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
