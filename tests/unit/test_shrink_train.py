"""A train stage that starts from a student cut out of its teacher, and the command that cuts one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from contracts.config import parse_config
from contracts.errors import ConfigError
from distill_jobs import pipeline, train
from distill_jobs.config import DistillConfig
from distill_jobs.progress import Progress
from distill_jobs.shrink.config import ShrinkConfig, SparsifyConfig
from distill_jobs.stage import Result
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.method_config import FakeQuantConfig
from tests.integration.pipeline_world import config_of, write_model
from tests.unit.teacher_world import rows_folder


@dataclass
class Trained:
    """What a trainer hands back."""

    checkpoint_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class World:
    """A teacher, rows, and a trainer that trains nothing but knows where it was told to start."""

    root: Path
    started: list[Path] = field(default_factory=list)

    def run(self, config: TrainConfig) -> Result:
        """The train stage."""

        def trainer(_: Any, __: Path, base: str, out: Path, ___: Any) -> Trained:
            self.started.append(Path(base))
            return Trained(Path(base))

        progress = Progress(self.root / "progress.json")
        progress.begin("train")
        teacher = str(self.root / "teacher")
        return train.run(config, self.root / "rows", teacher, self.root / "at", progress, trainer=trainer)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A teacher of two blocks and sixteen rows."""
    write_model(tmp_path / "teacher", hidden=32, layers=2, seed=0)
    rows_folder(tmp_path / "rows")
    (tmp_path / "at").mkdir()
    return World(tmp_path)


def test_training_starts_from_the_cut_teacher(world: World) -> None:
    """The trainer is given the smaller checkpoint, the manifest says how much is left and that zeros are
    served dense; a resumed stage finds the checkpoint as it was."""
    shrink = ShrinkConfig(layers=1, intermediate=40, sparsify=SparsifyConfig(method="magnitude"), rows=8)
    first = world.run(TrainConfig(shrink=shrink))
    (start,) = world.started
    made = json.loads((start / "config.json").read_text())
    assert (made["num_hidden_layers"], made["intermediate_size"]) == (1, 40)
    assert "served dense" in first.notes["sparsity"]
    assert first.notes["sparsity"].startswith("50.0%")
    assert first.notes["start"].endswith(f"parameters of {world.root / 'teacher'}")
    written = (start / "model.safetensors").stat().st_mtime_ns
    assert world.run(TrainConfig(shrink=shrink)).notes == first.notes
    assert (start / "model.safetensors").stat().st_mtime_ns == written


def test_another_cut_or_grid_is_another_training(world: World) -> None:
    """The stage's key follows the shape and the grid, and the checkpoint that is cut."""
    teacher = str(world.root / "teacher")

    def key(**changes: Any) -> str:
        return json.dumps(train.train_key(TrainConfig(**changes), teacher), sort_keys=True)

    keys = [
        key(),
        key(shrink=ShrinkConfig(layers=1)),
        key(shrink=ShrinkConfig(heads=2)),
        key(fake_quant=FakeQuantConfig()),
        key(fake_quant=FakeQuantConfig(bits=3)),
    ]
    assert len(set(keys)) == len(keys)
    write_model(world.root / "teacher", hidden=32, layers=2, seed=1)
    assert key(shrink=ShrinkConfig(layers=1)) not in keys


def test_a_student_trained_on_a_grid_is_packed_not_quantized_again(world: World) -> None:
    """The quantize stage's key is the grid's alone, and its artifact is packed without calibration rows."""
    data = config_of(world.root)
    data["train"]["fake_quant"] = {"group_size": 32}
    config = parse_config(data, DistillConfig)
    settings = pipeline.settings(config, None, "quantize")  # type: ignore[arg-type]
    assert settings == {"fake_quant": {"bits": 4, "group_size": 32, "symmetric": True}}
    progress = Progress(world.root / "progress.json")
    made = pipeline._quantize(config, world.root / "teacher", {}, world.root / "at", progress)
    assert made.notes["format"] == "qad-w4a16-g32"
    about = json.loads((Path(made.outputs["artifact"].path) / "config.json").read_text())
    assert about["quantization_config"]["format"] == "pack-quantized"


def test_the_command_cuts_and_says_that_zeros_are_no_speed(world: World) -> None:
    """`stillhouse shrink`: help and result say it; a wrong size is one red line naming the field."""
    from typer import Typer

    from distill_jobs.shrink import cli

    app = Typer()
    app.command(epilog=cli.EPILOG)(cli.shrink)
    said = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output.split())
    assert "stored and served dense: the student gets neither smaller nor faster" in said
    base, out = str(world.root / "teacher"), str(world.root / "out")
    rows = ["--rows", str(world.root / "rows"), "--samples", "8"]
    done = CliRunner().invoke(app, [base, out, *rows, "--layers", "1", "--sparsify", "wanda"])
    assert done.exit_code == 0, done.output
    assert "50.0% of the blocks' weights are zero" in done.output
    assert json.loads((world.root / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    failed = CliRunner().invoke(app, [base, str(world.root / "no"), *rows, "--layers", "9"])
    assert failed.exit_code == 1
    assert "shrink.layers: 9 is more" in failed.output
    assert not (world.root / "no").exists()


def test_a_base_that_is_no_checkpoint_is_refused(world: World) -> None:
    """The error comes before anything is read."""
    from distill_jobs.shrink.cli import _build

    with pytest.raises(ConfigError, match="not a checkpoint"):
        _build("./nowhere", {"layers": 1}, world.root / "rows", 64, world.root / "out")


def test_the_guides_configurations_are_taken(world: World) -> None:
    """Every YAML block of docs/guides/pruning.md, laid over a job, is a configuration."""
    text = (Path(__file__).parents[2] / "docs/guides/pruning.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    assert len(blocks) == 4
    for block in blocks:
        data = config_of(world.root)
        for name, value in yaml.safe_load(block).items():
            data[name] = data[name] | value if isinstance(value, dict) else value
        config = parse_config(data, DistillConfig)
        assert config.train.shrink or config.train.fake_quant
