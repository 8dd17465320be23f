"""`stillhouse distill` at the terminal: help, overrides, errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from contracts.config import load_config
from contracts.errors import ConfigError, GateError
from distill_jobs import cli
from distill_jobs.config import DistillConfig
from tests.integration.pipeline_world import config_of

ROOT = Path(__file__).resolve().parents[2]
APP = typer.Typer()
APP.command(epilog=cli.EPILOG)(cli.distill)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file."""
    file = tmp_path / "distill.yaml"
    file.write_text(json.dumps(config_of(tmp_path)))
    return file


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("distill-*.yaml")), ids=lambda f: f.name)
def test_every_configuration_here_is_valid(file: Path) -> None:
    """A stale key in a shipped file would break a user's first command."""
    config = load_config(file, DistillConfig)
    assert config.gates, "a shipped configuration must gate what it publishes"


def test_importing_the_command_loads_nothing_heavy() -> None:
    """--help and the configuration answer at once: no torch, ray, vllm, transformers, mlflow or pyarrow."""
    code = (
        "import sys, distill_jobs.cli, distill_jobs.config\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'mlflow', 'pyarrow', 'datasketch')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_overrides_are_yaml_and_win_over_the_file(config: Path) -> None:
    """Numbers, lists and nulls arrive as such; --workdir wins over both."""
    read = cli.read_config(
        config, ["train.epochs=2", "collect.upstreams=[a, b]", "publish.alias=null"], Path("w")
    )
    assert read.train.epochs == 2
    assert read.collect.upstreams == ("a", "b")
    assert read.publish.alias is None
    assert read.workdir == Path("w")
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        cli.read_config(config, ["train.epochs"], None)
    with pytest.raises(ConfigError, match=r"train\.epoch"):
        cli.read_config(config, ["train.epoch=2"], None)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (GateError("too bad"), 3, "GateError: too bad"),
        (ConfigError("wrong"), 1, "ConfigError: wrong"),
        (KeyboardInterrupt(), 130, "Run the same command again"),
    ],
)
def test_exit_codes(
    config: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    """A scheduler tells a refused student from a broken job from a stopped one; nobody sees a traceback."""

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    result = CliRunner().invoke(APP, [str(config)])
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_help_teaches_resuming() -> None:
    """The help says what the stages are, and that killing a job is harmless."""
    text = " ".join(CliRunner().invoke(APP, ["--help"], terminal_width=200).stdout.split())
    assert "collect -> teach -> train -> quantize -> evaluate -> gate -> publish" in text
    assert "same command again" in text
