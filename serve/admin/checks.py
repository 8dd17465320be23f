"""What must hold between the settings of several routes before new ones are written.

Pure functions over what is stored. Knows nothing about HTTP or storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from contracts.errors import ConfigError, NotFoundError
from contracts.routes import RouteSettings
from contracts.traffic import Split, Upstream


def check_settings(
    new: RouteSettings, settings: Mapping[str, RouteSettings], splits: Mapping[str, Split]
) -> None:
    """A name means one route, and one route at most is the default.

    Raises: NotFoundError for an unknown route, ConfigError naming the field.
    """
    if new.route not in splits:
        raise NotFoundError(
            f"there is no route {new.route!r}; routes: {', '.join(sorted(splits)) or 'none'}."
        )
    others = {name: s for name, s in settings.items() if name != new.route}
    taken = {alias: name for name, s in others.items() for alias in s.aliases}
    for alias in new.aliases:
        if alias in splits:
            raise ConfigError(f"aliases: {alias!r} is itself a route.")
        if alias in taken:
            raise ConfigError(f"aliases: {alias!r} is an alias of route {taken[alias]!r} already.")
    if new.default and (default := next((n for n, s in others.items() if s.default), None)):
        raise ConfigError(f"default: route {default!r} is the default already; take it back there first.")


def known_upstreams(settings: Iterable[RouteSettings], splits: Iterable[Split]) -> list[Upstream]:
    """Every upstream that is stored, the two of a cascade beside it."""
    found = [u for split in splits for u in split.upstreams]
    for one in settings:
        found += [*one.fallbacks, *([one.shadow.upstream] if one.shadow else [])]
    return [each for u in found for each in dict.fromkeys((u, *u.parts))]


def check_secrets(new: Iterable[Upstream], known: Iterable[Upstream]) -> None:
    """An admin key must not be a way to send any environment variable of a router to any address.

    Raises: ConfigError when an upstream pairs a variable with a URL that the store does not pair yet.
    """
    pairs = {(u.url, u.api_key_env) for u in known}
    for upstream in (part for u in new for part in u.parts):
        if upstream.api_key_env is not None and (upstream.url, upstream.api_key_env) not in pairs:
            raise ConfigError(
                f"api_key_env: upstream {upstream.name!r} would send {upstream.api_key_env} to an address "
                "that does not get it yet. Do that with 'stillhouse routes set' or in the configuration."
            )
