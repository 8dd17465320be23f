"""Prompt files: plain text with $names, built in or the user's own.

Knows nothing about what is filled in.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

from contracts.errors import ConfigError
from registry.digest import digest_file

BUILT_IN = Path(__file__).with_name("prompts")

NAMES: dict[str, tuple[str, ...]] = {
    "paraphrase": ("request", "n"),
    "expand": ("examples", "n"),
    "hard_negatives": ("request", "label", "other", "other_label", "n"),
    "rationale": ("request", "marker"),
    "rationale_student": ("request",),
}
"""What may be filled into each file; `request` or `examples` has to be."""


def prompt_file(name: str, own: Path | None) -> Path:
    """The user's file when there is one, else the built-in one. Raises: ConfigError for a folder that is
    none.
    """
    if own is not None and not own.is_dir():
        raise ConfigError(f"augment.prompts: there is no folder {own}.")
    mine = own / f"{name}.txt" if own is not None else None
    return mine if mine is not None and mine.is_file() else BUILT_IN / f"{name}.txt"


def prompt_digests(own: Path | None) -> dict[str, str]:
    """Digests of all prompt files: an edited prompt makes the stage anew."""
    return {name: digest_file(prompt_file(name, own)) for name in NAMES}


def read_prompt(name: str, own: Path | None) -> Template:
    """A prompt that can be filled. Raises: ConfigError naming the file and the placeholder."""
    file = prompt_file(name, own)
    try:
        template = Template(file.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"augment.prompts: {file} cannot be read ({err}).") from err
    known = NAMES[name]
    found = set(template.get_identifiers()) if template.is_valid() else None
    if found is None or not found <= set(known):
        odd = "a lone $ (write $$ for a dollar)" if found is None else f"${min(found - set(known))}"
        raise ConfigError(
            f"augment.prompts: {file} has {odd}; it may have {', '.join('$' + n for n in known)}."
        )
    if known[0] not in found:
        raise ConfigError(f"augment.prompts: {file} never says ${known[0]}.")
    return template
