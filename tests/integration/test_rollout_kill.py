"""A controller process SIGKILLed all through a rollout, and two controllers at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from sqlalchemy import event

from contracts.rollout import Phase, RolloutSpec
from contracts.traffic import Upstream
from serve.rollout.controller import LEASE, Controller
from serve.rollout.decide import initial
from serve.rollout.deployer import FakeDeployer
from serve.rollout.replay import replay
from serve.rollout.simulate import ArmModel
from serve.state.tables import open_state
from tests.unit.rollout_world import BROKEN, GOOD, World, demo_policy

pytestmark = pytest.mark.integration

_FORK = multiprocessing.get_context("fork")
Point = Callable[[], None]


class FileDeployer(FakeDeployer):
    """A deployer whose applications outlive the controller, as Ray's do: a file each."""

    def __init__(self, folder: Path, point: Point) -> None:
        super().__init__()
        self.folder, self.point = folder, point

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """Create the application unless it is there."""
        self.point()
        if not (self.folder / f"{upstream.name}.app").exists():
            (self.folder / f"{upstream.name}.app").touch()
            self.note(f"deployed {upstream.name}")

    def ready(self, upstream: Upstream) -> bool:
        """Up as soon as it was created."""
        self.point()
        return (self.folder / f"{upstream.name}.app").exists()

    def retire(self, upstream: Upstream) -> None:
        """Delete the application if it is there."""
        self.point()
        if (self.folder / f"{upstream.name}.app").exists():
            (self.folder / f"{upstream.name}.app").unlink()
            self.note(f"retired {upstream.name}")

    def note(self, line: str) -> None:
        """Write down an effect, and give the killer a chance right after it."""
        with (self.folder / "effects").open("a") as out:
            out.write(line + "\n")
        self.point()


def controller_process(folder: Path, holder: str, die_at: int, ttl_s: float) -> None:
    """Tick for ever at the clock that the test writes; SIGKILL itself at its n-th point (a SQL statement,
    a commit or a deployer call). Says 'idle' when a tick changed nothing."""
    points = 0

    def point(*_: object) -> None:
        nonlocal points
        points += 1
        if points == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = open_state(f"sqlite:///{folder}/state.db")
    event.listen(engine, "before_cursor_execute", point)
    event.listen(engine, "commit", point)
    deployer = FileDeployer(folder, point)

    def promoted(spec: RolloutSpec) -> None:
        if not (folder / "champion").exists():
            (folder / "champion").touch()
            deployer.note("champion moved")

    clock = lambda: float((folder / "clock").read_text())  # noqa: E731
    controller = Controller(
        engine, deployer, on_promoted=promoted, holder=holder, clock=clock, lease_ttl_s=ttl_s
    )
    stored_by_me, idle = 0, folder / "idle"
    advance = controller.advance

    def counted(stored: object) -> object:
        nonlocal stored_by_me
        after = advance(stored)  # type: ignore[arg-type]
        if after is not stored:
            stored_by_me += 1
            write(folder / f"ticks-{holder}", str(stored_by_me))
        return after

    controller.advance = counted  # type: ignore[method-assign, assignment]
    while True:
        before, at = stored_by_me, clock()
        if idle.exists() and idle.read_text() == str(at):
            time.sleep(0.001)  # the next second's traffic is being written: half of it must not be seen
            continue
        if controller.tick() and stored_by_me == before:
            write(idle, str(at))


def write(path: Path, text: str) -> None:
    """Replace a file atomically."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def spawn(folder: Path, holder: str, die_at: int = -1, ttl_s: float = 30.0) -> BaseProcess:
    """Start a controller process."""
    process = _FORK.Process(target=controller_process, args=(folder, holder, die_at, ttl_s), daemon=True)
    process.start()
    return process


def set_clock(world: World, folder: Path, seconds: float = 1.0) -> None:
    """One second of traffic under the stored split, then the controllers' clock moves."""
    world.now += seconds
    world.routers.serve(world.now, seconds)
    write(folder / "clock", repr(world.now))


def is_idle(world: World, folder: Path) -> bool:
    """True when a controller had nothing more to do at this time."""
    return (folder / "idle").exists() and (folder / "idle").read_text() == repr(world.now)


