"""A controller process SIGKILLed at every tick of a rollout, and two controllers at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from contracts.hooks import HookPoint, HookSpec
from contracts.rollout import Phase
from contracts.traffic import Upstream
from serve.rollout.confirmer import Confirmer
from serve.rollout.controller import LEASE, Controller
from serve.rollout.courier import Courier
from serve.rollout.decide import initial
from serve.rollout.deployer import FakeDeployer
from serve.rollout.replay import replay
from serve.rollout.simulate import ArmModel
from serve.rollout.webhook import Reply
from serve.state.outbox import OutboxState
from serve.state.tables import open_state
from tests.unit.rollout_world import BROKEN, GOOD, Inline, World, demo_policy

pytestmark = pytest.mark.integration

EARLY = 6
"""Points that every second has: lease, versions, splits, commands."""
_FORK = multiprocessing.get_context("fork")
Point = Callable[[], None]


class FileDeployer(FakeDeployer):
    """A deployer whose applications outlive the controller, as Ray's do: a file each. Every call is written
    down with who made it, every effect once more."""

    def __init__(self, folder: Path, holder: str, point: Point) -> None:
        super().__init__()
        self.folder, self.holder, self.point = folder, holder, point

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """Create the application unless it is there."""
        self._call("deploy")
        if not (self.folder / f"{upstream.name}.app").exists():
            (self.folder / f"{upstream.name}.app").touch()
            self.note(f"deployed {upstream.name}")

    def ready(self, upstream: Upstream) -> bool:
        """Up as soon as it was created."""
        self._call("ready")
        return (self.folder / f"{upstream.name}.app").exists()

    def retire(self, upstream: Upstream) -> None:
        """Delete the application if it is there."""
        self._call("retire")
        if (self.folder / f"{upstream.name}.app").exists():
            (self.folder / f"{upstream.name}.app").unlink()
            self.note(f"retired {upstream.name}")

    def note(self, line: str) -> None:
        """Write down an effect, and give the killer a chance right after it."""
        append(self.folder / "effects", line)
        self.point()

    def _call(self, what: str) -> None:
        append(self.folder / "calls", f"{self.holder} {what}")
        self.point()


class Child:
    """What runs in a controller process: a controller at the clock the test writes, telling webhooks into
    a file. SIGKILLs itself at its n-th point (a SQL statement, a commit, a deployer call, a delivery)."""

    def __init__(self, folder: Path, url: str, holder: str, die_at: int, ttl_s: float) -> None:
        self.folder, self.holder, self.die_at = folder, holder, die_at
        self.points = self.stored = 0
        self.engine = open_state(url)
        event.listen(self.engine, "before_cursor_execute", self.point)
        event.listen(self.engine, "commit", self.point)
        self.deployer = FileDeployer(folder, holder, self.point)
        self.courier = Courier(self.engine, post=self._post, clock=self.clock)
        self.controller = _Counting(
            self,
            self.engine,
            self.deployer,
            on_promoted=lambda spec: self._champion("student"),
            on_restored=lambda spec: self._champion("teacher"),
            holder=holder,
            clock=self.clock,
            lease_ttl_s=ttl_s,
            confirmer=Confirmer(self._post, Inline()),
            courier=self.courier,
        )

    def clock(self) -> float:
        """The test's clock."""
        return float((self.folder / "clock").read_text())

    def point(self, *_: object) -> None:
        """A place at which a kill would hurt."""
        self.points += 1
        if self.points == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def once(self) -> bool:
        """One tick and its messages; True when it changed something."""
        before = self.stored
        if self.controller.tick():
            while self.courier.deliver():
                pass
        return self.stored != before

    def _post(self, hook: HookSpec, body: str, name: str, event_id: str, now: float) -> Reply:
        append(self.folder / "posts", f"{self.holder} {name} {event_id}")
        self.point()
        return Reply(204, "")

    def _champion(self, who: str) -> None:
        file = self.folder / "champion"
        if not file.exists() or file.read_text() != who:
            write(file, who)
            self.deployer.note(f"champion is {who}")


