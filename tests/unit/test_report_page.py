"""The report as a page and as Markdown: well-formed, self-contained, safe, and saying what the JSON says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from contracts.rollout import Phase
from contracts.traffic import Arm
from serve.rollout.report import figures, words
from serve.rollout.report.gather import Sources, gather
from serve.rollout.report.markdown import markdown
from serve.rollout.report.model import Report
from serve.rollout.report.page import page, spread
from tests.unit import report_log
from tests.unit.rollout_world import BROKEN, World

HOSTILE = "</p></article><script>alert('x')</script> & <img src=x onerror=alert(1)> ```` | # \u202e`"
_VOID = frozenset(("meta", "br"))


class Reader(HTMLParser):
    """Reads a page as a browser would, and notes what it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def made(world: World, folder: Path | None = None) -> Report:
    """The report of a world's rollout now."""
    return gather(world.rollouts, world.spec.id, Sources(folder), now=world.now)


@pytest.fixture
def harmful(tmp_path: Path) -> Report:
    """A student that was thrown back, with hostile texts in its log."""
    world = World(tmp_path, canary=BROKEN)
    world.until()
    rows = [
        report_log.row(1, world.spec.id, Arm.CANARY, asked=HOSTILE, said=HOSTILE, grade=False, error=HOSTILE),
        report_log.row(2, world.spec.id, Arm.STABLE, asked=HOSTILE, said="fine " + HOSTILE, grade=True),
    ]
    return made(world, report_log.write(tmp_path / "requests", rows))


def test_the_page_is_well_formed_and_needs_nothing_else(harmful: Report) -> None:
    """Every element is closed, every figure is named; no script, and nothing that is fetched."""
    text = page(harmful)
    reader = Reader(text)
    assert reader.open == []
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    assert [a for _, attrs in reader.tags for a in attrs if a in ("src", "href") or a.startswith("on")] == []
    assert "url(http" not in text
    assert not re.search(r"(?<!alert)\bhttps?://", text)
    figures_found = [attrs for tag, attrs in reader.tags if tag == "svg"]
    assert len(figures_found) >= 5
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in figures_found:
        assert attrs["role"] == "img"
        assert set((attrs["aria-labelledby"] or "").split()) <= set(ids)


def test_headings_rise_by_one(harmful: Report) -> None:
    """A screen reader's outline: one h1, nothing skipped."""
    levels = [int(tag[1]) for tag, _ in Reader(page(harmful)).tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 or (a, b) == (2, 4) for a, b in pairwise(levels))


def test_figures_are_xml_with_title_and_description(harmful: Report) -> None:
    """Each svg can be taken out and used alone, and tells its figures in words."""
    for harm in (True, False):
        root = ET.fromstring(figures.evidence(harmful, harm))
        title, about = (root.find(t) for t in ("title", "desc"))
        assert title is not None
        assert about is not None
        assert "quality" in (about.text or "")


def test_strangers_texts_stay_texts(harmful: Report) -> None:
    """Markup in prompts, answers and errors is shown, not obeyed: in the page and in the Markdown."""
    text = page(harmful)
    assert "<script>" not in text
    assert "<img" not in text
    assert HOSTILE.split(" ")[0] in Reader(text).said
    written = markdown(harmful)
    fences = re.findall(r"^(`{3,})text\n(.*?)\n\1$", written, flags=re.S | re.M)
    assert len(fences) == 3  # asked, and both answers
    assert all(mark == "`" * 5 for mark, _ in fences)
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", written, flags=re.S | re.M)
    assert "<script>" not in outside


def test_page_and_markdown_say_the_figures_of_the_json(harmful: Report) -> None:
    """One set of facts, three forms; the JSON comes back as the same report."""
    said, written = Reader(page(harmful)).said, markdown(harmful)
    assert harmful.sentence in said
    assert Report.model_validate_json(harmful.model_dump_json()) == harmful
    for metric in harmful.metrics:
        e_value = words.e_value(metric.log_harm)
        assert f"{e_value} of {words.limit(metric.log_harm_at)}" in said
        assert f"{e_value} of {words.limit(metric.log_harm_at)}" in written
        for c in metric.comparisons:
            assert f"{c.canary.bad} of {c.canary.n}" in said
            assert f"{c.canary.bad} of {c.canary.n}" in written
    assert harmful.audit.digest in said
    assert harmful.audit.digest in written


def test_the_evidence_is_drawn_where_its_values_are(harmful: Report) -> None:
    """The quality line crosses its threshold at the last look: its last point is above the dashed rule."""
    root = ET.fromstring(figures.evidence(harmful, harm=True))
    quality = next(i for i, t in enumerate(harmful.series.tests, start=1) if t.metric == "quality")
    path = next(e for e in root.iter("path") if e.get("class") == f"line m{quality}")
    rule = next(e for e in root.iter("line") if e.get("class") == "limit")
    last = float((path.get("d") or "").split(" ")[-1])
    first = float(re.findall(r"[\d.]+", path.get("d") or "")[1])
    assert last < float(rule.get("y1") or 0) < first
    assert len(re.findall("[ML]", path.get("d") or "")) == len(harmful.series.seconds)


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.WARMING, Phase.RAMPING])
def test_a_page_at_any_moment(tmp_path: Path, phase: Phase) -> None:
    """No looks, no data, no log: still a whole page and whole Markdown."""
    world = World(tmp_path)
    if phase is not Phase.PENDING:
        world.until(phase)
    report = made(world)
    assert Reader(page(report)).open == []
    assert f"undecided, {phase.value}" in markdown(report)


def test_one_arm_only(tmp_path: Path) -> None:
    """A canary that never got a request: shares without data are said, not divided."""
    world = World(tmp_path, per_s=0.0)
    world.until(Phase.RAMPING)
    for _ in range(8):
        world.step()
    report = made(world)
    said = Reader(page(report)).said
    assert "no data" in said
    assert "nan" not in page(report).lower().replace("nance", "")
    assert "no data" in markdown(report)


def test_long_rollouts_give_short_tables() -> None:
    """At most so many rows, the first and the last look among them."""
    assert spread(3, 16) == [0, 1, 2]
    chosen = spread(1440, 16)
    assert len(chosen) == 16
    assert (chosen[0], chosen[-1]) == (0, 1439)
