"""What all processes of a host have counted, as Prometheus text: their files, read incrementally.

`MultiProcessCollector` parses every key of every file at every scrape, which for twenty routes takes longer
than a scrape may, and holds the interpreter lock that the router's event loop needs. Keys only ever get
appended, so here each is parsed once; a scrape unpacks numbers and joins lines that are ready. What comes out
is what `generate_latest` says of that collector. Knows nothing about which metrics there are.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client.utils import floatToGoString

_USED: Final = struct.Struct("i")
_ENTRY: Final = struct.Struct("dd")
_HEADER: Final = 8
_PAGE: Final = 4096

Labels = tuple[tuple[str, str], ...]


class _Key(NamedTuple):
    """One series: its sample's name and labels, and the family it belongs to."""

    family: str
    name: str
    labels: Labels


class _File:
    """One process's counts of one type, as far as they are known."""

    def __init__(self, path: Path) -> None:
        parts = path.stem.split("_")
        self.path = path
        self.type = parts[0]
        self.mode = parts[1].removeprefix("live") if self.type == "gauge" else "sum"
        self.pid = int(parts[-1])
        self.used = _HEADER
        self.slots: list[int] = []
        self.places: list[int] = []
        self.values: list[tuple[float, float]] = []
        """(value, when it was set) of every entry."""
        self.frozen = False
        """Its process was dead when it was last read: nothing in it changes any more."""

    def read(self, slot_of: Callable[[_File, bytes], int]) -> None:
        """Take in what the process wrote since; `slot_of` gives the series of a key not seen before."""
        with self.path.open("rb") as file:
            data = file.read(max(_PAGE, self.used))
            used = _USED.unpack_from(data)[0] if len(data) >= _HEADER else _HEADER
            if used > len(data):
                data += file.read(used - len(data))
        at = self.used
        while at < used:
            size = _USED.unpack_from(data, at)[0]
            start = at + _USED.size
            at = start + size + (8 - (size + _USED.size) % 8)  # as MmapedDict pads
            self.slots.append(slot_of(self, data[start : start + size]))
            self.places.append(at)
            at += _ENTRY.size
        self.used = at
        unpack = _ENTRY.unpack_from
        self.values = [unpack(data, place) for place in self.places]


class _Family:
    """A metric's lines in the order in which they are written."""

    def __init__(self, name: str, type_: str, text: str) -> None:
        shown = f"{name}_total" if type_ == "counter" else name
        text = text.replace("\\", r"\\").replace("\n", r"\n")
        self.head = f"# HELP {shown} {text}\n# TYPE {shown} {type_}\n"
        self.plain: list[tuple[str, int]] = []
        """(line up to its value, slot)."""
        self.groups: dict[Labels, list[tuple[float, str, int]]] = {}
        """Histograms: labels but for `le` → (upper edge, line up to its value, slot), sorted by the edge."""
        self.counts: dict[Labels, str] = {}
        self._name = name

    def add(self, key: _Key, histogram: bool, slot: int) -> None:
        """One more series."""
        line = _line(key.name, key.labels)
        edge = dict(key.labels).get("le") if histogram else None
        if edge is None:
            self.plain.append((line, slot))
            return
        labels = tuple(pair for pair in key.labels if pair[0] != "le")
        group = self.groups.setdefault(labels, [])
        group.append((float(edge), line, slot))
        group.sort()
        self.counts[labels] = _line(f"{self._name}_count", labels)

    def write(self, values: list[float | None]) -> Iterable[str]:
        """The lines of the series that have a value."""
        yield self.head
        for line, slot in self.plain:
            value = values[slot]
            if value is not None:
                yield f"{line} {_number(value)}\n"
        for labels, group in self.groups.items():
            known = [(line, value) for _, line, slot in group if (value := values[slot]) is not None]
            sums = list(accumulate(value for _, value in known))
            for (line, _), value in zip(known, sums, strict=True):
                yield f"{line} {_number(value)}\n"
            if sums:
                yield f"{self.counts[labels]} {_number(sums[-1])}\n"


