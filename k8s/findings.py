"""What a check has to say: which overlay and file, which object, which field, and what is wrong with it.

Knows nothing about what is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Object = dict[str, Any]
_ORIGIN = "config.kubernetes.io/origin"


class Finding(NamedTuple):
    """One mistake."""

    file: str
    """Where the object comes from, seen from the overlay's folder."""
    object: str
    """Kind/name."""
    field: str
    """Path of the field; '' means the whole object."""
    says: str

    def __str__(self) -> str:
        where = f" {self.field}" if self.field else ""
        return f"{self.file}: {self.object}{where}: {self.says}"


class Found(NamedTuple):
    """A finding before it is known whose it is."""

    field: str
    says: str


def name_of(item: Object) -> str:
    """Kind/name of an object."""
    return f"{item.get('kind', '?')}/{item.get('metadata', {}).get('name', '?')}"


def file_of(item: Object) -> str:
    """The file that kustomize read the object from, or the one that generates it."""
    lines = str((item.get("metadata", {}).get("annotations") or {}).get(_ORIGIN, "")).splitlines()
    facts = dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    return facts.get("path") or facts.get("configuredIn") or "kustomization.yaml"


def of(item: Object, found: Iterable[Found]) -> Iterator[Finding]:
    """These findings, with the object and its file."""
    for one in found:
        yield Finding(file_of(item), name_of(item), one.field, one.says)


def path_of(parts: Iterable[str | int]) -> str:
    """`spec.containers[0].image` of its parts; keys with dots are put into brackets."""
    out = ""
    for part in parts:
        if isinstance(part, int) or (("." in part or "/" in part) and out):
            out += f"[{part}]"
        else:
            out += f".{part}" if out else part
    return out
