"""Every recipe is a fragment that parses over the demo's configuration and names what makes its method."""

from __future__ import annotations

import pytest

from contracts.config import load_config
from contracts.errors import ConfigError
from distill_jobs.config import DistillConfig
from distill_jobs.training import recipes
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.recipes import FOLDER, read_recipe, recipe_names, with_recipe

METHODS = {
    *("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "sequence_level"),
    *("temperature", "temperature_plain", "live_teacher", "multi_teacher", "routed_teachers"),
    *("hidden", "attention", "relation", "relation_distance", "contrastive", "rationale", "two_stage"),
    *("on_policy", "replay", "teacher_prefix", "mixed_schedule", "distillm2"),
    *("cross_tokenizer", "lora", "curriculum"),
}


@pytest.fixture(scope="module")
def base() -> TrainConfig:
    return load_config(FOLDER.parent / "distill-support.yaml", DistillConfig).train


def test_there_is_a_recipe_for_every_method() -> None:
    """The list of methods is a promise of the documents: none goes missing."""
    assert set(recipe_names()) == METHODS


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_recipe_parses_over_the_demo(base: TrainConfig, name: str) -> None:
    """What the recipe says is in the result, what it does not say is the demo's, and it differs from the
    demo's own configuration unless that is the method."""
    made = with_recipe(base, name)
    dumped = made.model_dump(mode="json", exclude_unset=True)
    for key, value in read_recipe(name).items():
        if not isinstance(value, dict):
            assert dumped[key] == value
    assert made.max_length == base.max_length
    assert (made != base) == (name != "forward_kl" or made.loss != base.loss)
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")


def test_a_fragment_changes_only_its_own_keys(base: TrainConfig) -> None:
    """Mappings merge key by key: lora's optimizer keeps the demo's other settings."""
    made = with_recipe(base, "lora")
    assert made.optimizer.kind == "adamw"
    assert made.loss == base.loss
    assert made.batch_rows == base.batch_rows


def test_unknown_recipes_and_wrong_fields_are_named(base: TrainConfig, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A typo lists what there is; a wrong field is named with its path."""
    with pytest.raises(ConfigError, match="forward_kl"):
        with_recipe(base, "forwardkl")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "odd.yaml").write_text("loss: {divergnce: jsd}")
    with pytest.raises(ConfigError, match="divergnce"):
        with_recipe(base, "odd")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        with_recipe(base, "list")
