"""Software bill of materials: CycloneDX 1.6 of everything in the lock files.

Usage: .venv/bin/python requirements/sbom.py [--check]

Writes docs/sbom.cdx.json; --check exits with 1 when it is not what the lock files say. Licences come from the
installed packages' metadata, so a package that is not installed here (the compress environment's) has none.
The lock files hold no hashes, so neither does the bill. Knows nothing about what the packages are for.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOCKS = {"main": HERE / "main.txt", "compress": HERE / "compress.txt"}
OUT = HERE.parent / "docs" / "sbom.cdx.json"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
_LONGEST = 100
"""Some packages put the whole licence into the field for its name."""


def pins(lock: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of every line of a lock file that pins a package; names as in package URLs."""
    for name, version in _PIN.findall(lock.read_text(encoding="utf-8")):
        yield re.sub(r"[-_.]+", "-", name).lower(), version


def licence(name: str, version: str) -> str | None:
    """What the installed package says of its licence, when that very version is installed."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return None
    if found["Version"].removeprefix("v").partition("+")[0] != version.removeprefix("v").partition("+")[0]:
        return None
    if expression := found.get("License-Expression"):
        return expression
    named = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier", []) if c.startswith("License ::")]
    if named:
        return " AND ".join(named)
    text = (found.get("License") or "").strip()
    return text if text and len(text) <= _LONGEST and "\n" not in text else None


def bill(known: dict[str, str | None] | None = None) -> dict[str, Any]:
    """The document. It is the same for the same lock files: no time, an id made of what is in it.

    Args:
        known: licences by package URL, instead of looking at what is installed.
    """
    environments: dict[tuple[str, str], list[str]] = {}
    for environment, lock in LOCKS.items():
        for pin in pins(lock):
            environments.setdefault(pin, []).append(environment)
    components = [_component(*pin, found, known) for pin, found in sorted(environments.items())]
    identity = json.dumps([(c["purl"], c["properties"]) for c in components])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}",
        "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": "stillhouse", "name": "stillhouse"}},
        "components": components,
    }


def _component(
    name: str, version: str, environments: list[str], known: dict[str, str | None] | None
) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    said = licence(name, version) if known is None else known.get(purl)
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        **({"licenses": [{"license": {"name": said}}]} if said else {}),
        "properties": [{"name": "stillhouse:environment", "value": e} for e in environments],
    }


def licences_of(document: dict[str, Any]) -> dict[str, str | None]:
    """Licences that a bill states, by package URL: what another machine may lack."""
    return {c["purl"]: c["licenses"][0]["license"]["name"] for c in document["components"] if "licenses" in c}


def main(arguments: list[str]) -> int:
    """Write the bill, or compare. Returns the exit status."""
    if arguments == ["--check"]:
        there = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {"components": []}
        if bill(licences_of(there)) == there:
            return 0
        print(
            f"{OUT.name} is not what the lock files say: run 'python requirements/sbom.py'.", file=sys.stderr
        )
        return 1
    OUT.write_text(json.dumps(bill(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{OUT}: {len(bill()['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
