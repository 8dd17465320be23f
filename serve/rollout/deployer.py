"""What the controller asks of whoever runs engines: the Deployer protocol, and a fake for tests.

The real one (Ray Serve) is `serve.engine.deployer`. This file does not know Ray, vLLM or statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from contracts.errors import EngineError
from contracts.traffic import Upstream


class Deployer(Protocol):
    """Starts, warms and retires the engine behind an upstream.

    The controller calls every method again after a crash, so each must be idempotent. None may block for
    longer than a few seconds: what takes longer is started by one call and seen by a later one.
    An upstream with a `url` (not an `app`) already runs and belongs to somebody else: `deploy` and `retire`
    are never called for it, the others are.
    """

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """Start creating the application, or do nothing when it exists. Returns quickly.

        Raises: EngineError when it cannot be created; the controller tries again within its error budget.
        """
        ...

    def ready(self, upstream: Upstream) -> bool:
        """True when at least one replica is up and its endpoint is registered.

        Raises: EngineError when the deployment failed for good (a bad checkpoint, out of memory).
        """
        ...

    def probe(self, upstream: Upstream) -> None:
        """Warm it: send real small chat requests and wait for their answers.

        Raises: EngineError when one is not answered.
        """
        ...

    def in_flight(self, upstream: Upstream) -> int:
        """Requests the engine itself is working on; 0 when unknown (the routers' counts are added to it)."""
        ...

    def retire(self, upstream: Upstream) -> None:
        """Delete the application; nothing happens when it is gone already. Called after the drain."""
        ...


class FakeDeployer:
    """A Deployer that only remembers, for tests and dry runs. `fail` maps a method to the error it raises."""

    def __init__(self, ready_after: int = 0) -> None:
        self.calls: list[tuple[str, str]] = []
        self.running: set[str] = set()
        self.fail: dict[str, str] = {}
        self.busy: dict[str, int] = {}
        self.ready_after = ready_after
        self.on_probe: Callable[[Upstream], None] | None = None

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """Remember the application."""
        self._called("deploy", upstream)
        self.running.add(upstream.name)

    def ready(self, upstream: Upstream) -> bool:
        """True once it was deployed (or has a url) and was asked `ready_after` times before."""
        self._called("ready", upstream)
        asked = sum(1 for c in self.calls if c == ("ready", upstream.name))
        return (upstream.url is not None or upstream.name in self.running) and asked > self.ready_after

    def probe(self, upstream: Upstream) -> None:
        """Call `on_probe` when there is one."""
        self._called("probe", upstream)
        if self.on_probe is not None:
            self.on_probe(upstream)

    def in_flight(self, upstream: Upstream) -> int:
        """What `busy` says."""
        self._called("in_flight", upstream)
        return self.busy.get(upstream.name, 0)

    def retire(self, upstream: Upstream) -> None:
        """Forget the application."""
        self._called("retire", upstream)
        self.running.discard(upstream.name)

    def _called(self, method: str, upstream: Upstream) -> None:
        self.calls.append((method, upstream.name))
        if method in self.fail:
            raise EngineError(self.fail[method])
