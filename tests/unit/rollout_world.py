"""A small world for rollout tests: a state store, a fake deployer, a clock, routers that follow the split."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from contracts.gates import Gate, GateReport, GateResult, Verdict
from contracts.hooks import HookSpec
from contracts.metrics import ArmCounts, MetricKind, MetricSpec
from contracts.model import Artifact, EvalReport, ModelRecord
from contracts.rollout import LedgerEntry, Phase, RolloutSpec, RolloutStatus, Step
from contracts.traffic import Split, Upstream
from serve.rollout.confirmer import Confirmer
from serve.rollout.controller import Controller
from serve.rollout.decide import initial
from serve.rollout.deployer import FakeDeployer
from serve.rollout.policy import RolloutPolicy, make_spec
from serve.rollout.simulate import ArmModel, draw_counts
from serve.rollout.webhook import Reply
from serve.state.rollouts import RolloutState, StoredRollout
from serve.state.tables import open_state
from serve.state.traffic import RouterReport, TrafficState

T0 = 1_000_000.0
TEACHER = Upstream(name="teacher", model="teacher", url="http://127.0.0.1:9000")
GOOD = ArmModel(errors=0.0, wrong=0.02, ttft_s=0.04, e2e_s=0.3)
STABLE = ArmModel(errors=0.001, wrong=0.02, ttft_s=0.12, e2e_s=0.9)
BROKEN = ArmModel(errors=0.0, wrong=0.9, ttft_s=0.04, e2e_s=0.3)


def demo_policy(**changes: object) -> RolloutPolicy:
    """The policy recommended for configs/stillhouse.yaml."""
    ladder = zip((0.01, 0.05, 0.10, 0.25, 0.50), (3, 10, 20, 40, 60), (0.2, 0.4, 1.0, 4.0, None), strict=True)
    values: dict[str, object] = {
        "steps": tuple(Step(weight=w, min_samples=m, min_dwell_s=6, evidence=e) for w, m, e in ladder),
        "metrics": (
            MetricSpec(kind=MetricKind.ERRORS, margin=0.03),
            MetricSpec(kind=MetricKind.QUALITY, margin=0.06, tolerance=0.03),
            MetricSpec(kind=MetricKind.TTFT, margin=0.10, thresholds_s=(0.1, 0.4)),
            MetricSpec(kind=MetricKind.E2E, margin=0.10, thresholds_s=(0.6, 1.5)),
        ),
        "look_s": 2.0,
        "no_data_deadline_s": 60.0,
        "warm_timeout_s": 120.0,
        "drain_timeout_s": 30.0,
    }
    return RolloutPolicy(**{**values, **changes})  # type: ignore[arg-type]


def record(version: int = 1, passed: bool = True, overridden_by: str | None = None) -> ModelRecord:
    """A registered student with an offline gate."""
    verdict = Verdict.PASS if passed else Verdict.FAIL
    result = GateResult(
        gate=Gate(metric="accuracy", at_least=0.9),
        value=0.5,
        verdict=verdict,
        reason="accuracy = 0.5 is below 0.9",
    )
    gates = GateReport(results=[result], overridden_by=overridden_by)
    return ModelRecord(
        name="student",
        version=version,
        artifact=Artifact(
            uri="/models/student", digest=f"digest-{version}", precision="awq", bytes=1, params=1
        ),
        evaluation=EvalReport(metrics={}, samples=1, dataset_digest="d", engine="fake", gates=gates),
        created_at=T0,
    )


@dataclass
class Routers:
    """Two router replicas that assign with the stored split and report what they saw."""

    traffic: TrafficState
    per_s: float = 30.0
    stable: ArmModel = STABLE
    """How the upstream behaves that was stable before the rollout."""
    canary: ArmModel = GOOD
    """How the student behaves."""
    students: dict[str, ArmModel] = field(default_factory=dict)
    """How a student of an A/B/n test behaves, by upstream, where it differs."""
    seed: int = 0
    follow: bool = True
    """False: they keep acknowledging the version they first saw."""
    busy: dict[str, int] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    route: str = "support"

    def serve(self, now: float, seconds: float) -> None:
        """Serve some seconds of traffic: append ledger entries and report."""
        split = self.traffic.get_split(self.route)
        assert split is not None
        rng = np.random.default_rng([self.seed, int(now * 10)])
        for replica in ("router-a", "router-b"):
            n = int(rng.poisson(self.per_s * seconds / 2))
            if split.others:
                self._serve_test(replica, split, rng, n, now)
                self._report(replica, split)
                continue
            n_canary = int(rng.binomial(n, split.weight))
            if split.rollout_id is not None:
                stable, canary = self.stable, self.canary
                if split.window == "watch":  # the arms are swapped then, the models behind them are not
                    stable, canary = canary, stable
                self._append(replica, split, "stable", draw_counts(rng, stable, n - n_canary), now)
                self._append(replica, split, "canary", draw_counts(rng, canary, n_canary), now)
            self._report(replica, split)

    def _report(self, replica: str, split: Split) -> None:
        version = split.version if self.follow else 1
        report = RouterReport(replica=replica, versions={self.route: version}, in_flight=self.busy)
        self.traffic.report_router(report)

    def _serve_test(self, replica: str, split: Split, rng: np.random.Generator, n: int, now: float) -> None:
        """An A/B/n test: each student counts for its own rollout, the stable arm for all of them."""
        canary = [] if split.canary is None else [(split.canary.name, split.weight, split.rollout_id)]
        students = [*canary, *((s.upstream.name, s.weight, s.rollout_id) for s in split.others)]
        weights = [weight for _, weight, _ in students]
        drawn = rng.multinomial(n, [*weights, max(0.0, 1.0 - sum(weights))])
        stable = draw_counts(rng, self.stable, int(drawn[-1]))
        for (name, _, rollout), share in zip(students, drawn[:-1], strict=True):
            model = self.students.get(name, self.canary)
            self._append(replica, split, "canary", draw_counts(rng, model, int(share)), now, rollout)
            self._append(replica, split, "stable", stable, now, rollout)

    def _append(
        self,
        replica: str,
        split: Split,
        arm: str,
        counts: ArmCounts,
        now: float,
        rollout: str | None = None,
    ) -> None:
        if counts.n == 0:
            return
        self.seqs[replica] = self.seqs.get(replica, 0) + 1
        entry = LedgerEntry(
            replica=replica,
            seq=self.seqs[replica],
            route=self.route,
            rollout_id=rollout or split.rollout_id,
            arm=arm,
            split_version=split.version,
            at=now,
            counts=counts,
        )
        self.traffic.append_ledger([entry])


class Inline(Executor):
    """Runs what is submitted at once, in the caller's thread: no test waits for a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it."""
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class World:
    """A route with a teacher as its stable arm, and one rollout on it."""

    def __init__(
        self,
        folder: Path,
        policy: RolloutPolicy | None = None,
        state_url: str | None = None,
        **routers: object,
    ) -> None:
        self._open(state_url or f"sqlite:///{folder}/state.db", **routers)
        self.traffic.put_split(Split(route="support", version=1, salt="old", stable=TEACHER))
        self.spec = self.start(policy or demo_policy())
        self.controller = self.new_controller()

    @classmethod
    def over(cls, state_url: str, now: float) -> World:
        """The world around a store that is there already: its active rollout, routers that count on."""
        world = cls.__new__(cls)
        world._open(state_url)
        world.now = now
        (world.spec,) = (one.spec for one in world.rollouts.active())
        world.routers.seqs = world.traffic.ledger_ends()
        world.controller = world.new_controller("after")
        return world

    def _open(self, state_url: str, **routers: object) -> None:
        self.state_url = state_url
        self.engine: Engine = open_state(self.state_url)
        self.rollouts, self.traffic = RolloutState(self.engine), TrafficState(self.engine)
        self.deployer = FakeDeployer()
        self.told: list[str] = []
        self.reply = Reply(200, "")
        """What confirming hooks answer."""
        self.asked: list[tuple[str, str]] = []
        """(hook, event id) of every question."""
        self.now = T0
        self.routers = Routers(self.traffic, **routers)  # type: ignore[arg-type]

    def start(self, policy: RolloutPolicy, version: int = 1) -> RolloutSpec:
        """Ask for a rollout."""
        spec = make_spec(policy, "support", record(version), now=self.now)
        self.rollouts.create(spec, initial(spec))
        return spec

    def new_controller(self, holder: str = "one") -> Controller:
        """A controller over the same store; a new one stands for a restarted process."""
        return Controller(
            self.engine,
            self.deployer,
            on_promoted=lambda spec: self.told.append("promoted"),
            on_rolled_back=lambda spec: self.told.append("rolled_back"),
            on_restored=lambda spec: self.told.append("restored"),
            confirmer=Confirmer(self._answer, Inline()),
            holder=holder,
            clock=lambda: self.now,
        )

    def _answer(self, hook: HookSpec, body: str, event: str, event_id: str, now: float) -> Reply:
        self.asked.append((hook.label, event_id))
        return self.reply

    @property
    def stored(self) -> StoredRollout:
        """The rollout as it is stored."""
        return self.rollouts.get(self.spec.id)

    @property
    def status(self) -> RolloutStatus:
        """The stored status."""
        return self.rollouts.get(self.spec.id).status

    @property
    def split(self) -> Split:
        """The stored split."""
        found = self.traffic.get_split("support")
        assert found is not None
        return found

    def step(self, seconds: float = 1.0) -> RolloutStatus:
        """Let time and traffic pass, then one controller tick."""
        self.now += seconds
        self.routers.serve(self.now, seconds)
        assert self.controller.tick()
        return self.status

    def until(self, *phases: Phase, limit_s: float = 900.0) -> RolloutStatus:
        """Step until one of the phases, or until it is over."""
        deadline = self.now + limit_s
        while self.status.phase not in phases and not self.status.phase.terminal and self.now < deadline:
            self.step()
        return self.status

    def ask(self, verb: str, reason: str = "") -> None:
        """A person's command."""
        self.rollouts.add_command(self.spec.id, verb, "ann", reason)
