"""A backup holds everything of one moment, restores into either database, and is never half anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text
from typer.testing import CliRunner

from cli.main import app
from contracts.errors import ConfigError, ConflictError, DataError, StateError
from contracts.rollout import Phase
from serve.rollout.replay import replay
from serve.state.archive import MANIFEST
from serve.state.backup import LIVE_TABLES, backup, restore
from serve.state.feedback import FeedbackState
from serve.state.keys import KeyState, MinuteUsage, new_key
from serve.state.migrations import stored_version
from serve.state.rollouts import RolloutState
from serve.state.settings import SettingsState
from serve.state.tables import look_at_state, metadata, open_state
from serve.state.traffic import TrafficState
from tests.unit.old_state import RELEASED_S, load_old
from tests.unit.rollout_world import World

ROOT = Path(__file__).resolve().parents[2]


def content(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables that a backup is of."""
    kept = sorted(set(metadata.tables) - LIVE_TABLES)
    with engine.connect() as db:
        return {
            name: sorted(map(tuple, db.execute(select(metadata.tables[name])).all()), key=repr)
            for name in kept
        }


def end_everything(engine: Engine) -> None:
    """As if routers and controller had ended a while ago."""
    with engine.begin() as db:
        db.execute(text("UPDATE routers SET seen_at = 0"))
        db.execute(text("UPDATE leases SET expires_at = 0"))


@pytest.fixture
def world(state_url: str, tmp_path: Path) -> World:
    """A rollout in its second step, on a store that also has keys with usage."""
    world = World(tmp_path, state_url=state_url)
    for _ in range(14):
        world.step()
    key, _ = new_key("Ünïcode \U0001f511", requests_per_minute=7)
    KeyState(world.engine).create_key(key)
    KeyState(world.engine).put_usage("router-a", [MinuteUsage(key.id, 2**40, 3, 2**40, 5)])
    assert world.status.phase is Phase.RAMPING
    return world


@pytest.fixture(params=["sqlite", "postgresql"])
def other_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store to restore into, on every database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/restored/state.db"
    return str(request.getfixturevalue("postgres").new_database())


def test_a_rollout_goes_on_from_a_restored_store(world: World, other_url: str, tmp_path: Path) -> None:
    """From and into either database: all rows are equal, it ends as it would have, its audit replays."""
    file = str(tmp_path / "b.zip")
    made = backup(world.state_url, file)
    before, now = content(world.engine), world.now
    assert made.parts["audit"].rows == len(before["audit"]) > 5
    assert made.parts["ledger"].rows == len(before["ledger"]) > 10

    restore(other_url, file)
    assert content(open_state(other_url)) == before
    end_everything(world.engine)

    ends = []
    for url in (world.state_url, other_url):
        going_on = World.over(url, now)
        assert going_on.until(Phase.PROMOTED).phase is Phase.PROMOTED
        found = replay(going_on.stored, going_on.rollouts.audit(going_on.spec.id))
        assert found.exact, found.sentence()
        ends.append((going_on.status, going_on.split))
    assert ends[0] == ends[1]


def test_a_backup_of_the_release_before_is_restored(other_url: str, tmp_path: Path) -> None:
    """Taken before an upgrade, of a store that nobody upgraded yet: it becomes this release's schema."""
    old_url = f"sqlite:///{tmp_path}/old.db"
    load_old(old_url, 2)
    made = backup(old_url, str(tmp_path / "old.zip"))
    assert (made.schema_version, look_at_state(old_url)[1]) == (2, 2)
    restore(other_url, str(tmp_path / "old.zip"))
    world = World.over(other_url, RELEASED_S)
    with world.engine.connect() as db:
        assert stored_version(db) == 3
    served = FeedbackState(world.engine).find_served("req-1")
    assert served is not None
    assert served.reason == ""
    assert SettingsState(world.engine).settings()["support"].aliases == ("help",)
    world.ask("resume")
    assert world.step().ticks == 9


def test_a_backup_is_one_moment_of_a_store_that_is_written_to(world: World, tmp_path: Path) -> None:
    """While routers and controller go on: status, audit trail and ledger of it belong together."""
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            world.step()

    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        made = [backup(world.state_url, str(tmp_path / f"{n}.zip")) for n in range(3)]
    finally:
        stop.set()
        writer.join(120)
    for n, manifest in enumerate(made):
        assert manifest.parts["rollouts"].rows == 1
        restore(f"sqlite:///{tmp_path}/{n}.db", str(tmp_path / f"{n}.zip"))
        (stored,) = RolloutState(open_state(f"sqlite:///{tmp_path}/{n}.db")).history()
        trail = RolloutState(open_state(f"sqlite:///{tmp_path}/{n}.db")).audit(stored.spec.id)
        found = replay(stored, trail)
        assert found.exact, found.sentence()


