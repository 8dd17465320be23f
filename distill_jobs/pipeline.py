"""The distillation pipeline on one screen: collect → (augment) → teach → train → quantize → evaluate → gate →
publish.

Each stage works in `<workdir>/<stage>-<key>/` and writes its manifest last; a finished stage is skipped, an
interrupted one goes on from its last unit of work. Knows the order of the stages, and nothing of their
insides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contracts.config import dump_resolved
from contracts.dataset import Manifest
from contracts.errors import ConfigError
from contracts.gates import GateReport
from distill_jobs import augment, collect, evaluate, gate, publish, quantize, teach, train
from distill_jobs.augmenting.prompts import prompt_digests
from distill_jobs.champion import Champion, pin_champion, stored_metrics
from distill_jobs.collecting.window import Segment, pin_window
from distill_jobs.config import DistillConfig
from distill_jobs.evaluation_set import pin_dataset, read_rows
from distill_jobs.keys import key_config, model_digest, model_folder
from distill_jobs.measuring.harness import tasks_digest
from distill_jobs.progress import Listener, Progress
from distill_jobs.stage import ORDER, Job, Result, Work, locked, read_manifest
from distill_jobs.teaching.ask import ApiVoice, EngineVoice, Voice
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.training.method_config import LoraConfig
from registry.digest import digest_file
from registry.store import Registry

PARENTS: dict[str, tuple[str, ...]] = {
    "collect": (),
    "augment": ("collect",),
    "teach": ("collect", "augment"),
    "train": ("teach",),
    "quantize": ("train", "collect"),
    "evaluate": ("train", "quantize"),
    "publish": ("quantize", "evaluate"),
}
"""Whose outputs a stage reads, where they are part of the job; the gate stands between evaluate and publish.
"""


@dataclass(frozen=True)
class PipelineResult:
    """What a job made. `ref` is None when only some stages were run."""

    ref: str | None
    manifests: dict[str, Manifest]
    gates: GateReport | None


@dataclass(frozen=True)
class Inputs:
    """What a job reads, fixed when it first starts: log window, evaluation requests, teacher."""

    window: list[Segment]
    dataset: Path
    dataset_digest: str
    teacher: Path
    teacher_digest: str
    champion: Champion | None = None
    """None when no gate compares with one."""


def run_pipeline(
    config: DistillConfig,
    *,
    only: str | None = None,
    override_gate: str | None = None,
    listener: Listener | None = None,
    say: Callable[[str], None] = print,
    registry: Registry | None = None,
    trainer: train.Trainer | None = None,
) -> PipelineResult:
    """Run a job to its end, or go on with one that was interrupted. `only` runs one stage over finished ones.

    Raises: GateError when the student is not good enough; ConflictError when the workdir is in use.
    """
    if only is not None and only not in order_of(config):
        raise ConfigError(f"There is no stage {only!r} in this job. Stages: {', '.join(order_of(config))}.")
    with locked(config.workdir):
        dump_resolved(config, config.workdir / "config.json")
        job = Job(config.workdir, Progress(config.workdir / "progress.json", listener), only)
        opened = registry or publish.open_registry(config.publish)
        try:
            return _stages(config, job, pin_inputs(config, opened), override_gate, say, opened, trainer)
        except BaseException as err:
            job.progress.end("stopped" if isinstance(err, KeyboardInterrupt) else "failed")
            raise


def order_of(config: DistillConfig) -> tuple[str, ...]:
    """The stages of a job: augment is one only where it is configured."""
    return ORDER if config.augment is None else (ORDER[0], "augment", *ORDER[1:])


def parents_of(config: DistillConfig, name: str) -> tuple[str, ...]:
    """Whose outputs a stage of this job reads."""
    return tuple(p for p in PARENTS[name] if p in order_of(config))


def _stages(
    config: DistillConfig,
    job: Job,
    inputs: Inputs,
    override_gate: str | None,
    say: Callable[[str], None],
    registry: Registry,
    trainer: train.Trainer | None,
) -> PipelineResult:
    done: dict[str, Manifest] = {}
    at, told = job.workdir, job.progress
    report: GateReport | None = None

    def splits() -> dict[str, Path]:
        return {name: done["collect"].output(name) for name in done["collect"].outputs}

    def taught() -> dict[str, Path]:
        return splits() | ({"train": done["augment"].output("train")} if "augment" in done else {})

    work: dict[str, Work] = {
        "collect": lambda at: collect.run(
            config.collect, inputs.window, [inputs.dataset], at, told, config.ray
        ),
        "augment": lambda at: _augment(config, inputs, splits(), at, told),
        "teach": lambda at: teach.run(
            config.teach,
            config.evaluate.engine,
            inputs.teacher,
            inputs.teacher_digest,
            taught(),
            at,
            told,
            say,
            cache_dir=config.cache_dir,
        ),
        "train": lambda at: train.run(
            config.train, done["teach"].output("train"), config.student, at, told, config.ray, trainer
        ),
        "quantize": lambda at: _quantize(config, done["train"].output("student"), splits(), at, told),
        "evaluate": lambda at: evaluate.run(config.evaluate, _subjects(config, inputs, done), at, told),
        "publish": lambda at: publish.run(config, inputs.teacher_digest, done, report, registry, at),
    }
    for name in order_of(config):
        if name == "publish":
            held_against = inputs.champion.ref if inputs.champion is not None else None
            report = gate.check(
                config.gates,
                done["evaluate"],
                at / "gates.json",
                override_gate,
                held_against,
                done["train"].output("student"),
            )
        parents = {parent: done[parent] for parent in parents_of(config, name)}
        done[name] = job.stage(name, settings(config, inputs, name), parents, work[name])
        if name == job.only:
            break
    return PipelineResult(done["publish"].notes["ref"] if "publish" in done else None, done, report)


def _quantize(
    config: DistillConfig, student: Path, splits: dict[str, Path], folder: Path, progress: Progress
) -> Result:
    if (lora := adapter_of(config)) is not None:
        from distill_jobs import adapters

        return adapters.run(lora, student, folder)
    if config.train.fake_quant is None:
        return quantize.run(config.quantize, student, splits, folder, progress)
    from distill_jobs.training.packed import run

    return run(config.train.fake_quant, student, folder)


def _augment(
    config: DistillConfig, inputs: Inputs, splits: dict[str, Path], folder: Path, progress: Progress
) -> Result:
    own = config.augment
    assert own is not None  # else it is no stage of this job
    voice: Voice
    if own.endpoint is not None:
        voice = ApiVoice(own.endpoint, "augment.endpoint", folder / "spent.json")
    else:
        voice = EngineVoice(
            inputs.teacher, config.evaluate.engine, ChatTokenizer(str(inputs.teacher)), "augment"
        )
    return augment.run(own, voice, splits, [*config.collect.holdout, inputs.dataset], folder, progress)


def pin_inputs(config: DistillConfig, registry: Registry) -> Inputs:
    """The job's inputs; the log window, generated evaluation requests and the champion (when a gate compares
    with it) are written to the workdir once.
    """
    dataset, dataset_digest = pin_dataset(config.evaluate, config.workdir)
    teacher = model_folder(config.teacher)
    window = pin_window(config.collect.log_dir, config.workdir / "window.json", config.collect.sources)
    champion = pin_champion(config.gates, config.publish.name, config.workdir, registry)
    return Inputs(window, dataset, dataset_digest, teacher, model_digest(config.teacher), champion)


def settings(config: DistillConfig, inputs: Inputs, name: str) -> dict[str, object]:
    """A stage's resolved configuration: its section, and the digests of what it reads beside its parents."""
    if name == "train":
        return train.train_key(config.train, config.student)
    lora = adapter_of(config)
    if name == "quantize" and lora is not None:
        return {"adapter_on": model_digest(lora.served_base or config.student)}
    if name == "quantize" and config.train.fake_quant is not None:
        return {"fake_quant": config.train.fake_quant.model_dump(mode="json")}
    own: dict[str, object] = {}
    if name == "collect":
        own["window"] = [s.digest for s in inputs.window]
        own["held_out"] = _held_out(config, inputs)
    elif name == "publish":
        own["gates"] = [g.model_dump(mode="json") for g in config.gates]
    elif name in ("augment", "teach", "evaluate"):
        own["teacher"] = inputs.teacher_digest
    if name == "augment":
        own["prompts"] = prompt_digests(config.augment.prompts if config.augment else None)
        own["held_out"] = _held_out(config, inputs)
    if name == "teach" and config.teach.teachers:
        own["teachers"] = {
            t.name: model_digest(t.model) for t in config.teach.teachers if t.model is not None
        }
    if name == "evaluate":
        own["dataset_digest"] = inputs.dataset_digest
        own["lm_eval_digest"] = tasks_digest(config.evaluate.lm_eval)
        if inputs.champion is not None and inputs.champion.record is not None:
            own["champion"] = inputs.champion.record.artifact.digest
            own["champion_stored"] = _stored(config, inputs)
    return key_config(getattr(config, name)) | own


