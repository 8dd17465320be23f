"""Everything that can be known about an overlay without a cluster: python -m k8s.check k8s/overlays/NAME …

kustomize → strict schemas → the inside of strings (Serve config, configuration files, PromQL) → references →
policy. Prints one line a mistake (file, object, field) and exits 1 when there is any. Knows nothing about
what each check knows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from contracts.errors import StillhouseError
from k8s.build import ROOT, build
from k8s.findings import Finding, Object, file_of, name_of
from k8s.policy import check_policy
from k8s.references import check_references, promised_variables
from k8s.rules import check_rules
from k8s.schema import check_schemas
from k8s.serving import check_serving


def check(objects: list[Object], promtool: str | None = None) -> list[Finding]:
    """All findings, each once. Objects that the schemas refuse are not looked into any further."""
    refused = list(check_schemas(objects))
    bad = {(finding.object, finding.file) for finding in refused}
    sound = [item for item in objects if (name_of(item), file_of(item)) not in bad]
    found = refused
    found += [f for f in check_references(objects) if (f.object, f.file) not in bad]
    found += [f for f in check_policy(objects) if (f.object, f.file) not in bad]
    found += check_serving(sound, objects, promised_variables())
    found += check_rules(sound, promtool)
    return list(dict.fromkeys(found))


def overlay_path(given: str) -> Path:
    """A folder, or the name of one in k8s/overlays or k8s."""
    for path in (Path(given), ROOT / given, ROOT / "overlays" / given):
        if (path / "kustomization.yaml").is_file():
            return path
    return Path(given)


def main(argv: list[str] | None = None) -> int:
    """Check each overlay that is named."""
    parser = argparse.ArgumentParser(prog="python -m k8s.check", description=__doc__)
    parser.add_argument("overlay", nargs="+", help="e.g. k8s/overlays/production")
    parser.add_argument("--kubectl", help="path of kubectl; default: the one on PATH")
    parser.add_argument("--promtool", help="path of promtool; default: the one on PATH")
    args = parser.parse_args(argv)
    mistakes = 0
    for name in args.overlay:
        path = overlay_path(name)
        try:
            objects = build(path, args.kubectl)
            findings = check(objects, args.promtool)
        except StillhouseError as err:
            print(f"{path}: {err}", file=sys.stderr)
            mistakes += 1
            continue
        for finding in findings:
            print(f"{path}: {finding}")
        mistakes += len(findings)
        print(f"{path}: {len(objects)} objects, {len(findings)} mistakes", file=sys.stderr)
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
