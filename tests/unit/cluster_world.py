"""A cluster for tests of who deploys what: applications that run as soon as they were deployed, or fail."""

from __future__ import annotations

from contracts.errors import EngineError
from contracts.traffic import Upstream


class Cluster:
    """As much of a ServeDeployer as whoever keeps students uses."""

    def __init__(self) -> None:
        self.status: dict[str, str] = {}
        self.artifacts: dict[str, str] = {}
        self.deleted: list[str] = []
        self.refuses: set[str] = set()

    def running(self) -> dict[str, str]:
        """Application → status."""
        return dict(self.status)

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """It runs."""
        if upstream.app in self.refuses:
            raise EngineError(f"no {upstream.app} today")
        self.status.setdefault(str(upstream.app), "RUNNING")
        self.artifacts[str(upstream.app)] = artifact_uri

    def delete(self, app: str) -> None:
        """It is gone."""
        self.deleted.append(app)
        del self.status[app]
