"""The rules that go to the cluster, by promtool: every alert and every recording rule does what it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.errors import ConfigError
from k8s.monitoring.local import write
from k8s.monitoring.rules import FOLDER, read_groups, rule_files, scale, scale_duration, write_rules
from serve.config import load_serve_config
from tests.tools import debian_binary

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).parent / "rules"
SEVERITIES = {"critical", "warning", "info"}
_COMMAND = re.compile(r"(?:^|`)stillhouse ((?:[a-z]+ ?){1,2})", re.M)


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Prometheus' own checker."""
    return debian_binary("prometheus", "promtool")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every PrometheusRule as a rule file of its own."""
    made = tmp_path_factory.mktemp("rules")
    for name, groups in rule_files().items():
        write_rules(made / name, groups)
    return made


def run(promtool: Path, folder: Path, *arguments: str) -> str:
    """What promtool says; fails with it."""
    done = subprocess.run(
        [str(promtool), *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """Name → rule, of one kind: alert or record."""
    return {r[kind]: r for group in read_groups() for r in group["rules"] if kind in r}


def read_tests(cases: Iterable[Path]) -> list[dict[str, Any]]:
    """The tests of promtool's files."""
    return [test for file in cases for test in yaml.safe_load(file.read_text())["tests"]]


def firing_and_silent(tests: Iterable[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Alerts that a test makes fire, and alerts that a test of their own keeps silent throughout."""
    firing, silent = set(), set()
    for test in tests:
        checks = test.get("alert_rule_test", [])
        fired = {c["alertname"] for c in checks if c.get("exp_alerts")}
        firing |= fired
        silent |= {c["alertname"] for c in checks} - fired
    return firing, silent


def test_prometheus_reads_every_rule(promtool: Path, folder: Path) -> None:
    """A typo in PromQL is found here and not by an operator that silently leaves the object out."""
    said = run(promtool, folder, "check", "rules", *sorted(f.name for f in folder.glob("*.yaml")))
    assert said.count("SUCCESS") == len(rule_files())


@pytest.mark.parametrize("case", sorted(CASES.glob("*.yaml")), ids=lambda f: f.stem)
def test_rules_do_what_they_say(promtool: Path, folder: Path, case: Path) -> None:
    """Alerts fire with these labels and these words, after their time and not before, and not below their
    bar; recording rules have these values."""
    (folder / f"case-{case.name}").write_text(case.read_text())
    assert "SUCCESS" in run(promtool, folder, "test", "rules", f"case-{case.name}")


def test_no_alert_without_both_of_its_tests() -> None:
    """One in which it fires, and one in which it must not."""
    firing, silent = firing_and_silent(read_tests(CASES.glob("*.yaml")))
    assert set(rules("alert")) == firing == silent


def test_no_recording_rule_without_a_test() -> None:
    """Each name is asked for its value, with samples."""
    checks = [c for t in read_tests(CASES.glob("*.yaml")) for c in t.get("promql_expr_test", ())]
    asked = {c["expr"].partition("{")[0] for c in checks if c["exp_samples"]}
    assert set(rules("record")) == asked


def test_the_meta_test_sees_what_is_missing() -> None:
    """An alert that only fires, or only keeps silent, is not tested."""
    fires = {"alert_rule_test": [{"alertname": "A", "exp_alerts": [{"exp_labels": {}}]}]}
    still = {"alert_rule_test": [{"alertname": "B", "exp_alerts": []}]}
    assert firing_and_silent([fires, still]) == ({"A"}, {"B"})
    both = {"alert_rule_test": [*fires["alert_rule_test"], {"alertname": "A", "exp_alerts": []}]}
    assert firing_and_silent([both]) == ({"A"}, set())


@pytest.mark.parametrize("name", sorted(rules("alert")))
def test_every_alert_says_what_to_do(name: str) -> None:
    """Severity, one line, a paragraph with the value, and a runbook with the three sections."""
    rule = rules("alert")[name]
    severity = set(re.findall(r"[a-z]+", re.sub(r"\{\{.*?\}\}", " ", rule["labels"]["severity"])))
    assert severity
    assert severity <= SEVERITIES
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"docs/runbooks/{name}.md"
    page = (ROOT / notes["runbook_url"]).read_text()
    assert page.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", page, re.M) == ["What it means", "How to look", "What to do"]


def test_runbooks_are_of_alerts_that_exist() -> None:
    """A renamed alert does not leave its page behind, and the list names every page."""
    pages = {f.stem for f in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README"}
    assert pages == set(rules("alert"))
    listed = set(re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs" / "runbooks" / "README.md").read_text()))
    assert listed == pages


def test_runbooks_name_commands_that_exist() -> None:
    """What somebody types at three in the morning is there."""
    from typer.main import get_command

    from cli.main import app

    asked = {
        words.strip()
        for page in (ROOT / "docs" / "runbooks").glob("*.md")
        for words in _COMMAND.findall(page.read_text())
    }
    assert len(asked) > 10
    root = get_command(app)
    assert [words for words in sorted(asked) if not exists(root, words.split())] == []
    assert not exists(root, ["rollout", "forward"])


def exists(command: Any, words: list[str]) -> bool:
    """Whether a command has these subcommands; words after the last subcommand are arguments."""
    for word in words:
        if not hasattr(command, "resolve_command"):
            return True
        with command.make_context("stillhouse", [], resilient_parsing=True) as context:
            command = command.resolve_command(context, [word])[1]
        if command is None:
            return False
    return True


def test_the_component_lists_every_rule_file() -> None:
    """A rule that kustomize does not see is never in force."""
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert set(rule_files()) <= set(listed)
    assert sorted(listed) == sorted(f.name for f in FOLDER.glob("*.yaml") if f.name != "kustomization.yaml")


@pytest.mark.parametrize(
    ("text", "factor", "scaled"),
    [("5m", 60, "5s"), ("1h30m", 60, "90s"), ("3d", 60, "4320s"), ("30s", 60, "1s"), ("1m", 8, "7500ms"),
     ("0s", 60, "0s"), ("1m", 1, "60s")],
)  # fmt: skip
def test_durations_scale(text: str, factor: float, scaled: str) -> None:
    """Exactly, in milliseconds, and never below a second."""
    assert scale_duration(text, factor) == scaled


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "-5m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """A scaled rule that silently kept its hour would never fire in a test."""
    with pytest.raises(ValueError, match="is not a duration"):
        scale_duration(text, 60)


def test_scaling_changes_times_and_nothing_else() -> None:
    """Windows, subqueries, offsets, `for` and intervals; not what stands in quotes, nor numbers and names."""
    rule = {
        "alert": "A",
        "expr": 'rate(a:b:rate5m{x="[5m] offset 1h"}[5m:1m] offset 1h) > 300 and (b offset 1h)',
        "for": "4h",
    }
    (group,) = scale([{"name": "g", "interval": "30s", "rules": [rule]}], 60)
    assert group == {
        "name": "g",
        "interval": "1s",
        "rules": [
            {
                "alert": "A",
                "expr": 'rate(a:b:rate5m{x="[5m] offset 1h"}[5s:1s] offset 60s) > 300 and (b offset 60s)',
                "for": "240s",
            }
        ],
    }


def test_scaled_rules_are_rules(promtool: Path, tmp_path: Path) -> None:
    """All of them, as the end-to-end test uses them."""
    write_rules(tmp_path / "scaled.yaml", scale(read_groups(), 60))
    assert "SUCCESS" in run(promtool, tmp_path, "check", "rules", "scaled.yaml")


def test_a_local_prometheus_takes_the_same_rules(promtool: Path, tmp_path: Path) -> None:
    """`python -m k8s.monitoring.local` writes files that Prometheus starts with."""
    config = load_serve_config(ROOT / "configs" / "stillhouse.yaml")
    written = write(config, tmp_path / "prometheus", "127.0.0.1:9093")
    assert "SUCCESS" in run(promtool, tmp_path, "check", "config", str(written))
    jobs = {job["job_name"]: job for job in yaml.safe_load(written.read_text())["scrape_configs"]}
    address = f"{config.http.host}:{config.http.port}"
    assert jobs["stillhouse-routers"]["static_configs"] == [{"targets": [address]}]
    assert jobs["stillhouse-engines"]["http_sd_configs"][0]["url"] == f"http://{address}/targets"


def test_a_local_prometheus_brings_a_key_where_routers_ask_for_one(promtool: Path, tmp_path: Path) -> None:
    """Without one no engine would ever be found: that is said before Prometheus starts."""
    config = load_serve_config(ROOT / "configs" / "stillhouse.yaml")
    keyed = config.model_copy(update={"router": config.router.model_copy(update={"keys": True})})
    with pytest.raises(ConfigError, match=r"--key-file: .*stillhouse keys create prometheus --no-routes"):
        write(keyed, tmp_path / "without")
    assert not (tmp_path / "without").exists()
    key = tmp_path / "key"
    key.write_text("sk-sh-test")
    written = write(keyed, tmp_path / "with", key_file=key)
    assert "SUCCESS" in run(promtool, tmp_path, "check", "config", str(written))
    (engines,) = [c for c in yaml.safe_load(written.read_text())["scrape_configs"] if "http_sd_configs" in c]
    assert engines["http_sd_configs"][0]["authorization"] == {"credentials_file": str(key)}
