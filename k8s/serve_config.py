"""Writes an overlay's serve.yaml from its stillhouse.yaml: python -m k8s.serve_config k8s/overlays/NAME …

It is what `stillhouse up` would run, with the path that pods see and the revision of the file, so that an
in-place change of stillhouse.yaml reaches the routers and the controller. Knows nothing about clusters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from contracts.config import write_atomic
from contracts.errors import StillhouseError
from k8s.serving import STACK, stack_of

PATH = "/etc/stillhouse/stillhouse.yaml"
_HEAD = """# What Ray Serve runs here (RayService.spec.serveConfigV2), made of stillhouse.yaml; do not edit:
#   python -m k8s.serve_config k8s/overlays/{name}
"""


def rendered(overlay: Path) -> str:
    """The text of serve.yaml. Raises: ConfigError when stillhouse.yaml is wrong."""
    from serve.app import revision_of, serve_config

    told = serve_config(stack_of(overlay), PATH, revision_of((overlay / STACK).read_bytes()))
    return _HEAD.format(name=overlay.resolve().name) + yaml.safe_dump(told, sort_keys=False, width=110)


def main(argv: list[str]) -> int:
    """Write each overlay's file; says which changed."""
    if not argv:
        print("usage: python -m k8s.serve_config k8s/overlays/NAME …", file=sys.stderr)
        return 2
    for folder in map(Path, argv):
        try:
            text, file = rendered(folder), folder / "serve.yaml"
        except (StillhouseError, OSError) as err:
            print(f"{folder}: {err}", file=sys.stderr)
            return 1
        changed = not file.exists() or file.read_text() != text
        write_atomic(file, text)
        print(f"{file}: {'written' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
