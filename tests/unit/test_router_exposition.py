"""The host's exposition says what prometheus_client's own collector says, whatever has changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from serve.router.exposition import HostExposition

EDGES = ("0.1", "1.0", "+Inf")
MODES = (
    "livesum",
    "livemin",
    "livemax",
    "livemostrecent",
    "sum",
    "min",
    "max",
    "mostrecent",
    "all",
    "liveall",
)
NAMES = ("support", 'quo"te', "back\\slash", "line\nbreak", "学生", "")


class Host:
    """Files as processes write them, and both readings of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dead: set[int] = set()
        self.ours = HostExposition(folder, lambda pid: pid not in self.dead)
        self._open: dict[str, MmapedDict] = {}

    def write(
        self, file: str, metric: str, name: str, labels: dict[str, str], value: float, at: float = 0.0
    ) -> None:
        """Set one value of one process."""
        if file not in self._open:
            self._open[file] = MmapedDict(str(self.folder / f"{file}.db"))
        key = mmap_key(metric, name, list(labels), list(labels.values()), f"About {metric} \\ \n.")
        self._open[file].write_value(key, value, at)

    def bury(self, pid: int) -> None:
        """The process ended, and its live gauges went."""
        self.dead.add(pid)
        for path in self.folder.glob(f"gauge_live*_{pid}.db"):
            self._open.pop(path.stem).close()
            path.unlink()

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def assert_same(self) -> None:
        """Both readings hold the same series, values, types and help."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(self.folder))
        assert _read(self.ours.text()) == _read(generate_latest(registry))


def _read(text: bytes) -> dict[str, tuple[str, str, dict[tuple[str, frozenset[tuple[str, str]]], float]]]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        samples = {(s.name, frozenset(s.labels.items())): s.value for s in family.samples}
        assert len(samples) == len(family.samples), f"{family.name}: a series twice"
        found[family.name] = (family.type, family.documentation, samples)
    return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.close()


def _count(host: Host, rng: random.Random, pid: int) -> None:
    """A process counts something of every kind."""
    route = rng.choice(NAMES)
    labels = {"route": route, "arm": rng.choice(("stable", "canary"))}
    host.write(f"counter_{pid}", "c", "c_total", labels, rng.choice((0.0, 1.0, 2.5, 1e6, 3e17, 1e-7)))
    for edge in rng.sample(EDGES, len(EDGES)):
        host.write(f"histogram_{pid}", "h", "h_bucket", {**labels, "le": edge}, float(rng.randrange(5)))
    host.write(f"histogram_{pid}", "h", "h_sum", labels, rng.random())
    for mode in MODES:
        at = rng.choice((0.0, rng.uniform(1, 9)))
        host.write(f"gauge_{mode}_{pid}", f"g_{mode}", f"g_{mode}", {"route": route}, rng.uniform(-5, 5), at)


@pytest.mark.parametrize("seed", range(5))
def test_it_says_what_the_library_says(host: Host, seed: int) -> None:
    """Counters, histograms and gauges of every mode, over processes that come, count and die, after each."""
    rng = random.Random(seed)
    for round_ in range(12):
        alive = [pid for pid in range(1, 5) if pid not in host.dead]
        _count(host, rng, rng.choice(alive))
        if round_ in (5, 8):
            host.bury(alive[0])
        host.assert_same()


def test_an_empty_folder_is_an_empty_exposition(host: Host) -> None:
    """A router that has counted nothing yet answers its scrape."""
    assert host.ours.text() == b""


def test_a_dead_process_counts_on_and_its_file_is_not_read_again(host: Host) -> None:
    """Counters never go back when a process dies; a file nobody writes costs no reading."""
    host.write("counter_1", "c", "c_total", {}, 3.0)
    host.write("counter_2", "c", "c_total", {}, 4.0)
    host.bury(1)
    assert b"c_total 7.0\n" in host.ours.text()
    host.write("counter_1", "c", "c_total", {}, 100.0)  # nobody does: a dead process writes nothing
    host.write("counter_2", "c", "c_total", {}, 5.0)
    assert b"c_total 8.0\n" in host.ours.text()
    host.dead.clear()  # its number was given to a new process, which goes on in the same file
    assert b"c_total 105.0\n" in host.ours.text()


def test_a_file_that_grows_beyond_a_page_is_read_whole(host: Host) -> None:
    """Keys that were appended after the first look are found, wherever the page ends."""
    for n in range(200):
        host.write("counter_1", "c", "c_total", {"route": f"r{n}"}, float(n))
        if n % 37 == 0:
            host.assert_same()
    host.assert_same()
    assert b'c_total{route="r199"} 199.0\n' in host.ours.text()