def test_only_an_empty_store_is_restored_into_unless_forced(other_url: str, tmp_path: Path) -> None:
    """Rows of a store are somebody's; --force replaces all of them, those of other tables too."""
    file = str(tmp_path / "b.zip")
    world = World(tmp_path)
    backup(world.state_url, file)
    target = open_state(other_url)
    KeyState(target).create_key(new_key("theirs")[0])
    before = content(target)
    with pytest.raises(ConflictError, match=r"has rows .in 'api_keys'.*--force"):
        restore(other_url, file)
    assert content(target) == before
    restore(other_url, file, force=True)
    assert content(target) == content(world.engine)


def test_nothing_is_restored_under_what_runs(world: World, tmp_path: Path) -> None:
    """A router keeps the higher split version it knows, so it must not run meanwhile; nor a controller."""
    file = str(tmp_path / "b.zip")
    backup(world.state_url, file)
    with world.engine.begin() as db:
        db.execute(text(f"UPDATE routers SET seen_at = {time.time() + 1000}"))
    with pytest.raises(ConflictError, match=r"router 'router-.' runs on this store"):
        restore(world.state_url, file, force=True)
    with world.engine.begin() as db:
        db.execute(text("UPDATE routers SET seen_at = 0"))
        db.execute(text(f"UPDATE leases SET expires_at = {time.time() + 1000}"))
    with pytest.raises(ConflictError, match="holds a lease"):
        restore(world.state_url, file, force=True)
    end_everything(world.engine)
    restore(world.state_url, file, force=True)


