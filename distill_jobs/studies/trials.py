"""A study's trials: one for each knob value, share of the data and seed, each known by its digest.

The base with all the data is one setting of every sweep, and is run once. Knows nothing about running.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from contracts.config import load_config
from distill_jobs.config import DistillConfig
from distill_jobs.keys import key_config, sha256_of
from distill_jobs.studies.config import StudyConfig
from distill_jobs.train import train_key

KEY_CHARS = 12


@dataclass(frozen=True)
class Setting:
    """What differs from the base: nothing, one knob, or the share of the training rows."""

    knob: str | None = None
    value: Any = None
    share: float = 1.0

    @property
    def name(self) -> str:
        """For a person."""
        if self.knob is not None:
            return f"{self.knob} = {self.value}"
        return "base" if self.share == 1.0 else f"{self.share:.0%} of the rows"


@dataclass(frozen=True)
class Trial:
    """One training run of a study."""

    setting: Setting
    seed: int
    config: DistillConfig = field(repr=False)


def settings_of(study: StudyConfig) -> list[Setting]:
    """The base first, then the shares, then each knob's values in the order they were given."""
    found = [Setting()]
    if study.data is not None:
        found += [Setting(share=s) for s in sorted(set(study.data.shares)) if s != 1.0]
    for knob, values in study.knobs.items():
        found += [Setting(knob=knob, value=value) for value in values]
    return found


def trials_of(study: StudyConfig) -> list[Trial]:
    """Every setting with every seed. Raises: ConfigError naming a knob's field or value that is wrong."""
    return [
        Trial(setting, seed, config_of(study, setting, seed))
        for setting in settings_of(study)
        for seed in study.seeds
    ]


def config_of(study: StudyConfig, setting: Setting, seed: int) -> DistillConfig:
    """The job's configuration for one trial; its workdir is the study's."""
    changes: dict[str, Any] = dict(study.set)
    if setting.knob is not None:
        changes[setting.knob] = setting.value
    changes |= {"train.seed": seed, "workdir": str(study.folder / "job")}
    config = load_config(study.distill, DistillConfig, changes)
    if study.data is not None and study.data.budget == "steps" and setting.share < 1:
        epochs = config.train.epochs / setting.share
        return config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})
    return config


def trial_key(trial: Trial, rows_digest: str, evaluate: bool) -> str:
    """What decides a trial's result: the training, its rows, and how it is evaluated."""
    parts: dict[str, object] = {
        "train": train_key(trial.config.train, trial.config.student),
        "rows": rows_digest,
        "share": trial.setting.share,
    }
    if evaluate:
        parts |= {
            "quantize": key_config(trial.config.quantize),
            "evaluate": key_config(trial.config.evaluate),
        }
    return sha256_of(parts)[:KEY_CHARS]
