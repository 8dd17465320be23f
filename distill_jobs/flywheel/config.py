"""What the flywheel may be told: which logs to watch, what starts a distillation, what it may cost.

One file for all routes. Importable without torch, ray or numpy. Knows nothing about how it is measured.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, field_validator, model_validator

from contracts.config import StrictConfig
from contracts.metrics import GRADE, GRADER_NAME
from contracts.traffic import NAME
from distill_jobs.flywheel.schedule import parse_hours, parse_schedule


def _schedule(text: str) -> str:
    parse_schedule(text)
    return text


def _hours(text: str) -> str:
    parse_hours(text)
    return text


class DriftTrigger(StrictConfig):
    """Requests (or the student's grades) are no longer what the last training window held.

    Each look is a seeded permutation test over whole conversations; the j-th look since the last run spends
    alpha / (j (j + 1)), so that all looks together are wrong with at most alpha.
    """

    at_least: float = Field(default=0.02, ge=0)
    """Jensen-Shannon divergence in bits, of hashed words or of lengths, beyond what chance gives."""
    grade_drop: float = Field(default=0.03, ge=0, le=1)
    """Fall of the mean grade of students' answers."""
    alpha: float = Field(default=0.01, gt=0, lt=1)
    """Chance of a false alarm between two runs, over all looks; the requests' and the grades' each."""
    units: int = Field(default=1024, ge=50, le=8192)
    """Conversations in either sample: a uniform sample of the training window, and the latest ones."""
    min_units: int = Field(default=200, ge=20)
    """No look before both samples hold so many."""
    growth: float = Field(default=1.5, gt=1)
    """The next look comes when so many times as many conversations have come as at the last one."""
    grader: str = Field(default=GRADE, pattern=GRADER_NAME)
    """Whose scores in the log are the grades."""
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> DriftTrigger:
        if self.min_units > self.units:
            raise ValueError(
                f"min_units {self.min_units} is more than units {self.units}: no look would ever be"
            )
        return self


class FeedbackTrigger(StrictConfig):
    """Users call too many answers bad: the Wilson lower bound of their share is over a bound."""

    bad_share: float = Field(gt=0, lt=1)
    min_judgements: int = Field(default=20, ge=1)
    """No look before so many judgements since the last run."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """One-sided, over all looks between two runs (spent as the drift's)."""
    growth: float = Field(default=1.5, gt=1)


class Triggers(StrictConfig):
    """What starts a distillation; any one of them is enough."""

    rows: int | None = Field(default=None, ge=1)
    """Usable rows logged since the last run."""
    drift: DriftTrigger | None = None
    feedback: FeedbackTrigger | None = None
    schedule: Annotated[str, AfterValidator(_schedule)] | None = None
    """ "every 6h", "every 30m", "03:00 daily" or "03:00 mon,thu", in the flywheel's time zone."""


class RouteConfig(StrictConfig):
    """One route: its distillation, and what starts it."""

    distill: Path
    """Configuration of the distillation. Its workdir is replaced by the run's own; collect.route and ray are
    set when the file leaves them out."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted fields of the distillation's configuration, e.g. train.epochs: 2."""
    triggers: Triggers
    min_rows: int = Field(default=200, ge=0)
    """No trigger but a person's starts a run with fewer new usable rows."""
    cooldown_h: float = Field(default=6.0, ge=0)
    """Hours from the end of a run to the next; doubled with every failure in a row, up to a week."""
    quiet_hours: tuple[Annotated[str, AfterValidator(_hours)], ...] = ()
    """Times of day in which nothing is started, e.g. "09:00-18:00" or "22:00-02:00"."""
    window_days: float | None = Field(default=None, gt=0)
    """Train on the log's last days only (collect.since); None takes what is there."""
    retries: int = Field(default=2, ge=0)
    """Times that a run which failed is gone on with, in the same workdir, before it counts as failed."""
    command: tuple[str, ...] = ()
    """What is run instead of this installation's pipeline; {config}, {workdir}, {route} and {run} are filled
    in. Exit codes as `stillhouse distill`: 0 published, 3 refused by a gate."""
    on_published: tuple[str, ...] = ()
    """A command to run after a student was published, with {route}, {ref} and {run} filled in: [stillhouse,
    rollout, start, "{route}", "{ref}"]. It may be run again after a crash. Off by default."""
    on_published_timeout_s: float = Field(default=120, gt=0)


class BudgetConfig(StrictConfig):
    """What distillation may take of the machine and of the teacher, all routes together."""

    runs: int = Field(default=1, ge=1)
    """Runs at a time; of one route there is never more than one."""
    cpus: int | None = Field(default=None, ge=1)
    """Processors that a run may use (the last ones of the machine, by affinity); None: all."""
    nice: int = Field(default=10, ge=0, le=19)
    memory_gb: float | None = Field(default=None, gt=0)
    """Resident memory of a run's processes (shared pages once); a run that takes more is ended as failed."""
    gpus: str = ""
    """CUDA_VISIBLE_DEVICES of a run, e.g. "1"; empty shows it none, so that serving's are safe."""
    max_run_hours: float | None = Field(default=None, gt=0)
    """Working hours of one run; one that takes more is ended as failed."""
    hours_per_day: float | None = Field(default=None, gt=0)
    """Working hours of all runs in any 24 hours; at the bound running ones yield and go on later."""
    teacher_tokens_per_day: int | None = Field(default=None, ge=1)
    """Tokens that the teacher was asked for in any 24 hours. A run is not started when the day's tokens and
    those of the route's last run together are more."""


class PressureConfig(StrictConfig):
    """When serving needs the machine: runs are stopped (SIGSTOP), and after a while end and wait."""

    metrics_url: str | None = Field(default=None, pattern=r"^https?://")
    """Prometheus text of a router, e.g. http://127.0.0.1:8000/metrics."""
    latency_metric: str = "stillhouse_ttft_seconds"
    """Histogram whose p99 between two looks is bounded."""
    p99_s: float | None = Field(default=None, gt=0)
    """Give an edge of the histogram, because a p99 is known by the upper edge of its bucket alone; the
    router's are 0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 1, 2, 3, 6, 15 and 60."""
    min_requests: int = Field(default=20, ge=1)
    """Fewer requests between two looks have no p99."""
    queue_metric: str = "stillhouse_in_flight"
    """Gauge, summed over its series, e.g. vllm:num_requests_waiting."""
    queue: float | None = Field(default=None, ge=0)
    busy: float | None = Field(default=None, gt=0, le=1)
    """Share of the machine's processors that others than our runs keep busy (the load average would count
    ours too)."""
    free_memory_gb: float | None = Field(default=None, gt=0)
    """Less available memory than this is pressure."""
    looks: int = Field(default=2, ge=1)
    """Looks in a row over a bound that are pressure."""
    calm_s: float = Field(default=60, ge=0)
    """Seconds without pressure before a run goes on, or starts."""
    yield_after_s: float = Field(default=600, ge=0)
    """A run stopped for longer is ended (SIGTERM), which frees its memory, and waits in the queue; it goes on
    from its last checkpoint. 0, or a run on somebody else's Ray cluster: ended at once."""


class FlywheelConfig(StrictConfig):
    """All of it."""

    dir: Path
    """Folder of the flywheel's state; a run's workdir is <dir>/<route>/<date>-<n>."""
    routes: dict[str, RouteConfig] = Field(min_length=1)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    pressure: PressureConfig = Field(default_factory=PressureConfig)
    timezone: str = "UTC"
    """Of schedules, quiet hours and the date in a workdir's name, e.g. Europe/Berlin."""
    poll_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks at logs, runs and the machine."""
    read_mb: float = Field(default=64.0, gt=0)
    """Log read of one route in one look, at most; a long log is caught up with over several."""
    grace_s: float = Field(default=60.0, gt=0)
    """Seconds between SIGTERM and SIGKILL."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on 127.0.0.1 for Prometheus; <dir>/flywheel.prom is always written (textfile collector)."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as err:
            raise ValueError(f"{value!r} is not a time zone; write e.g. UTC or Europe/Berlin") from err
        return value

    @field_validator("routes")
    @classmethod
    def _route_names(cls, value: dict[str, RouteConfig]) -> dict[str, RouteConfig]:
        wrong = [name for name in value if not re.match(NAME, name)]
        if wrong:
            raise ValueError(f"{wrong} cannot be routes: letters, digits, '.', '_' and '-', at most 128")
        return value