def make_world(folder: Path, canary: ArmModel) -> World:
    """A world whose rollout has the same id in every run."""
    folder.mkdir()
    steps = tuple(s.model_copy(update={"min_dwell_s": 3.0}) for s in demo_policy().steps)
    world = World(folder, demo_policy(steps=steps), canary=canary, per_s=60.0)
    world.ask("abort")
    while not world.status.phase.terminal:
        world.step()
    world.spec = world.spec.model_copy(update={"id": "the-one", "created_at": world.now})
    world.rollouts.create(world.spec, initial(world.spec))
    world.rollouts.release_lease(LEASE, "one")
    return world


def run_to_the_end(world: World, folder: Path, kill_every: tuple[int, int] | None) -> int:
    """Drive a rollout through a controller process that is killed again and again; returns the kills."""
    rng, kills = random.Random(5), 0

    def fresh() -> BaseProcess:
        # The same holder: the lease of a killed controller is its own again at once.
        return spawn(folder, "child", rng.randint(*kill_every) if kill_every else -1)

    set_clock(world, folder)
    process = fresh()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if is_idle(world, folder):
            if world.status.phase.terminal:
                break
            set_clock(world, folder)
        if not process.is_alive():
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            process = fresh()
        time.sleep(0.001)
    process.kill()
    process.join()
    return kills


def trail(world: World) -> list[tuple[object, ...]]:
    """What the audit says was decided, to the last bit of every e-value."""
    keys = ("reason", "weight", "status_digest", "from", "to", "split_version")
    return [
        (e.tick, e.kind, e.at, *(e.body.get(k) for k in keys)) for e in world.rollouts.audit(world.spec.id)
    ]


@pytest.mark.parametrize(("canary", "end"), [(GOOD, Phase.PROMOTED), (BROKEN, Phase.ROLLED_BACK)])
def test_killed_all_along_it_decides_the_same(tmp_path: Path, canary: ArmModel, end: Phase) -> None:
    """SIGKILL at SQL statements, commits and deployer calls: same audit as unharmed, every effect once."""
    calm = make_world(tmp_path / "calm", canary)
    assert run_to_the_end(calm, tmp_path / "calm", None) == 0
    harmed = make_world(tmp_path / "harmed", canary)
    kills = run_to_the_end(harmed, tmp_path / "harmed", (9, 24))

    assert calm.status.phase is end
    assert kills >= (12 if end is Phase.PROMOTED else 5)
    assert trail(harmed) == trail(calm)
    assert harmed.status == calm.status
    assert harmed.split == calm.split
    expected = ["deployed student-v1"]
    expected += ["champion moved"] if end is Phase.PROMOTED else ["retired student-v1"]
    assert (tmp_path / "harmed" / "effects").read_text().splitlines() == expected
    assert replay(harmed.stored, harmed.rollouts.audit(harmed.spec.id)).exact


def test_two_controllers_at_once_one_acts_and_the_other_takes_over(tmp_path: Path) -> None:
    """While both live only the lease holder stores ticks; the other finishes when it is killed."""
    folder = tmp_path / "w"
    world = make_world(folder, GOOD)
    set_clock(world, folder)
    first = spawn(folder, "first", ttl_s=3.0)
    while not is_idle(world, folder):
        time.sleep(0.002)
    second = spawn(folder, "second", ttl_s=3.0)
    deadline = time.monotonic() + 60
    while world.status.step < 2 and time.monotonic() < deadline:
        if is_idle(world, folder):
            set_clock(world, folder)
        time.sleep(0.001)
    assert world.status.step == 2
    assert not (folder / "ticks-second").exists()
    first.kill()
    first.join()
    while not world.status.phase.terminal and time.monotonic() < deadline:
        if is_idle(world, folder):
            set_clock(world, folder)
        time.sleep(0.001)
    second.kill()
    second.join()
    assert world.status.phase is Phase.PROMOTED
    assert int((folder / "ticks-second").read_text()) > 0
    looks = [e.tick for e in world.rollouts.audit("the-one") if e.kind == "look"]
    assert len(set(looks)) == len(looks)
    assert replay(world.stored, world.rollouts.audit("the-one")).exact
