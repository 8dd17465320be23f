"""Erasing rows of one person: all of theirs, none of anybody else's, whatever runs at the same time."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from contracts.traffic import UnitKind, hash_unit
from serve.request_log import Keeper, SegmentWriter
from serve.request_log import erase as erasing
from serve.request_log.erase import Erased, erase, settle, tombstones
from serve.request_log.remote import Remote
from serve.request_log.segments import final_segments
from serve.request_log.subjects import Target, TargetKind, make_target, subjects_of, with_unit
from tests.unit.test_request_log import row, rows_in

NOW = 1000.0


def line(number: int, unit: str = "", kind: UnitKind = UnitKind.HEADER, **body: Any) -> bytes:
    made = row(number).model_copy(
        update={
            "unit_kind": kind,
            "unit_hash": hash_unit(unit),
            "subjects": subjects_of(body),
            "request": {"n": number},
        }
    )
    return made.model_dump_json().encode() + b"\n"


def segment(folder: Path, number: int, *lines: bytes) -> Path:
    path = folder / f"requests-202601{number:02d}T000000.000000Z-h-1-ab.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def numbers(folder: Path) -> list[int]:
    return [r["request"]["n"] for r in rows_in(folder)]


def conversation(name: str, at: float = NOW) -> Target:
    return make_target(TargetKind.CONVERSATION, name, at)


def test_exactly_the_targets_rows_go(tmp_path: Path) -> None:
    """Of many segments and ids, only rows of the named conversation, user or request are removed."""
    segment(tmp_path, 1, line(1, "c1"), line(2, "c2"), line(3, "c1", user="ann"))
    segment(tmp_path, 2, line(4, "c1"), line(5, "ann", UnitKind.USER))
    segment(tmp_path, 3, line(6, "c3", metadata={"user_id": "ann", "conversation_id": "c9"}))
    assert erase(tmp_path, None, conversation("c1")) == Erased(local=3)
    assert numbers(tmp_path) == [2, 5, 6]
    assert erase(tmp_path, None, make_target(TargetKind.USER, "ann", NOW)) == Erased(local=2)
    assert numbers(tmp_path) == [2]
    assert erase(tmp_path, None, make_target(TargetKind.REQUEST, "r2", NOW)) == Erased(local=1)
    assert numbers(tmp_path) == []
    assert len(final_segments(tmp_path)) == 3


def test_a_user_and_a_conversation_of_one_name_are_two(tmp_path: Path) -> None:
    """Erasing conversation 42 must not take the rows of user 42."""
    segment(tmp_path, 1, line(1, "42", UnitKind.USER), line(2, "x", user="42"), line(3, "42"))
    assert erase(tmp_path, None, conversation("42")) == Erased(local=1)
    assert numbers(tmp_path) == [1, 2]


def test_an_id_in_a_text_is_no_subject(tmp_path: Path) -> None:
    """A row that merely quotes an id, or its hash, is somebody else's."""
    quoting = row(1).model_copy(update={"request": {"n": 1, "text": f"r7 {hash_unit('c1')}"}})
    segment(tmp_path, 1, quoting.model_dump_json().encode() + b"\n")
    assert erase(tmp_path, None, conversation("c1")) == Erased()
    assert erase(tmp_path, None, make_target(TargetKind.REQUEST, "r7", NOW)) == Erased()
    assert numbers(tmp_path) == [1]


def test_a_damaged_line_that_names_the_target_goes(tmp_path: Path) -> None:
    """A row that cannot be read may hold what was to be erased, so it is not kept; others are left alone."""
    torn = b'{"request_id": "r1", "unit_hash": "' + hash_unit("c1").encode() + b'", "requ\n'
    path = segment(tmp_path, 1, torn, line(2, "c2"), b"{torn\n")
    assert erase(tmp_path, None, conversation("c1")) == Erased(local=1)
    assert path.read_bytes() == line(2, "c2") + b"{torn\n"


def test_long_ids_are_found_as_the_router_hashed_them(tmp_path: Path) -> None:
    """An id longer than the bound is hashed twice on both sides."""
    name = "x" * 600
    made = subjects_of({"user": name})
    assert made == (f"user:{make_target(TargetKind.USER, name, NOW).key}",)
    assert with_unit(made, UnitKind.USER, made[0].removeprefix("user:")) == made
    assert with_unit((), UnitKind.MESSAGES, "ab") == ()


def test_odd_bodies_have_no_subjects() -> None:
    """Wrong types where ids belong are not ids."""
    assert subjects_of({"user": 7, "metadata": "x", "safety_identifier": ""}) == ()
    assert subjects_of({"metadata": {"user_id": None, "conversation_id": ["c"]}}) == ()
    assert subjects_of({"user": "a", "metadata": {"user_id": "a"}}) == (f"user:{hash_unit('a')}",)


