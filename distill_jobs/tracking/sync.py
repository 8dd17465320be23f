"""Bring a job's MLflow run up to what its workdir holds. May be repeated and cut short at any line.

Everything is sent before it is marked as sent, and sending twice is harmless (parameters and steps that are
known are left out, files are replaced). Raises what MLflow raises; tracker.py keeps it from the job.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.dataset import Manifest
from contracts.errors import ConfigError
from distill_jobs.config import DistillConfig
from distill_jobs.tracking import workdir as here
from distill_jobs.tracking.environment import environment
from distill_jobs.tracking.state import Curve, Sent, read_sent, write_sent
from registry.digest import digest_file

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_JOB = "stillhouse.job"
_BATCH = 900
"""Metrics of one request; MLflow takes 1,000."""
_PARAMS = 100
_DIGEST_CHARS = 36
"""What MLflow's column for a dataset's digest holds."""
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


def sync(config: DistillConfig, status: str = RUNNING) -> str:
    """Send what is new in the job's workdir; returns the run's id.

    Raises: StateError when MLflow refuses, and what its client raises when no server answers.
    """
    from registry.mlflow_store import MlflowRegistry

    uri = config.tracking.uri or config.publish.tracking_uri
    root = config.publish.artifact_root if config.tracking.uri is None else None
    registry = MlflowRegistry(uri, root)
    sent = read_sent(config.workdir)
    with registry.client() as client:
        sync_ = _Sync(client, config, sent)
        sync_.run(registry.experiment(client))
        sync_.params()
        manifests = here.manifests_of(config.workdir)
        for manifest in manifests.values():
            sync_.stage(manifest)
        sync_.curves()
        sync_.files(here.files_of(config.workdir, manifests))
        sync_.status(status)
    assert sent.run_id is not None
    return sent.run_id


def sync_workdir(workdir: Path) -> str:
    """Send what a job could not send itself. Raises: ConfigError when there is no job."""
    data = here.config_of(workdir)
    if not data:
        raise ConfigError(f"{workdir} is no job's workdir: there is no {here.CONFIG}.")
    from contracts.config import parse_config

    config = parse_config(data | {"workdir": str(workdir)}, DistillConfig, str(workdir / here.CONFIG))
    done = "publish" in here.manifests_of(workdir)
    return sync(config, FINISHED if done else KILLED)


class _Sync:
    """One pass; `sent` is stored after every step."""

    def __init__(self, client: MlflowClient, config: DistillConfig, sent: Sent) -> None:
        self._client = client
        self._config = config
        self._sent = sent

    @property
    def _run(self) -> str:
        assert self._sent.run_id is not None
        return self._sent.run_id

    def run(self, experiment: str) -> None:
        """The job's run: the one it has, one that a killed job made, or a new one."""
        if self._sent.run_id is not None:
            return
        found = self._client.search_runs([experiment], f"tags.`{_JOB}` = '{self._sent.job}'", max_results=1)
        if found:
            self._sent.run_id = found[0].info.run_id
        else:
            where = environment()
            tags = {
                _JOB: self._sent.job,
                "mlflow.source.name": "stillhouse distill",
                "mlflow.source.git.commit": where["git_revision"],
                "stillhouse.student": self._config.publish.name,
                "stillhouse.workdir": str(self._config.workdir.resolve()),
                "stillhouse.hardware": f"{where['cpus']} × {where['cpu']}, {where['memory_gb']} GB",
                "stillhouse.gpus": ", ".join(where["gpus"]) or "none",
                **{f"version.{name}": text for name, text in where["packages"].items()},
            }
            name = f"{self._config.publish.name}-{self._config.workdir.name}"
            made = self._client.create_run(experiment, tags=tags, run_name=name)
            self._sent.run_id = made.info.run_id
            self._client.log_text(self._run, json.dumps(where, indent=1) + "\n", "environment.json")
        self._keep()

    def params(self) -> None:
        """The resolved configuration. Parameters never change; what a resumed job changed is a tag."""
        from mlflow.entities import Param

        now = here.flat(here.config_of(self._config.workdir))
        new = [Param(key, value) for key, value in now.items() if key not in self._sent.params]
        changed = {k: v for k, v in now.items() if k in self._sent.params and self._sent.params[k] != v}
        for start in range(0, len(new), _PARAMS):
            self._client.log_batch(self._run, params=new[start : start + _PARAMS])
        if changed:
            self._client.set_tag(self._run, "stillhouse.changed_on_resume", json.dumps(changed))
        if new or changed:
            self._sent.params |= now
            self._keep()

    def stage(self, manifest: Manifest) -> None:
        """A finished stage: its figures, its dataset, its sample answers, what it published."""
        if self._sent.stages.get(manifest.stage) == manifest.key:
            return
        self._metrics([(name, value, 0) for name, value in here.figures_of(manifest).items()])
        if manifest.stage == "collect":
            self._dataset(manifest, "train", "training")
        elif manifest.stage == "evaluate":
            self._evaluated(manifest)
        elif manifest.stage == "publish":
            self._client.set_tag(self._run, "stillhouse.ref", manifest.notes.get("ref", ""))
        self._sent.stages[manifest.stage] = manifest.key
        self._keep()

    def curves(self) -> None:
        """New points of the training curves."""
        for file in here.curves_of(self._config.workdir):
            name = str(file.relative_to(self._config.workdir))
            points, place = here.new_points(file, self._sent.curves.get(name, Curve()))
            if points:
                self._metrics([(f"train/{k}", v, step) for step, row in points for k, v in row.items()])
            self._sent.curves[name] = place
            self._keep()

    def files(self, found: dict[str, Path]) -> None:
        """Artifacts that are new or have changed."""
        for name, path in found.items():
            digest = digest_file(path)
            too_big = path.stat().st_size > self._config.tracking.max_artifact_mb * 1e6
            if too_big or self._sent.files.get(name) == digest:
                continue
            folder, _, base = name.rpartition("/")
            if path.name == base:
                self._client.log_artifact(self._run, str(path), folder or None)
            else:
                self._client.log_text(self._run, path.read_text(encoding="utf-8"), name)
            self._sent.files[name] = digest
            self._keep()

    def status(self, status: str) -> None:
        """Running, or how it ended; a resumed job runs again."""
        if self._sent.status == status:
            return
        if status == RUNNING:
            self._client.update_run(self._run, status=RUNNING)
        else:
            self._client.set_terminated(self._run, status)
        self._sent.status = status
        self._keep()

    def _metrics(self, rows: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in rows]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + _BATCH])

    def _dataset(self, manifest: Manifest, output: str, context: str) -> None:
        """A dataset by its digest: MLflow's pages then say which runs were made of it."""
        if output not in manifest.outputs:
            return
        found = manifest.outputs[output]
        profile = {"rows": found.rows, "bytes": found.bytes, "sha256": found.digest}
        self._input(f"{self._config.publish.name}-{output}", found.digest, found.path, profile, context)

    def _evaluated(self, manifest: Manifest) -> None:
        digest = manifest.notes.get("dataset_digest", "")
        profile = {"rows": manifest.counts.get("samples"), "sha256": digest}
        self._input("evaluation-requests", digest, self._config.evaluate.dataset, profile, "evaluation")
        table = here.samples_of(manifest, self._config.tracking.samples)
        if table["columns"]:
            self._client.log_text(self._run, json.dumps(table, ensure_ascii=False), "samples.json")
            shown = json.dumps([{"path": "samples.json", "type": "table"}])
            self._client.set_tag(self._run, "mlflow.loggedArtifacts", shown)

    def _input(self, name: str, digest: str, source: str, profile: dict[str, Any], context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:_DIGEST_CHARS],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
        tags = [InputTag("mlflow.data.context", context)]
        self._client.log_inputs(self._run, datasets=[DatasetInput(dataset, tags)])

    def _keep(self) -> None:
        write_sent(self._config.workdir, self._sent)
