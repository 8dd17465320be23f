"""The committed dashboards: made by the generator, laid out without overlap, asking for what exists."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from k8s.dashboards import build
from k8s.dashboards.catalogue import metrics, table
from k8s.dashboards.frame import TITLES, Section, dashboard
from k8s.dashboards.panels import Query, number
from tests.k8s.dashboard_queries import FOLDER, choices, dashboards, filled, intervals, panels, targets

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "monitoring.md"
BOUNDED = {
    *(
        "route",
        "arm",
        "upstream",
        "by",
        "outcome",
        "endpoint",
        "code",
        "reason",
        "result",
        "verdict",
        "grader",
        "key",
    ),
    *(
        "phase",
        "metric",
        "test",
        "decision",
        "kind",
        "state",
        "stage",
        "of",
        "resource",
        "per",
        "currency",
        "le",
    ),
}
"""Labels whose values come from configuration, splits, specs, keys or fixed lists, never from clients."""
ENGINE_BOUNDED = {"upstream", "instance", "model_name", "finished_reason", "le"}
"""Of vLLM's series: what the scrape adds, one value a version, a fixed list."""
UIDS = sorted(TITLES)


def vllm_series() -> dict[str, set[str]]:
    """Names of vLLM's series, read from the installed package's source without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    made = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert len(made) > 20
    ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + end: ENGINE_BOUNDED for kind, name in made for end in ends[kind]}


@cache
def known_series() -> dict[str, set[str]]:
    """Series name → the labels that a query may use."""
    own = {s: {*m.labels, *({"le"} if s.endswith("_bucket") else ())} for m in metrics() for s in m.series()}
    process = {
        "process_resident_memory_bytes": ENGINE_BOUNDED
    }  # prometheus_client's, of the engines' servers
    return {**own, **vllm_series(), **process}


@cache
def parsed(expr: str) -> promql_parser.Expr:
    """The expression as Prometheus would read it, Grafana's intervals put in."""
    values = intervals() | {c.name: "x" for c in choices()}
    return promql_parser.parse(filled(expr, values))


def parts(expr: promql_parser.Expr) -> Iterator[Any]:
    """Every node of an expression."""
    found: list[Any] = []
    promql_parser.walk(expr, lambda node: found.append(node))
    yield from found


