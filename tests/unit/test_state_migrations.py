"""A state store of the release before is brought up to date, once, whole, and with everything in it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, inspect, text
from typer.testing import CliRunner

from cli.main import app
from contracts.errors import StateError
from contracts.rollout import Phase
from serve.rollout.replay import replay
from serve.state import migrations, tables
from serve.state.feedback import FeedbackState
from serve.state.keys import KeyState
from serve.state.migrations import SCHEMA_VERSION, stored_version
from serve.state.settings import SettingsState
from serve.state.tables import bring_up, look_at_state, metadata, open_state, write_alone
from serve.state.traffic import TrafficState
from tests.unit.old_state import RELEASED_S, load_old
from tests.unit.rollout_world import World


@pytest.fixture
def old_url(state_url: str) -> str:
    """A store that the release before made and used."""
    load_old(state_url, 2)
    return state_url


def shape(engine: Engine) -> dict[str, object]:
    """Columns (type, nullable) and indices of every table: what code of this release relies on."""
    looked = inspect(engine)
    return {
        name: (
            {c["name"]: (str(c["type"]), c["nullable"]) for c in looked.get_columns(name)},
            {i["name"]: i["column_names"] for i in looked.get_indexes(name) if i["name"]},
            looked.get_pk_constraint(name)["constrained_columns"],
        )
        for name in sorted(metadata.tables)
    }


def test_an_upgraded_store_has_the_schema_of_a_new_one(old_url: str) -> None:
    """Every table, column, type, index and key; only the defaults of added columns are extra."""
    upgraded = open_state(old_url)
    found = shape(upgraded)
    with upgraded.begin() as db:
        assert stored_version(db) == SCHEMA_VERSION
        metadata.drop_all(db)
    assert found == shape(open_state(old_url))


def test_everything_in_it_is_still_there(old_url: str) -> None:
    """Splits, settings, keys with usage, commands, served requests, feedback and the ledger are read."""
    world = World.over(old_url, RELEASED_S)
    engine, rollout = world.engine, world.stored
    traffic = TrafficState(engine)
    assert (traffic.splits()["support"].version, traffic.splits()["support"].weight) == (3, 0.05)
    assert (rollout.status.phase, rollout.status.ticks) == (Phase.RAMPING, 8)
    assert len(traffic.read_ledger("support", rollout.spec.id, {})) == 33
    assert SettingsState(engine).settings()["support"].aliases == ("help",)
    assert KeyState(engine).get_key("team-1").requests_per_minute == 60
    assert [u.requests for u in KeyState(engine).usage()] == [3]
    assert [c.verb for c in world.rollouts.pending_commands(rollout.spec.id)] == ["pause"]
    served = FeedbackState(engine).find_served("req-1")
    assert served is not None
    assert (served.reason, served.subjects) == ("", "h1 h2")


def test_a_rollout_of_the_release_before_goes_on(old_url: str) -> None:
    """Evidence, cursor and audit trail are continued to a promotion; what is decided from now on replays."""
    world = World.over(old_url, RELEASED_S)
    before = world.rollouts.audit(world.spec.id)
    world.ask("resume")
    assert world.until(Phase.PROMOTED).phase is Phase.PROMOTED
    trail = world.rollouts.audit(world.spec.id)
    assert trail[: len(before)] == before
    assert world.status.total_counts["canary"].n > 100
    # The old release's statuses lack fields of this one: its ticks replay to the same phase, not to the byte.
    found = replay(world.stored, trail)
    assert found.final.phase is Phase.PROMOTED


def test_the_release_before_goes_on_writing_beside_this_one(old_url: str) -> None:
    """A router that has not been replaced yet names no column that it does not know."""
    engine = open_state(old_url)
    with engine.begin() as db:
        db.execute(
            text(
                "INSERT INTO served (request_id, route, arm, rollout_id, split_version, log_mode, subjects,"
                " at) VALUES ('req-2', 'support', 'stable', NULL, 3, 'full', '', 1000020.0)"
            )
        )
    served = FeedbackState(engine).find_served("req-2")
    assert served is not None
    assert served.reason == ""


def test_of_processes_that_start_at_once_one_migrates(old_url: str) -> None:
    """Each looks under the lock: the steps run once, and nobody fails."""
    go = threading.Barrier(6)

    def upgrade(_: int) -> int:
        engine, _version = look_at_state(old_url)
        go.wait()
        with write_alone(engine) as db:
            return len(bring_up(db))

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(upgrade, range(6))) == [0, 0, 0, 0, 0, 1]


def test_a_migration_that_is_cut_off_changes_nothing(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, columns and the version are one transaction: what ends in the middle did not happen."""

    def add_and_die(db: object, table: object, added: object) -> None:
        real(db, table, added)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    real = migrations._add
    monkeypatch.setattr(migrations, "_add", add_and_die)
    with pytest.raises(KeyboardInterrupt):
        open_state(old_url)
    engine, version = look_at_state(old_url)
    assert version == 2
    looked = inspect(engine)
    assert "reason" not in {c["name"] for c in looked.get_columns("served")}
    assert "judge_checks" not in looked.get_table_names()
    monkeypatch.setattr(migrations, "_add", real)
    assert len(TrafficState(open_state(old_url)).splits()) == 1


def test_a_newer_store_is_refused_before_anything_is_written(state_url: str) -> None:
    """The release before must not add its tables to a store that has moved on."""
    engine = open_state(state_url)
    with engine.begin() as db:
        db.execute(text("UPDATE schema_version SET version = 99"))
        tables.judge_checks.drop(db)
    with pytest.raises(StateError, match="schema version 99, written by a newer release; this one knows 3"):
        open_state(state_url)
    assert "judge_checks" not in inspect(engine).get_table_names()


def test_a_store_from_before_any_release_is_refused(state_url: str) -> None:
    """Its rollouts counted grades in a form that cannot be read: said, not misread."""
    load_old(state_url, 1)
    with pytest.raises(StateError, match="schema version 1, from before any release"):
        open_state(state_url)


def test_upgrade_says_what_is_due_and_does_it(old_url: str) -> None:
    """--check exits with 1 and changes nothing; --apply upgrades; after that nothing is due."""
    run = CliRunner()
    for _ in range(2):
        check = run.invoke(app, ["upgrade", "--check", "--state-url", old_url])
        assert check.exit_code == 1
        assert "schema 2, this release needs 3" in check.output
    done = run.invoke(app, ["upgrade", "--apply", "--state-url", old_url])
    assert (done.exit_code, "upgraded from schema 2 to 3" in done.output) == (0, True)
    again = run.invoke(app, ["upgrade", "--state-url", old_url])
    assert (again.exit_code, "nothing to do" in again.output) == (0, True)


def test_looking_at_a_store_makes_none(tmp_path: object) -> None:
    """A mistyped path is an error, not a new empty store."""
    with pytest.raises(StateError, match="there is no state store"):
        look_at_state(f"sqlite:///{tmp_path}/nothing.db")
    assert CliRunner().invoke(app, ["upgrade", "--state-url", f"sqlite:///{tmp_path}/x.db"]).exit_code == 1


def test_every_step_leads_to_todays_schema_by_one() -> None:
    """Steps are in order, without holes, up to the version that new stores get."""
    assert [s.to for s in migrations.STEPS] == list(range(migrations.OLDEST_VERSION + 1, SCHEMA_VERSION + 1))
    for step in migrations.STEPS:
        for added in step.columns:
            assert added.column in metadata.tables[added.table].c