def _spoil(file: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _manifest(members: dict[str, bytes], **changes: object) -> None:
    members[MANIFEST] = json.dumps({**json.loads(members[MANIFEST]), **changes}).encode()


SPOILED: dict[str, tuple[Callable[[dict[str, bytes]], object], type[Exception], str]] = {
    "a row changed": (
        lambda m: m.update({"rows/audit.jsonl": m["rows/audit.jsonl"].replace(b"support", b"suppert", 1)}),
        DataError, "'rows/audit.jsonl' does not match its sha256",
    ),
    "a part missing": (lambda m: m.pop("rows/ledger.jsonl"), DataError, "part 'rows/ledger.jsonl'"),
    "no manifest": (lambda m: m.pop(MANIFEST), DataError, "no backup of a state store: manifest.json"),
    "another zip": (lambda m: m.update({MANIFEST: b'{"a": 1}'}), DataError, "is of something else"),
    "a newer format": (lambda m: _manifest(m, format_version=2), DataError, "has format 2"),
    "a newer schema": (lambda m: _manifest(m, schema_version=99), StateError, "written by a newer release"),
    "a strange field": (lambda m: _manifest(m, colour=1), ConfigError, "colour"),
    "a strange table": (
        lambda m: _manifest(m, parts={"x": {"file": "rows/audit.jsonl", "rows": 0, "bytes": 0,
                                            "sha256": "", "columns": []}}),
        DataError, "does not match its sha256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_a_damaged_backup_is_refused_by_what_is_wrong(what: str, tmp_path: Path) -> None:
    """Every part is checked before the store is touched: not even its file is made."""
    World(tmp_path).step()
    file = tmp_path / "b.zip"
    backup(f"sqlite:///{tmp_path}/state.db", str(file))
    change, error, words = SPOILED[what]
    _spoil(file, lambda members: change(members) and None)
    with pytest.raises(error, match=words):
        restore(f"sqlite:///{tmp_path}/new/state.db", str(file))
    assert not (tmp_path / "new").exists()


def test_a_torn_backup_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, empty, or not there."""
    World(tmp_path).step()
    file = tmp_path / "b.zip"
    backup(f"sqlite:///{tmp_path}/state.db", str(file))
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="no backup, or only the beginning of one"):
            restore(f"sqlite:///{tmp_path}/new.db", str(file))
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    file.write_bytes(flipped)
    with pytest.raises(DataError, match=r"b.zip is damaged: part 'rows/"):
        restore(f"sqlite:///{tmp_path}/new.db", str(file))
    with pytest.raises(DataError, match="there is no backup at"):
        restore(f"sqlite:///{tmp_path}/new.db", str(tmp_path / "nothing"))
    assert not (tmp_path / "new.db").exists()


_DIE = """
import os, signal, sys
from serve.state import archive, backup
module, name, call = (archive if sys.argv[1] == "backup" else backup), sys.argv[2], int(sys.argv[3])
real, calls = getattr(module, name), []
def dying(*arguments, **named):
    calls.append(1)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(module, name, dying)
getattr(backup, sys.argv[1])(sys.argv[4], sys.argv[5])
"""


def _die(verb: str, function: str, call: int, url: str, file: Path) -> None:
    """Run a verb in a process that is killed when it calls a function for the nth time."""
    command = [sys.executable, "-c", _DIE, verb, function, str(call), url, str(file)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("function", "call"), [("_write_part", 1), ("_write_part", 8), ("Manifest", 1)])
def test_a_killed_backup_is_none(function: str, call: int, tmp_path: Path) -> None:
    """Killed before, among and after the tables: no file has the name, and the next backup is whole."""
    World(tmp_path).step()
    url, file = f"sqlite:///{tmp_path}/state.db", tmp_path / "b.zip"
    _die("backup", function, call, url, file)
    assert not file.exists()
    backup(url, str(file))
    restore(f"sqlite:///{tmp_path}/new.db", str(file))
    assert content(open_state(f"sqlite:///{tmp_path}/new.db")) == content(open_state(url))


@pytest.mark.parametrize(("function", "call"), [("_make_room", 1), ("_fill", 1), ("_fill", 9)])
def test_a_killed_restore_changed_nothing(function: str, call: int, other_url: str, tmp_path: Path) -> None:
    """Killed before, among and near the end of the tables: the store is empty, and takes the next restore."""
    World(tmp_path).step()
    file = tmp_path / "b.zip"
    backup(f"sqlite:///{tmp_path}/state.db", str(file))
    _die("restore", function, call, other_url, file)
    rows = content(open_state(other_url))
    assert {name: len(found) for name, found in rows.items() if found} == {"schema_version": 1}
    restore(other_url, str(file))
    assert len(TrafficState(open_state(other_url)).splits()) == 1


def test_a_backup_replaces_no_file_and_is_private(tmp_path: Path) -> None:
    """Last night's backup is not overwritten by mistake; the file holds what the store holds."""
    World(tmp_path)
    url, file = f"sqlite:///{tmp_path}/state.db", tmp_path / "sub" / "b.zip"
    backup(url, str(file))
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ConflictError, match="is there already"):
        backup(url, str(file))
    with pytest.raises(StateError, match="there is no state store"):
        backup(f"sqlite:///{tmp_path}/nope.db", str(tmp_path / "c.zip"))


def test_a_backup_goes_to_a_url_and_comes_back(tmp_path: Path) -> None:
    """Any fsspec URL; the one that is there already is not replaced, one with a password is refused."""
    World(tmp_path)
    url, place = f"sqlite:///{tmp_path}/state.db", f"memory://backups/{tmp_path.name}.zip"
    backup(url, place)
    with pytest.raises(ConflictError, match="is there already"):
        backup(url, place)
    restore(f"sqlite:///{tmp_path}/new.db", place)
    assert content(open_state(f"sqlite:///{tmp_path}/new.db")) == content(open_state(url))
    with pytest.raises(DataError, match="there is no backup at"):
        restore(url, "memory://backups/other.zip")
    with pytest.raises(ConfigError, match="holds a password") as refused:
        backup(url, "sftp://me:hunter2@host/b.zip")
    assert "hunter2" not in str(refused.value)


def test_the_commands_say_what_is_in_it_and_what_is_not(tmp_path: Path) -> None:
    """Counts by table, and how to keep request log, artifacts and registry."""
    World(tmp_path).step()
    url, file, run = f"sqlite:///{tmp_path}/state.db", str(tmp_path / "b.zip"), CliRunner()
    made = run.invoke(app, ["backup", file, "--state-url", url])
    assert made.exit_code == 0, made.output
    for words in ("rollouts", "request log:", "artifacts:", "registry:"):
        assert words in made.output
    back = run.invoke(app, ["restore", file, "--json", "--state-url", f"sqlite:///{tmp_path}/new.db"])
    assert json.loads(back.output)["parts"]["rollouts"]["rows"] == 1