def adapter_of(config: DistillConfig) -> LoraConfig | None:
    """Set when the student stays an adapter, which is served beside its base and not quantized."""
    lora = config.train.lora
    return lora if lora is not None and lora.export == "adapter" else None


def _held_out(config: DistillConfig, inputs: Inputs) -> list[str]:
    """Digests of what no sample may resemble."""
    return [digest_file(p) for p in config.collect.holdout] + [inputs.dataset_digest]


def _stored(config: DistillConfig, inputs: Inputs) -> dict[str, float | None] | None:
    """The champion's metrics where they need no measuring."""
    if inputs.champion is None:
        return None
    samples = len(read_rows(inputs.dataset, config.evaluate.samples))
    return stored_metrics(
        inputs.champion, config.gates, inputs.dataset_digest, samples, inputs.teacher_digest
    )


def _subjects(config: DistillConfig, inputs: Inputs, done: dict[str, Manifest]) -> evaluate.Subjects:
    models = {
        "teacher": inputs.teacher,
        "student": done["train"].output("student"),
        "quantized": done["quantize"].output("artifact"),
    }
    stored, digest = _stored(config, inputs), None
    if stored is None and inputs.champion is not None and inputs.champion.record is not None:
        models["champion"] = Path(str(inputs.champion.folder))
        digest = inputs.champion.record.artifact.digest
    return evaluate.Subjects(
        models=models,
        teacher_digest=inputs.teacher_digest,
        dataset=inputs.dataset,
        dataset_digest=inputs.dataset_digest,
        cache_dir=config.cache_dir,
        champion_digest=digest,
        champion_metrics=stored or {},
    )


def plan(config: DistillConfig) -> list[tuple[str, str, str]]:
    """(stage, state, folder) of each stage, without doing any: what `--dry-run` prints."""
    inputs = pin_inputs(config, publish.open_registry(config.publish))
    job = Job(config.workdir, Progress(config.workdir / "progress.json"))
    done: dict[str, Manifest] = {}
    rows = []
    for name in order_of(config):
        parents = parents_of(config, name)
        if any(p not in done for p in parents):
            rows.append((name, "waits", "for " + ", ".join(p for p in parents if p not in done)))
            continue
        folder = job.folder(name, settings(config, inputs, name), {p: done[p] for p in parents})
        manifest = read_manifest(folder)
        if manifest is not None:
            done[name] = manifest
        rows.append(
            (name, "finished" if manifest else "started" if folder.is_dir() else "to do", str(folder))
        )
    return rows
