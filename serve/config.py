"""The stack's configuration: one YAML file that says what `stillhouse up` starts.

Importable in a fraction of a second, without ray, vllm or torch. Knows how the parts are named and where they
keep their files; knows nothing about how they are started (serve.app).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from contracts.cascade import CascadeFields
from contracts.config import StrictConfig, load_config
from contracts.errors import ConfigError
from contracts.grading import GraderSet, Mode, PrometheusConfig
from contracts.logs import LogConfig
from contracts.price import Price
from contracts.routes import RouteFields, RouteSettings, Shadow, ShadowFields
from contracts.traffic import NAME, Cascade, Upstream
from serve import placement
from serve.engine.config import EngineOptions
from serve.placement import Placement, Reservation, Resources
from serve.rollout.policy import RolloutPolicy
from serve.router.config import RequestLogConfig, RouterConfig

CONFIG_ENV = "STILLHOUSE_CONFIG"
SEARCHED = ("stillhouse.yaml", "configs/stillhouse.yaml")
_PLACES = {"prices": "upstreams.<name>.cost", "student_price": "students.cost"}


class HttpSection(StrictConfig):
    """Where clients connect."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    haproxy_standby: bool = True
    """Two HAProxy processes of the stack's own on this address, so that one may die at any time. Only with a
    Ray of our own and its `haproxy`; a cluster has one on every node, and something in front of them."""


class AdminSection(StrictConfig):
    """Where the admin API listens; whoever uses it needs an admin key."""

    host: str = "127.0.0.1"
    port: int = Field(ge=1, le=65535)


class NodeSection(StrictConfig):
    """A further node of our own Ray on this machine: a raylet of its own, as a cluster's worker pod is."""

    num_cpus: int = Field(default=16, ge=1)
    """Its logical CPUs."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs of this machine that Ray may hand out there."""
    resources: Resources = Field(default_factory=dict)
    """What it has of the resources that placements name, e.g. {students: 4}: on a cluster, what the worker
    group of the same purpose says in its `rayStartParams.resources`."""


class RaySection(StrictConfig):
    """The Ray that runs everything. One of our own by default, an existing cluster by `address`."""

    address: str | None = None
    """e.g. 'auto' or '10.0.0.5:6379' to join a running cluster instead of starting one."""
    num_cpus: int = Field(default=16, ge=1)
    """Logical CPUs of our own Ray: a weight that engines, routers and training share, not cores."""
    num_gpus: int | None = Field(default=None, ge=0)
    """GPUs of our own Ray; None: those it finds."""
    resources: Resources = Field(default_factory=dict)
    """What the first node of our own Ray has of the resources that placements name, e.g. {routers: 1}."""
    nodes: dict[Annotated[str, Field(pattern=placement.NAME)], NodeSection] = Field(default_factory=dict)
    """Further nodes of our own Ray by name: a cluster on one machine. One that dies is started again."""
    object_store_mb: int = Field(default=256, ge=80)
    temp_dir: Path | None = None
    """Short folder for Ray's sockets; default /tmp/sh-<digest of run_dir> (socket paths end at 107 bytes)."""
    haproxy: bool = True
    """HAProxy in front of the routers instead of Ray's own proxy: a tenth of the latency."""


class EngineSection(EngineOptions):
    """An engine that the stack itself runs."""

    model: str = Field(min_length=1)
    """Folder of a checkpoint, or a Hugging Face id."""


class CascadeSection(CascadeFields):
    """Two declared upstreams: a cheap one is asked first, the other when it is unsure."""

    first: str
    """Name of a declared upstream, usually a student."""
    then: str
    """Name of a declared upstream, usually the teacher."""