class _Counting(Controller):
    """Says how many ticks it stored."""

    def __init__(self, child: Child, engine: Engine, deployer: FileDeployer, **options: Any) -> None:
        super().__init__(engine, deployer, **options)
        self._child = child

    def _stored(self, made: Any) -> None:
        super()._stored(made)
        self._child.stored += 1
        write(self._child.folder / f"ticks-{self._child.holder}", str(self._child.stored))


def ticking(folder: Path, url: str, holder: str, die_at: int, ttl_s: float) -> None:
    """A controller process that ticks for ever; says 'idle' when a tick changed nothing."""
    child, idle = Child(folder, url, holder, die_at, ttl_s), folder / "idle"
    while True:
        at = child.clock()
        if idle.exists() and idle.read_text() == str(at):
            time.sleep(0.001)  # the next second's traffic is being written: half of it must not be seen
            continue
        if not child.once() and child.controller.leading():
            write(idle, str(at))


def one_second(folder: Path, url: str, die_at: int) -> None:
    """A controller process for one second of the test's clock: it ticks until nothing is left to do."""
    child = Child(folder, url, "child", die_at, 30.0)
    while child.once():
        pass
    write(folder / "points", str(child.points))


def append(path: Path, line: str) -> None:
    """Add a line; short ones are written whole."""
    with path.open("a") as out:
        out.write(line + "\n")


def write(path: Path, text: str) -> None:
    """Replace a file atomically."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def spawn(world: World, folder: Path, holder: str, die_at: int = -1, ttl_s: float = 30.0) -> BaseProcess:
    """Start a controller process that ticks for ever."""
    process = _FORK.Process(
        target=ticking, args=(folder, world.state_url, holder, die_at, ttl_s), daemon=True
    )
    process.start()
    return process


def second(world: World, folder: Path, die_at: int = -1) -> bool:
    """A controller process for the current second; False when it was killed."""
    process = _FORK.Process(target=one_second, args=(folder, world.state_url, die_at))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def set_clock(world: World, folder: Path, seconds: float = 1.0) -> None:
    """One second of traffic under the stored split, then the controllers' clock moves."""
    world.now += seconds
    world.routers.serve(world.now, seconds)
    write(folder / "clock", repr(world.now))


def is_idle(world: World, folder: Path) -> bool:
    """True when a controller had nothing more to do at this time."""
    return (folder / "idle").exists() and (folder / "idle").read_text() == repr(world.now)


TOLD = HookSpec(name="log", on=("*",), url="http://127.0.0.1:1/", retries=20)
ASKED = HookSpec(name="desk", confirm=HookPoint.BEFORE_PROMOTE, url="http://127.0.0.1:1/")


def make_world(folder: Path, canary: ArmModel, url: str | None = None, **changes: object) -> World:
    """A world whose rollout has the same id in every run."""
    folder.mkdir()
    steps = tuple(s.model_copy(update={"min_dwell_s": 3.0}) for s in demo_policy().steps)
    policy = demo_policy(**{"steps": steps, "hooks": (TOLD, ASKED), **changes})
    world = World(folder, policy, url, canary=canary, per_s=60.0)
    world.ask("abort")
    while not world.status.phase.terminal:
        world.step()
    world.spec = world.spec.model_copy(update={"id": "the-one", "created_at": world.now})
    world.rollouts.create(world.spec, initial(world.spec))
    world.rollouts.release_lease(LEASE, "one")
    return world


def run_to_the_end(world: World, folder: Path, harmed: bool) -> tuple[int, int]:
    """Drive a rollout second by second, each by a process of its own; returns (seconds, later kills).

    When harmed, a process begins every second and is killed early in it, the next one is killed at any of the
    points that a second has (if this second has that many), and the last one finds what they left.
    """
    rng, seconds, later, points = random.Random(5), 0, 0, 20
    while not world.status.phase.terminal:
        set_clock(world, folder)
        seconds += 1
        if harmed:
            assert not second(world, folder, rng.randint(1, EARLY))
            later += not second(world, folder, rng.randint(EARLY, points))
        assert second(world, folder)
        points = int((folder / "points").read_text())
        assert seconds < 200
    return seconds, later


def trail(world: World) -> list[tuple[object, ...]]:
    """What the audit says was decided, to the last bit of every e-value."""
    keys = ("reason", "weight", "status_digest", "from", "to", "split_version")
    return [
        (e.tick, e.kind, e.at, *(e.body.get(k) for k in keys)) for e in world.rollouts.audit(world.spec.id)
    ]


