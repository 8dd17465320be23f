"""search: the best student within a budget, by successive halving: from a job's rows to a job's settings.

Candidates that are within the bytes (and, by a cost model that is fitted to a few timed engines, within the
latency) climb the rungs: each shape is trained a rung's tokens further from its own checkpoint, once for all
of its precisions, and the survivors are chosen by loss and bytes. Those that reach the last rung are timed by
the real engine, which decides. Interrupted anywhere, the same call goes on. Knows nothing about terminals.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from contracts.errors import ConfigError, DataError
from distill_jobs.config import DistillConfig
from distill_jobs.keys import model_folder
from distill_jobs.search.config import SearchConfig
from distill_jobs.search.cost import CostModel, anchors, fit
from distill_jobs.search.halving import Rung, rungs_of, survivors
from distill_jobs.search.space import Candidate, Frame, candidates
from distill_jobs.search.state import RungState, State, open_state, save
from distill_jobs.search.students import OnStep, Students, train_config
from distill_jobs.stage import locked
from distill_jobs.training.data import Rows
from registry.digest import digest_folder

Say = Callable[[str], None]
Timer = Callable[[Candidate, Path], float]
"""(candidate, a checkpoint of its shape) → tokens/s."""
_LINE_EVERY_S = 15.0
_NO_SLOWER = 1.25
"""A prediction may be wrong by so much before its candidate is left out: the engine has the last word."""


@dataclass(frozen=True)
class Found:
    """One candidate, as far as it came."""

    candidate: Candidate
    rung: int
    """The last rung that it was compared on, from 0."""
    tokens: int
    loss: float
    tokens_per_s: float | None
    """Measured; None where nobody timed it."""
    fits: bool
    """False where the engine measured it slower than the budget."""


@dataclass(frozen=True)
class Outcome:
    """A finished search."""

    found: list[Found]
    """Best first among those that reached the same rung; the last rung first."""
    chosen: Found | None
    """None when all that reached the last rung turned out too slow."""
    frame: Frame
    plan: list[Rung]
    model: CostModel | None


@dataclass
class Search:
    """A search in its folder, with what it calls."""

    config: SearchConfig
    job: DistillConfig
    rows: Path
    held_out: Path
    say: Say
    timer: Timer | None = None
    """Instead of the engine, in tests."""
    state: State = field(init=False)
    students: Students = field(init=False)
    frame: Frame = field(init=False)

    def run(self) -> Outcome:
        """Search to the end. Raises: ConfigError when nothing fits; what training and engine raise."""
        with locked(self.config.folder):
            self._open()
            within = candidates(self.frame, self.config.space, self.config.budget, self.config.start == "cut")
            self.say(f"{len(within)} candidates within the budget's bytes")
            model = self._cost_model(within) if self.config.budget.is_latency else None
            drawn = self._draw(self._fast_enough(within, model))
            plan = rungs_of(self.config.halving, len(drawn))
            self._train_with(plan)
            last = self._climb(drawn, plan)
            for one in last if self.config.speed.measure else []:
                self._time(one)
            found = self._found(within)
            self._save(finished=True)
            chosen = next((f for f in found if f.rung == len(plan) - 1 and f.fits), None)
            return Outcome(found, chosen, self.frame, plan, model)

    def _open(self) -> None:
        from transformers import AutoConfig

        if self.job.train.lora is not None:
            raise ConfigError(
                "distill: train.lora: a search trains whole weights; leave lora out of the job."
            )
        config, teacher = self.config, str(model_folder(self.job.teacher))
        self.frame = Frame.of(AutoConfig.from_pretrained(teacher))
        told = config.model_dump(mode="json", exclude={"folder", "distill", "rows", "held_out", "threads"})
        inputs = {
            "teacher": digest_folder(Path(teacher)),
            "rows": [digest_folder(self.rows), digest_folder(self.held_out)],
            "training": self.job.train.model_dump(mode="json", exclude=self.job.train.OPERATIONAL),
            **{f"setting {name}": value for name, value in told.items()},
        }
        self.state = open_state(config.folder, inputs)
        base = self.job.train
        self.students = Students(
            teacher=teacher,
            frame=self.frame,
            rows=Rows(self.rows, base.max_length, base.cached_teacher),
            held_out=Rows(self.held_out, base.max_length, base.cached_teacher),
            train=base,
            folder=config.folder / "shapes",
            cut=config.start == "cut",
            importance_rows=config.importance_rows,
            seed=config.seed,
        )
        if not len(self.students.rows) or not len(self.students.held_out):
            raise DataError(f"{self.rows} or {self.held_out} holds no rows.")

    def _train_with(self, plan: list[Rung]) -> None:
        first, most, rows = plan[0].tokens, plan[-1].tokens, self.students.rows
        self.students.train = train_config(self.job.train, rows, first, most, self.config.threads)

    def _draw(self, within: list[Candidate]) -> list[Candidate]:
        """At most `halving.candidates` of them, drawn by the seed."""
        wanted = self.config.halving.candidates
        if len(within) <= wanted:
            return within
        kept = random.Random(self.config.seed).sample(range(len(within)), wanted)
        return [within[i] for i in sorted(kept)]

    def _climb(self, drawn: list[Candidate], plan: list[Rung]) -> list[Candidate]:
        """Train rung by rung; those that reach the last one, best first."""
        standing = {one.name: one for one in drawn}
        for number, rung in enumerate(plan):
            if number == len(self.state.rungs):
                self.state = self.state.model_copy(
                    update={
                        "rungs": [*self.state.rungs, RungState(tokens=rung.tokens, candidates=[*standing])]
                    }
                )
                self._save()
            self._rung(number, len(plan), standing)
            losses = self.state.rungs[number].losses
            costs = {name: float(one.bytes) for name, one in standing.items()}
            last = number + 1 == len(plan)
            keep = len(standing) if last else plan[number + 1].candidates
            standing = {name: standing[name] for name in survivors(costs, losses, keep)}
        return list(standing.values())

    def _rung(self, number: int, rungs: int, standing: dict[str, Candidate]) -> None:
        """Measure who is not measured yet; one training a shape, one save a shape."""
        of_shape: dict[str, list[Candidate]] = {}
        for one in standing.values():
            of_shape.setdefault(one.shape.name, []).append(one)
        for place, mine in enumerate(of_shape.values()):
            rung = self.state.rungs[number]
            if all(one.name in rung.losses for one in mine):
                continue
            shape = mine[0].shape
            model, tokens = self.students.advance(shape, rung.tokens, self._ticks(shape.name))
            losses = {one.name: self.students.loss(model, one.precision) for one in mine}
            new = rung.model_copy(
                update={
                    "losses": rung.losses | losses,
                    "trained": rung.trained | dict.fromkeys(losses, tokens),
                }
            )
            self.state.rungs[number] = new
            self._save()
            best = min(losses.values())
            self.say(
                f"rung {number + 1}/{rungs}, student {place + 1}/{len(of_shape)}: {shape.name},"
                f" {tokens:,} tokens, loss {best:.4f}"
            )

    def _ticks(self, name: str) -> OnStep:
        """A line now and then while a student is trained."""
        last = [time.monotonic()]

        def tick(done: int, total: int) -> None:
            if time.monotonic() - last[0] > _LINE_EVERY_S:
                last[0] = time.monotonic()
                self.say(f"{name}: {done:,} of {total:,} tokens")

        return tick

    def _cost_model(self, within: list[Candidate]) -> CostModel:
        """Fitted to the anchors' measured steps."""
        timed = [(one, self.config.speed.batch / self._time(one)) for one in anchors(within, self.frame)]
        model = fit(self.frame, timed)
        self.say(
            f"cost model of {len(timed)} timed engines: {1e3 * model.fixed:.2f} ms a step,"
            f" {1e3 * model.launch:.3f} ms a layer; wrong by at most {model.worst:.0%} on them"
        )
        return model

    def _fast_enough(self, within: list[Candidate], model: CostModel | None) -> list[Candidate]:
        """Without those that are surely too slow."""
        if model is None:
            return within
        budget, batch = self.config.budget, self.config.speed.batch
        kept = [one for one in within if budget.fast_enough(model.step_s(one) / _NO_SLOWER, batch)]
        self.say(f"{len(kept)} of {len(within)} may be fast enough")
        if not kept:
            best = min(within, key=model.step_s)
            raise DataError(
                f"budget: nothing in the space is fast enough; {best.name} may come nearest, with"
                f" {1e3 * model.step_s(best):.2f} ms a step. Add smaller students or allow more time."
            )
        return kept

    def _time(self, one: Candidate) -> float:
        """Tokens/s, measured once."""
        if one.name not in self.state.speeds:
            self.say(f"timing {one.name}")
            start = self.students.start(one.shape)
            value = self.timer(one, start) if self.timer else self._by_engine(one, start)
            self.state = self.state.model_copy(update={"speeds": {**self.state.speeds, one.name: value}})
            self._save()
        return self.state.speeds[one.name]

    def _by_engine(self, one: Candidate, start: Path) -> float:
        from distill_jobs.search.speed import tokens_per_s

        config, folder = self.config, self.config.folder / "timed"
        return tokens_per_s(one, start, self.students.held_out, folder, config.speed, config.threads)

    def _found(self, within: list[Candidate]) -> list[Found]:
        """Everybody's last measurement."""
        by_name = {one.name: one for one in within}
        found: dict[str, Found] = {}
        for number, rung in enumerate(self.state.rungs):
            for name, loss in rung.losses.items():
                speed = self.state.speeds.get(name)
                batch = self.config.speed.batch
                fits = speed is None or self.config.budget.fast_enough(batch / speed, batch)
                found[name] = Found(by_name[name], number, rung.trained[name], loss, speed, fits)
        return sorted(found.values(), key=lambda one: (-one.rung, one.loss, one.candidate.bytes))

    def _save(self, finished: bool = False) -> None:
        if finished:
            self.state = self.state.model_copy(update={"finished": True})
        save(self.state, self.config.folder)