class UpstreamSection(StrictConfig):
    """A declared upstream: an engine of ours, any OpenAI-compatible URL, or a cascade of two others. Exactly
    one of the three."""

    engine: EngineSection | None = None
    url: str | None = None
    """e.g. https://api.example.com/v1"""
    cascade: CascadeSection | None = None
    """Who is asked first, who then, and when; see docs/guides/cascade.md."""
    model: str | None = None
    """Model name the upstream expects; needed with a url, defaults to the upstream's name with an engine."""
    api_key_env: str | None = None
    """Environment variable that holds the key for the url."""
    cost: Price | None = None
    """What it costs, for rollout reports: `{prompt_per_million, completion_per_million}` of a hosted model,
    or `{per_hour}` of machines of our own; None: not known, and said so."""

    @model_validator(mode="after")
    def _one_kind(self) -> UpstreamSection:
        if [self.engine, self.url, self.cascade].count(None) != 2:
            raise ValueError(
                "give exactly one of 'engine' (we run it), 'url' (somebody else does) and 'cascade' (of two "
                "others)"
            )
        if self.cascade is not None and (self.model or self.api_key_env or self.cost):
            raise ValueError(
                "'model', 'api_key_env' and 'cost' belong to the upstreams of a cascade, not to it"
            )
        if self.url is not None and self.model is None:
            raise ValueError("'url' needs 'model': the model name to send there")
        return self


class ShadowSection(ShadowFields):
    """A second upstream that sees a sample of a route's traffic."""

    upstream: str
    """Name of a declared upstream."""


class RouteSection(RouteFields):
    """One route: its upstream's name alone, or with settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    upstream: str
    """Name of the declared upstream that answers before any rollout."""
    fallbacks: tuple[str, ...] = ()
    """Names of declared upstreams that are asked when the arm failed, in this order."""
    shadow: ShadowSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _just_a_name(cls, data: Any) -> Any:
        return {"upstream": data} if isinstance(data, str) else data

    def named_upstreams(self) -> list[str]:
        """Every upstream this section names."""
        shadow = [] if self.shadow is None else [self.shadow.upstream]
        return [self.upstream, *self.fallbacks, *shadow]


class StudentsSection(EngineOptions):
    """How the students that rollouts deploy are run, and what one costs."""

    cost: Price | None = None
    """As of an upstream; usually `{per_hour}`, of all replicas of one student together."""


class RouterSection(RouterConfig, Placement):
    """The routers: everything of RouterConfig, how many, and where they run."""

    state_url: str = ""
    """Leave it out: the stack's own state_url is used."""
    replicas: int = Field(default=2, ge=1)
    """Router processes."""

    @field_validator("state_url", "graders", "upstreams", "logging", "prices", "student_price")
    @classmethod
    def _not_here(cls, value: Any, info: ValidationInfo) -> Any:
        if value and value != LogConfig():
            place = _PLACES.get(str(info.field_name), f"{info.field_name} at the top level of the file")
            raise ValueError(f"set {place}; the router uses that one")
        return value