def test_rows_of_an_open_segment_go_when_it_closes(tmp_path: Path) -> None:
    """What is still being written is counted as waiting, and is gone once the segment is final."""
    writer = SegmentWriter(tmp_path, "h-1-ab", 10**9, 3600, settle=settle)
    writer.append([line(1, "c1"), line(2, "c2")])
    assert erase(tmp_path, None, conversation("c1")) == Erased(waiting=1)
    later = json.loads(line(4, "c1"))
    later["ts"] = NOW + 1
    writer.append([line(3, "c1"), json.dumps(later).encode() + b"\n"])
    assert numbers(tmp_path) == [1, 2, 3, 4]
    writer.close()
    assert numbers(tmp_path) == [2, 4]  # the conversation goes on, and is logged again


def test_a_tombstone_is_forgotten_when_no_segment_can_be_that_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tombstones are hashes that nobody needs after a month."""
    erase(tmp_path, None, conversation("c1", time.time()))
    erasing.expire_tombstones(tmp_path)
    assert len(tombstones(tmp_path)) == 1
    monkeypatch.setattr(erasing, "_KEPT_S", -10.0)
    erasing.expire_tombstones(tmp_path)
    assert tombstones(tmp_path) == []


def test_uploaded_rows_go_too(tmp_path: Path) -> None:
    """A segment that was uploaded and removed here is rewritten there."""
    folder, remote = tmp_path / "log", Remote(f"file://{tmp_path}/far/away")
    folder.mkdir()
    path = segment(folder, 1, line(1, "c1"), line(2, "c2"))
    Keeper(folder, remote, keep_local=False).tick()
    assert final_segments(folder) == []
    assert erase(folder, remote, conversation("c1")) == Erased(remote=1)
    assert remote.read(path.name) == line(2, "c2")


def test_an_erasure_during_an_upload_wins(tmp_path: Path) -> None:
    """The upload took the old bytes; it notices the rewrite, and what was uploaded is replaced."""
    folder = tmp_path / "log"
    folder.mkdir()
    path = segment(folder, 1, line(1, "c1"), line(2, "c2"))
    done: list[Erased] = []

    class Slow(Remote):
        def write(self, name: str, data: bytes) -> None:
            if not done:
                done.append(erase(folder, Remote(self.url), conversation("c1")))
            super().write(name, data)

    remote = Slow(f"file://{tmp_path}/far")
    keeper = Keeper(folder, remote, keep_local=False)
    keeper.tick()
    assert done == [Erased(local=1)]
    assert path.exists()
    keeper.tick()
    assert not path.exists()
    assert remote.read(path.name) == line(2, "c2")


def test_a_writer_that_died_between_closing_and_erasing_is_made_up_for(tmp_path: Path) -> None:
    """The next process that looks after the folder applies the tombstones to every final segment."""
    writer = SegmentWriter(tmp_path, "h-1-ab", 10**9, 3600)  # no settle: as if killed right after the rename
    writer.append([line(1, "c1"), line(2, "c2")])
    erase(tmp_path, None, conversation("c1"))
    writer.close()
    assert numbers(tmp_path) == [1, 2]
    Keeper(tmp_path).tick()
    assert numbers(tmp_path) == [2]


def test_nothing_escapes_writers_and_an_uploader_at_full_speed(tmp_path: Path) -> None:
    """Rows of the target that arrived before its erasure are gone from every place once all is closed, and
    every other row is there exactly once.
    """
    folder, remote = tmp_path / "log", Remote(f"file://{tmp_path}/far")
    folder.mkdir()
    stop = threading.Event()
    written: list[list[int]] = [[], []]

    def write(which: int) -> None:
        writer = SegmentWriter(folder, f"h-1-a{which}", 1500, 3600, settle=settle)
        number = which * 10**6
        while not stop.is_set():
            number += 1
            units = ("c1", "c2", f"other{number}")
            writer.append([line(number * 10 + i, unit) for i, unit in enumerate(units)])
            written[which].append(number)
            writer.tick()
            time.sleep(0.001)
        writer.close()

    keeper = Keeper(folder, remote, keep_local=False)
    keeper.start()
    threads = [threading.Thread(target=write, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for unit in ("c1", "c2", "c1"):
        time.sleep(0.3)
        erase(folder, remote, conversation(unit))  # all rows have ts 1.0: every one of them is to go
    time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert keeper.close(30)
    assert final_segments(folder) == []
    rows = [json.loads(text) for name in remote.names() for text in remote.read(name).splitlines()]
    expected = sorted(number * 10 + 2 for numbers_of in written for number in numbers_of)
    assert sorted(r["request"]["n"] for r in rows) == expected
    assert len(expected) > 100
