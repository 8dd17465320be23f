"""The Kubernetes guide says what the manifests do."""

from __future__ import annotations

import re

from k8s.build import OVERLAYS, ROOT
from k8s.references import prerequisites

GUIDE = (ROOT.parent / "docs" / "guides" / "kubernetes.md").read_text()


def test_every_secret_that_others_make_is_in_the_guide() -> None:
    """Its name, and a key that cannot be done without."""
    for name, secret in prerequisites()["Secret"].items():
        assert re.search(rf"create secret generic {name}\b", GUIDE), name
        assert secret["keys"][0] in GUIDE, name


def test_what_the_guide_names_is_there() -> None:
    """Overlays, Dockerfiles, resources and the check's own command."""
    for overlay in OVERLAYS:
        assert f"overlays/{overlay}" in GUIDE
    for dockerfile in re.findall(r"-f (\S+\.Dockerfile)", GUIDE):
        assert (ROOT.parent / dockerfile).is_file(), dockerfile
    for module in re.findall(r"python -m (k8s\.\w+)", GUIDE):
        assert (ROOT / f"{module.removeprefix('k8s.')}.py").is_file(), module
    base = "".join(file.read_text() for file in (ROOT / "base").glob("*.yaml"))
    for label in set(re.findall(r"stillhouse\.io/[a-z]+(?==true)", GUIDE)):
        assert label in base, label
    for name in re.findall(r"(?:rayjob|deploy/|svc/|rayservice) ?(stillhouse-(?:admin|distill))", GUIDE):
        assert f"name: {name}\n" in base, name