class HostExposition:
    """One process's reader of the folder in which the processes of a host count.

    Args:
        folder: PROMETHEUS_MULTIPROC_DIR.
        alive: whether a process still runs; files of dead ones are not read again.
    """

    def __init__(self, folder: Path, alive: Callable[[int], bool]) -> None:
        self._folder, self._alive = folder, alive
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._files: dict[str, _File] = {}
        self._slots: dict[_Key, int] = {}
        self._families: dict[str, _Family] = {}
        self._parsed: dict[tuple[str, bytes, str], int] = {}
        self._frozen: tuple[str, ...] = ()
        self._base = _Merged([], [])

    def text(self) -> bytes:
        """The exposition; safe to ask for from several threads."""
        with self._lock:
            self._read()
            values = self._merged()
            return "".join(
                part for family in self._families.values() for part in family.write(values)
            ).encode()

    def _read(self) -> None:
        """Bring every file up to date. A file that went takes its series with it, so all begins anew then."""
        found = {path.name: path for path in sorted(self._folder.glob("*.db"))}
        if self._files.keys() - found.keys():
            self._forget()
        for name, path in found.items():
            file = self._files.get(name) or _File(path)
            if (dead := not self._alive(file.pid)) and file.frozen:
                continue
            try:
                file.read(self._slot)
            except FileNotFoundError:  # another process buried it just now; the next scrape forgets it
                self._files.pop(name, None)
                continue
            self._files[name], file.frozen = file, dead

    def _slot(self, file: _File, raw: bytes) -> int:
        """Where the values of a series are summed: one place for all processes, or one each (mode `all`)."""
        pid = str(file.pid) if file.mode == "all" else ""
        known = self._parsed.get((file.type, raw, pid))
        if known is not None:
            return known
        family, name, named, text = json.loads(raw)
        labels = tuple(sorted({**named, **({"pid": pid} if pid else {})}.items()))
        key = _Key(family, name, labels)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self._slots)
            made = self._families.get(family)
            if made is None:
                made = self._families[family] = _Family(family, file.type, text)
            made.add(key, file.type == "histogram", slot)
        self._parsed[file.type, raw, pid] = slot
        return slot

    def _merged(self) -> list[float | None]:
        """Every series over all processes, by slot; None where nobody has a value."""
        frozen = {name: file for name, file in self._files.items() if file.frozen}
        if self._frozen != tuple(frozen):  # processes that died stay as they were: they are added once
            self._frozen, self._base = tuple(frozen), _Merged([], [])
            self._base.take(frozen.values(), len(self._slots))
        merged = _Merged(list(self._base.values), list(self._base.latest))
        merged.take((file for file in self._files.values() if not file.frozen), len(self._slots))
        return merged.values


class _Merged(NamedTuple):
    """Values by slot, and when they were set (mode mostrecent)."""

    values: list[float | None]
    latest: list[float]

    def take(self, files: Iterable[_File], slots: int) -> None:
        """Add some processes' values."""
        self.values.extend([None] * (slots - len(self.values)))
        self.latest.extend([0.0] * (slots - len(self.latest)))
        for file in files:
            if file.mode == "mostrecent":
                _take_latest(file, self.values, self.latest)
                continue
            pick, values = _PICKS[file.mode], self.values
            for slot, (value, _) in zip(file.slots, file.values, strict=True):
                before = values[slot]
                values[slot] = value if before is None else pick(before, value)


def _add(a: float, b: float) -> float:
    return a + b


def _second(_a: float, b: float) -> float:
    return b


_PICKS: Final[dict[str, Callable[[float, float], float]]] = {
    "sum": _add,
    "min": min,
    "max": max,
    "all": _second,
}


def _take_latest(file: _File, merged: list[float | None], latest: list[float]) -> None:
    """Mode mostrecent: whoever set a gauge last; one that nobody ever set has no value."""
    for slot, (value, at) in zip(file.slots, file.values, strict=True):
        if at > latest[slot]:
            merged[slot], latest[slot] = value, at


def _line(name: str, labels: Labels) -> str:
    if not labels:
        return name
    inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels)
    return f"{name}{{{inner}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if 0.0 <= value < 1e6:
        return repr(value)
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