def labels_asked(expr: promql_parser.Expr) -> set[str]:
    """Labels that an expression groups, joins or includes by."""
    found: set[str] = set()
    for node in parts(expr):
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            found |= set(modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and modifier is not None:
            found |= set(modifier.matching.labels if modifier.matching else ())
    return found


def test_what_is_committed_is_what_the_generator_makes() -> None:
    """A hand-edited or forgotten file would be lost, or stale, at the next build."""
    for name, text in build.files().items():
        assert (FOLDER / name).read_text() == text, f"{name}: run python -m k8s.dashboards.build"


def test_a_stale_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """--check refuses an edited file and one that nobody makes, by name, and a build repairs both."""
    made = build.files()
    monkeypatch.setattr(build, "files", lambda: made)
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    edited = tmp_path / "stillhouse-cost.json"
    edited.write_text(edited.read_text().replace("Cost", "Coast", 1))
    (tmp_path / "stillhouse-old.json").write_text("{}")
    capsys.readouterr()
    assert build.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "stillhouse-cost.json is stale" in said
    assert "stillhouse-old.json is stale" in said
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0


def test_six_dashboards_with_the_uids_that_links_hold_on_to() -> None:
    """uids are what bookmarks, alerts and other dashboards refer to."""
    assert sorted(dashboards()) == UIDS
    for uid, made in dashboards().items():
        assert made["title"] == f"Stillhouse / {TITLES[uid]}"
        assert made["schemaVersion"] >= 42
        assert made["time"]["from"] == "now-1h"
        assert made["refresh"] == "30s"


@pytest.mark.parametrize("uid", UIDS)
def test_panels_fill_whole_lines_and_never_overlap(uid: str) -> None:
    """A panel under another is not seen, and a gap is where one was forgotten: every line is 24 wide."""
    made = dashboards()[uid]
    boxes = [p["gridPos"] for p in made["panels"]]
    for a, b in combinations(boxes, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
    lines: dict[int, int] = {}
    for box in boxes:
        lines[box["y"]] = lines.get(box["y"], 0) + box["w"]
    assert set(lines.values()) == {24}
    ids = [p["id"] for p in made["panels"]]
    assert len(set(ids)) == len(ids)


def test_a_line_that_is_not_24_wide_is_refused() -> None:
    """The layout cannot be wrong by arithmetic: a section says which line is too long or too short."""
    five = tuple(number("x", "x", "short", Query("up", "x"), width=5) for _ in range(5))
    with pytest.raises(ValueError, match="Broken: a line of panels is 25 wide"):
        dashboard("stillhouse-fleet", "-", (), (Section("Broken", five),))
    with pytest.raises(ValueError, match="the last line of panels is 20 wide"):
        dashboard("stillhouse-fleet", "-", (), (Section("Broken", five[:4]),))


@pytest.mark.parametrize("uid", UIDS)
def test_every_panel_says_what_it_is(uid: str) -> None:
    """Title, description, unit, legend and thresholds are on each: no figure that has to be guessed."""
    for panel in panels(dashboards()[uid]):
        assert panel["title"], panel["id"]
        assert len(panel["description"]) > 10, panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert panel["targets"], panel["title"]
        assert all(t["legendFormat"] for t in panel["targets"]), panel["title"]
        refs = [t["refId"] for t in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}


def test_no_query_is_left_out_of_a_panel() -> None:
    """The panel builder names queries by letters; one more than there are letters would vanish silently."""
    assert max(len(p["targets"]) for d in dashboards().values() for p in panels(d)) <= 8


@pytest.mark.parametrize("uid", UIDS)
def test_links_lead_to_dashboards_that_exist(uid: str) -> None:
    """All six link to each other by tag, and data links name a uid and a variable of the dashboard there."""
    made = dashboards()[uid]
    assert made["tags"] == ["stillhouse"]
    assert [(link["type"], link["tags"], link["keepTime"]) for link in made["links"]] == [
        ("dashboards", ["stillhouse"], True)
    ]
    for panel in panels(made):
        for link in panel["fieldConfig"]["defaults"].get("links") or ():
            there = re.match(r"/d/([\w-]+)/\?var-(\w+)=\$\{__field\.labels\.(\w+)\}", link["url"])
            assert there, link["url"]
            names = [v["name"] for v in dashboards()[there[1]]["templating"]["list"]]
            assert there[2] in names
            assert all(there[3] in labels_asked(parsed(t["expr"])) for t in panel["targets"]), panel["title"]


@pytest.mark.parametrize("uid", UIDS)
def test_every_variable_is_used_and_every_used_one_is_there(uid: str) -> None:
    """A choice that changes nothing, and a `$name` that Grafana leaves as it is, are both mistakes."""
    text = json.dumps([dashboards()[uid]["panels"], [c.selector for c in choices() if c.dashboard == uid]])
    used = set(re.findall(r"\$\{?([a-z]\w*)\}?", text)) - {"datasource"}
    assert used - {"__field", "__url_time_range"} == {c.name for c in choices() if c.dashboard == uid}
    kinds = [v["type"] for v in dashboards()[uid]["templating"]["list"]]
    assert kinds.count("datasource") == 1


def test_every_query_asks_for_what_is_exported_by_bounded_labels() -> None:
    """Each expression parses; each metric is one that the code (or the installed vLLM) exports; each matcher
    and grouping is by a label that metric has, and that clients cannot multiply."""
    known = known_series()
    asked = [(t.name, t.expr) for t in targets()]
    asked += [(f"{c.dashboard} / variable {c.name}", c.selector) for c in choices()]
    assert len(asked) > 120
    for name, expr in asked:
        tree = parsed(expr)
        selectors = [node for node in parts(tree) if isinstance(node, promql_parser.VectorSelector)]
        assert selectors, name
        have: set[str] = set()
        for selector in selectors:
            assert selector.name in known, f"{name}: nobody exports {selector.name}"
            matched = {m.name for m in selector.matchers.matchers}
            assert matched <= known[selector.name], f"{name}: {selector.name} has no {matched}"
            have |= known[selector.name]
        assert labels_asked(tree) <= have, name
    labels = {label for c in choices() for label in [c.label]}
    assert labels <= BOUNDED | ENGINE_BOUNDED


def test_labels_of_our_metrics_are_bounded() -> None:
    """A new label must be looked at: a user's or a request's would grow without end."""
    assert {label for m in metrics() for label in m.labels} <= BOUNDED


def test_legends_name_labels_that_the_query_keeps() -> None:
    """`{{label}}` of a label that was summed away is drawn as nothing."""
    for target in (t for d in dashboards().values() for p in panels(d) for t in p["targets"]):
        tree = parsed(target["expr"])
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels_asked(tree), target["expr"]


def test_kustomize_makes_one_configmap_each(tmp_path: Path) -> None:
    """The sidecar finds them by label, each holds one dashboard with its own name, far below 1 MiB."""
    from tests.tools import debian_binary

    overlay = tmp_path / "overlay"
    overlay.mkdir()
    component = tmp_path / "dashboards"
    component.mkdir()
    for file in [*FOLDER.glob("*.json"), FOLDER / "kustomization.yaml"]:
        (component / file.name).write_text(file.read_text())
    (overlay / "kustomization.yaml").write_text("components: [../dashboards]\nnamespace: stillhouse\n")
    kubectl = debian_binary("kubectl", "kubectl")
    done = subprocess.run(
        [str(kubectl), "kustomize", str(overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    maps = list(yaml.safe_load_all(done.stdout))
    assert [(m["kind"], m["metadata"]["name"]) for m in maps] == [("ConfigMap", f"grafana-{u}") for u in UIDS]
    for made in maps:
        assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert made["metadata"]["namespace"] == "stillhouse"
        ((name, text),) = made["data"].items()
        assert json.loads(text)["uid"] == name.removesuffix(".json")
        assert len(text.encode()) < 2**18


def test_the_guides_table_is_what_the_code_exports() -> None:
    """Names, types, labels and meanings of docs/guides/monitoring.md are the code's."""
    shown = re.search(r"<!-- metrics -->\n(.*?)<!-- /metrics -->", GUIDE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == table().strip(), "run python -m k8s.dashboards.build"


def test_the_guides_configurations_are_real() -> None:
    """Every YAML block of the guide is read, and the provisioning files name the folder that is there."""
    blocks = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)]
    assert len(blocks) >= 3
    scrape = next(b for b in blocks if "scrape_configs" in b)
    assert {job["job_name"] for job in scrape["scrape_configs"]} == {"stillhouse", "engines", "flywheel"}
    provider = next(b for b in blocks if "providers" in b)["providers"][0]
    assert provider["options"]["path"].endswith("k8s/dashboards")
    assert (ROOT / "k8s" / "dashboards").is_dir()