def posts(folder: Path) -> list[str]:
    """What webhooks heard of the rollout, each message once, in the order in which it first came."""
    lines = [line.split(" ", 1)[1] for line in (folder / "posts").read_text().splitlines()]
    return list(dict.fromkeys(line for line in lines if line.split(" ")[1].startswith("the-one.")))


def effects(folder: Path) -> list[str]:
    """What was really done to engines and registry."""
    return (folder / "effects").read_text().splitlines()


@pytest.mark.parametrize(
    ("canary", "end", "done"),
    [
        (GOOD, Phase.PROMOTED, ["deployed student-v1", "champion is student"]),
        (BROKEN, Phase.ROLLED_BACK, ["deployed student-v1", "retired student-v1"]),
    ],
)
def test_killed_at_every_tick_it_decides_the_same(
    tmp_path: Path, canary: ArmModel, end: Phase, done: list[str]
) -> None:
    """SIGKILL twice in every second of a rollout with a watch, at SQL statements, commits, deployer calls and
    deliveries: the same trail to the last bit, every effect once, every message at least once, in order."""
    calm = make_world(tmp_path / "calm", canary, watch_s=10.0)
    run_to_the_end(calm, tmp_path / "calm", harmed=False)
    harmed = make_world(tmp_path / "harmed", canary, watch_s=10.0)
    seconds, later = run_to_the_end(harmed, tmp_path / "harmed", harmed=True)

    assert calm.status.phase is end
    assert later >= 0.6 * seconds
    assert trail(harmed) == trail(calm)
    assert harmed.status == calm.status
    assert harmed.split == calm.split
    assert effects(tmp_path / "harmed") == effects(tmp_path / "calm") == done
    assert posts(tmp_path / "harmed") == posts(tmp_path / "calm")
    assert all(m.done_at is not None and not m.dead for m in OutboxState(harmed.engine).of("the-one"))
    again = replay(harmed.stored, harmed.rollouts.audit("the-one"))
    assert again.exact, again.mismatches


def test_two_controllers_at_once_one_acts_and_the_other_takes_over(tmp_path: Path, state_url: str) -> None:
    """While both live only the lease holder stores ticks, calls the deployer and tells webhooks; the other
    finishes when it is killed. Every message was sent exactly once, nothing was done twice."""
    folder = tmp_path / "w"
    world = make_world(folder, GOOD, state_url)
    set_clock(world, folder)
    first = spawn(world, folder, "first", ttl_s=3.0)
    deadline = time.monotonic() + 90
    while not is_idle(world, folder) and time.monotonic() < deadline:
        time.sleep(0.002)
    other = spawn(world, folder, "second", ttl_s=3.0)
    while world.status.step < 2 and time.monotonic() < deadline:
        if is_idle(world, folder):
            set_clock(world, folder)
        time.sleep(0.001)
    assert world.status.step == 2
    while not is_idle(world, folder) and time.monotonic() < deadline:
        time.sleep(0.001)
    first.kill()
    first.join()
    assert not (folder / "ticks-second").exists()
    acted = (folder / "calls").read_text() + (folder / "posts").read_text()
    assert {line.split()[0] for line in acted.splitlines()} == {"first"}
    while not world.status.phase.terminal and time.monotonic() < deadline:
        if is_idle(world, folder):
            set_clock(world, folder)
        time.sleep(0.001)
    while not is_idle(world, folder) and time.monotonic() < deadline:
        time.sleep(0.001)
    other.kill()
    other.join()
    assert world.status.phase is Phase.PROMOTED
    assert int((folder / "ticks-second").read_text()) > 0
    assert effects(folder) == ["deployed student-v1", "champion is student"]
    sent = [line.split(" ", 1)[1] for line in (folder / "posts").read_text().splitlines()]
    about = [line for line in sent if line.split(" ")[1].startswith("the-one.")]
    assert len(set(sent)) == len(sent)
    assert len(about) == len(OutboxState(world.engine).of("the-one")) + 1  # and one question
    looks = [e.tick for e in world.rollouts.audit("the-one") if e.kind == "look"]
    assert len(set(looks)) == len(looks)
    assert replay(world.stored, world.rollouts.audit("the-one")).exact
