"""Rows of one route, read back from segments that may still be written to.

Knows nothing about what they are for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from contracts.traffic import RequestRow


def newest_first(folder: Path) -> list[Path]:
    """Segments of requests, the open ones among them, the latest first."""
    return sorted(folder.glob("requests-*.jsonl"), reverse=True)


def rows_of_route(segment: Path, route: str) -> Iterator[RequestRow]:
    """A segment's rows of a route, in their order; a line that is no row is left out."""
    mark = json.dumps(route).encode()
    try:
        lines = segment.read_bytes().splitlines()
    except FileNotFoundError:  # closed (renamed) or expired since it was listed
        return
    for line in lines:
        if mark not in line:
            continue
        try:
            row = RequestRow.model_validate_json(line)
        except ValidationError:
            continue  # the last line of an open segment may be half written
        if row.route == route:
            yield row