class ServeConfig(GraderSet):
    """Everything `stillhouse up` needs."""

    run_dir: Path = Path("runs/stack")
    """Folder of this stack: state, logs, request log. One running stack a folder."""
    state_url: str = ""
    """SQLAlchemy URL of the state store; default: SQLite in run_dir."""
    registry_uri: str = ""
    """MLflow tracking URI; default: SQLite in run_dir."""
    http: HttpSection = HttpSection()
    admin: AdminSection | None = None
    """The admin API beside the stack; None: it is not started."""
    ray: RaySection = RaySection()
    router: RouterSection = RouterSection()
    upstreams: dict[str, UpstreamSection]
    """Upstream name → what it is. Usually at least the teacher."""
    routes: dict[str, RouteSection]
    """Route (the model name clients ask for) → the upstream that answers before any rollout, and settings."""
    prometheus: PrometheusConfig | None = None
    """Where metrics of kind `query` are asked; None: a policy cannot have any."""
    logging: LogConfig = LogConfig()
    """How all processes of the stack log: format, level, slow requests."""
    policies: dict[str, RolloutPolicy] = Field(default_factory=dict)
    """Rollout policies by name; 'default' is used when none is named."""
    controller: Reservation = Reservation()
    """Where the rollout controller runs."""
    students: StudentsSection = StudentsSection()
    """Engine options of the students that rollouts deploy, and their cost."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """`up` gives up when the stack did not answer after this."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        run_dir = Path(data.get("run_dir") or "runs/stack").expanduser().resolve()
        defaults = {
            "state_url": f"sqlite:///{run_dir}/state.db",
            "registry_uri": f"sqlite:///{run_dir}/registry/mlflow.db",
        }
        return {**data, "run_dir": run_dir, **{k: data.get(k) or v for k, v in defaults.items()}}

    @model_validator(mode="after")
    def _names_fit(self) -> ServeConfig:
        if not self.upstreams or not self.routes:
            raise ValueError("give at least one entry in 'upstreams' and one in 'routes'")
        for route, section in self.routes.items():
            for upstream in section.named_upstreams():
                if upstream not in self.upstreams:
                    known = ", ".join(sorted(self.upstreams))
                    raise ValueError(f"routes.{route}: there is no upstream {upstream!r}; there are: {known}")
        for upstream, field in self.upstreams_named().items():
            if upstream not in self.upstreams:
                known = ", ".join(sorted(self.upstreams))
                raise ValueError(f"{field}: there is no upstream {upstream!r}; there are: {known}")
        for name, grader in self.graders.items():
            if missing := sorted(set(grader.routes) - set(self.routes)):
                raise ValueError(f"graders.{name}.routes: there is no route {missing[0]!r}")
        return self

    @model_validator(mode="after")
    def _cascades_fit(self) -> ServeConfig:
        for name, section in self.upstreams.items():
            cascade = section.cascade
            if cascade is None:
                continue
            for field in ("first", "then"):
                part = getattr(cascade, field)
                plain = sorted(n for n, u in self.upstreams.items() if u.cascade is None)
                if part not in plain:
                    raise ValueError(
                        f"upstreams.{name}.cascade.{field}: {part!r} is no plain upstream; "
                        f"there are: {', '.join(plain) or 'none'}"
                    )
            if cascade.first == cascade.then:
                raise ValueError(f"upstreams.{name}.cascade.then: must be another upstream than 'first'")
            if cascade.grader is not None:
                self._grades_answers(cascade.grader, f"upstreams.{name}.cascade.grader")
        return self

    def _grades_answers(self, grader: str, field: str) -> None:
        single = sorted(n for n, g in self.graders.items() if g.mode is Mode.SCORE)
        if grader not in single:
            known = ", ".join(single) or "none"
            raise ValueError(f"{field}: there is no grader of single answers {grader!r}; there are: {known}")

    @model_validator(mode="after")
    def _nodes_fit(self) -> ServeConfig:
        ray = self.ray
        if ray.address is not None:
            if ray.nodes or ray.resources:
                raise ValueError("ray.nodes and ray.resources are of our own Ray; not with ray.address")
            return self
        offered = {*ray.resources, *(name for node in ray.nodes.values() for name in node.resources)}
        for field, wanted in self._reservations().items():
            if missing := sorted(set(wanted.resources) - offered):
                raise ValueError(
                    f"{field}.resources: no node has {missing[0]!r}; give it to one by ray.resources or "
                    "ray.nodes.NAME.resources"
                )
        return self

    def _reservations(self) -> dict[str, Reservation]:
        """Field → what each replica of it takes from its node."""
        engines = {f"upstreams.{name}.engine": section.engine for name, section in self.upstreams.items()}
        ours: dict[str, Reservation] = {f: engine for f, engine in engines.items() if engine is not None}
        return {"router": self.router, "controller": self.controller, "students": self.students, **ours}

    def route_settings(self, route: str) -> RouteSettings | None:
        """The settings the file gives a route, None when it only names its upstream."""
        section = self.routes[route]
        if section.model_fields_set <= {"upstream"}:
            return None
        shadow = section.shadow
        return RouteSettings(
            route=route,
            **{f: getattr(section, f) for f in RouteFields.model_fields},
            fallbacks=tuple(self.upstream(name) for name in section.fallbacks),
            shadow=None
            if shadow is None
            else Shadow(upstream=self.upstream(shadow.upstream), **shadow.model_dump(exclude={"upstream"})),
        )

    @field_validator("upstreams", "routes")
    @classmethod
    def _are_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        import re

        wrong = [name for name in value if not re.match(NAME, name)]
        if wrong:
            raise ValueError(f"names are letters, digits, '.', '_' and '-'; not {', '.join(wrong)}")
        return value

    def upstream(self, name: str) -> Upstream:
        """The declared upstream as the rest of the system says it."""
        section = self.upstreams[name]
        if section.url is not None:
            return Upstream(
                name=name, model=section.model or name, url=section.url, api_key_env=section.api_key_env
            )
        if section.cascade is not None:
            asked = {
                "first": self.upstream(section.cascade.first),
                "then": self.upstream(section.cascade.then),
            }
            fields = {f: getattr(section.cascade, f) for f in CascadeFields.model_fields}
            return Upstream(name=name, model=name, cascade=Cascade(**fields, **asked))
        return Upstream(name=name, model=section.model or name, app=f"upstream-{name}")

    def upstream_nouns(self) -> list[Upstream]:
        """All declared upstreams."""
        return [self.upstream(name) for name in self.upstreams]

    def router_config(self) -> RouterConfig:
        """What every router replica reads, with the stack's own places filled in."""
        fields = {name: getattr(self.router, name) for name in RouterConfig.model_fields}
        fields["state_url"] = self.state_url
        fields["routes"] = self.router.routes or tuple(self.routes)
        fields["graders"] = self.graders
        fields["logging"] = self.logging
        fields["upstreams"] = {name: self.upstream(name) for name in self.upstreams_named()}
        fields["prices"] = {name: u.cost for name, u in self.upstreams.items() if u.cost is not None}
        fields["student_price"] = self.students.cost
        fields["log"] = self.router.log or RequestLogConfig(dir=str(self.run_dir / "requests"))
        return RouterConfig(**fields)

    @property
    def own_front(self) -> bool:
        """True when the public address is served by HAProxy processes of the stack's own."""
        return self.http.haproxy_standby and self.ray.haproxy and self.ray.address is None

    @property
    def log_dir(self) -> Path:
        """Logs of engines and of the supervisor."""
        return self.run_dir / "logs"

    @property
    def metrics_dir(self) -> Path:
        """Where router replicas and the controller of this host count together."""
        return self.run_dir / "metrics"

    @property
    def ray_dir(self) -> Path:
        """Ray's sockets and session logs."""
        digest = hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:8]
        return self.ray.temp_dir or Path("/tmp") / f"sh-{digest}"


def find_config(path: str | Path | None = None) -> Path:
    """The file to read: the argument, $STILLHOUSE_CONFIG, ./stillhouse.yaml, ./configs/stillhouse.yaml.

    Raises: ConfigError saying where it looked.
    """
    named = path or os.environ.get(CONFIG_ENV)
    if named:
        return Path(named)
    for candidate in SEARCHED:
        if Path(candidate).is_file():
            return Path(candidate)
    raise ConfigError(
        f"no configuration: looked for {' and '.join(SEARCHED)} in {Path.cwd()}. "
        f"Give one with --config FILE or {CONFIG_ENV}=FILE."
    )


def load_serve_config(path: str | Path | None = None) -> ServeConfig:
    """Find, read and check the stack's configuration. Raises: ConfigError naming the field and the fix."""
    return load_config(find_config(path), ServeConfig)
