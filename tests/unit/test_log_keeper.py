"""Final segments on their way out: uploaded whole, repeated after any failure, deleted in time."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from contracts.errors import ConfigError
from serve.request_log import Keeper
from serve.request_log.locks import KEEPER, FolderLock
from serve.request_log.remote import Remote
from serve.request_log.segments import final_segments
from serve.router.config import RequestLogConfig


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    """An empty remote folder: one with files, one with objects."""
    name = uuid.uuid4().hex
    yield Remote(f"file://{tmp_path}/far/{name}" if request.param == "file" else f"memory://{name}/log")
    fsspec.filesystem("memory").store.clear()


def segment(folder: Path, days_ago: float = 0.0, prefix: str = "requests", data: bytes = b"{}\n") -> Path:
    folder.mkdir(exist_ok=True)
    stamp = datetime.fromtimestamp(time.time() - days_ago * 86400, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    path = folder / f"{prefix}-{stamp}-h-1-ab.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("keep_local", [True, False])
def test_final_segments_are_uploaded_and_only_they(tmp_path: Path, remote: Remote, keep_local: bool) -> None:
    """Rows and feedback go, open segments and strangers' files do not; local ones stay as configured."""
    folder = tmp_path / "log"
    sent = [segment(folder, 2, data=b"1\n"), segment(folder, 1, "feedback", b"2\n")]
    for name in ("requests-x.jsonl", "notes.jsonl", sent[0].name.replace(".jsonl", ".open.jsonl")):
        (folder / name).write_bytes(b"not yours\n")
    results: list[bool] = []
    keeper = Keeper(folder, remote, keep_local, uploaded=results.append)
    assert keeper.tick()
    assert {name: remote.read(name) for name in remote.names()} == {
        sent[0].name: b"1\n",
        sent[1].name: b"2\n",
    }
    assert final_segments(folder) == (sorted(sent) if keep_local else [])
    assert len(list(folder.glob("*.jsonl"))) == (5 if keep_local else 3)
    keeper.tick()
    (folder / "new").touch()
    keeper.tick()
    assert results == [True, True]  # nothing is sent twice


def test_a_new_process_does_not_send_everything_again(tmp_path: Path, remote: Remote) -> None:
    """What was uploaded is remembered beside the segments, and a rewritten one is sent again."""
    folder = tmp_path / "log"
    path = segment(folder, data=b"1\n22\n")
    results: list[bool] = []
    for expected in (1, 1):
        keeper = Keeper(folder, remote, uploaded=results.append)
        keeper.tick()
        keeper._lock.give_back()
        assert len(results) == expected
    path.write_bytes(b"1\n")
    Keeper(folder, remote, uploaded=results.append).tick()
    assert (len(results), remote.read(path.name)) == (2, b"1\n")


def test_a_failing_upload_keeps_the_segment_and_is_tried_again(tmp_path: Path, remote: Remote) -> None:
    """Nothing is removed before it is safely there, a pause lies between tries, and all arrive in the end."""
    folder = tmp_path / "log"
    paths = [segment(folder, 2), segment(folder, 1)]
    real, failures = remote.write, [OSError("no route"), RuntimeError("odd store")]

    def flaky(name: str, data: bytes) -> None:
        if failures:
            raise failures.pop(0)
        real(name, data)

    remote.write = flaky  # type: ignore[method-assign]
    results: list[bool] = []
    keeper = Keeper(folder, remote, keep_local=False, uploaded=results.append)
    keeper.tick()
    keeper.tick()  # within the pause: not tried
    assert (results, final_segments(folder)) == ([False], sorted(paths))
    for _ in range(2):
        keeper._retry_at = 0.0
        keeper.tick()
    assert results == [False, False, True, True]
    assert (final_segments(folder), len(remote.names())) == ([], 2)


def test_a_process_killed_in_the_middle_of_an_upload_costs_nothing(tmp_path: Path) -> None:
    """The half-sent file is nobody's segment, and the next process sends the whole one over it."""
    folder, far = tmp_path / "log", tmp_path / "far"
    path = segment(folder, data=b"whole\n")
    far.mkdir()
    (far / f".{path.name}.part").write_bytes(b"wh")
    remote = Remote(f"file://{far}")
    assert remote.names() == []
    Keeper(folder, remote, keep_local=False).tick()
    assert [f.name for f in far.iterdir()] == [path.name]
    assert remote.read(path.name) == b"whole\n"


def test_stopping_sends_the_last_segment(tmp_path: Path, remote: Remote) -> None:
    """A router that leaves hands its last rows over, even right after a failure."""
    folder = tmp_path / "log"
    folder.mkdir()
    keeper = Keeper(folder, remote)
    keeper._retry_at = time.monotonic() + 3600
    keeper.start()
    path = segment(folder)
    assert keeper.close(30)
    assert remote.names() == [path.name]
    assert FolderLock(folder, KEEPER).take()


def test_one_process_works_and_the_next_takes_over(tmp_path: Path, remote: Remote) -> None:
    """Two routers on one folder do not send everything twice; when the first dies the second goes on."""
    folder = tmp_path / "log"
    segment(folder)
    first, second = Keeper(folder, remote), Keeper(folder, remote)
    assert first.tick()
    assert not second.tick()
    first._lock.give_back()  # what the kernel does when a process dies
    assert second.tick()


def test_segments_are_deleted_after_their_days(tmp_path: Path, remote: Remote) -> None:
    """Here and there, rows and feedback; what is younger, open, or not ours stays."""
    folder = tmp_path / "log"
    old = [segment(folder, 8), segment(folder, 9, "feedback")]
    young = segment(folder, 6)
    for path in (*old, young):
        remote.write(path.name, b"{}\n")
    (folder / "notes.jsonl").touch()
    os.utime(folder / "notes.jsonl", (0, 0))
    remote_before = remote.names()
    Keeper(folder, remote, retention_days=7).tick()
    assert len(remote_before) == 3
    assert remote.names() == [young.name]
    assert final_segments(folder) == [young]
    assert (folder / "notes.jsonl").exists()


def test_a_missing_package_and_a_wrong_url_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start says what to install, not the first rotation."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(
        sys.modules["fsspec.registry"]._registry, "s3", raising=False
    )  # other tests have used it
    with pytest.raises(ConfigError, match="pip install s3fs"):
        Remote("s3://bucket/prefix")
    with pytest.raises(ConfigError, match=r"log\.upload"):
        Remote("nothing://bucket/prefix")


def test_wrong_settings_are_refused() -> None:
    """A detector's typo, an upload that is no URL and a log without detectors are found at once."""
    for wrong in ({"detectors": ["emial"]}, {"upload": "bucket/x"}, {"detectors": []}, {"retention_days": 0}):
        with pytest.raises(ValidationError):
            RequestLogConfig.model_validate({"dir": "log", **wrong})
    made = RequestLogConfig.model_validate({"dir": "log", "detectors": ["email", "my.module:find"]})
    assert made.detectors == ("email", "my.module:find")
