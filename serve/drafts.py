"""A draft that is named by its place in the registry, as a folder. Knows nothing of engines."""

from __future__ import annotations

from contracts.speculative import Speculative
from serve.engine.drafts import REGISTRY


def resolved(drafting: Speculative, registry_uri: str) -> Speculative:
    """The setting with `registry:NAME:VERSION` as its artifact's folder.

    Raises: NotFoundError when the registry has none.
    """
    if drafting.draft is None or not drafting.draft.startswith(REGISTRY):
        return drafting
    from registry.mlflow_store import open_registry

    folder = open_registry(registry_uri).get(drafting.draft.removeprefix(REGISTRY)).artifact.uri
    return drafting.model_copy(update={"draft": folder})
