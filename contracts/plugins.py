"""Functions that a configuration names as "module:function": graders, detectors, datasets.

The one door by which a user's code comes in. Knows nothing about what such a function does.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from contracts.errors import ConfigError


def load_function(name: str, field: str) -> Callable[..., Any]:
    """Import "module:function". Raises: ConfigError naming the configuration field."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"{field}: {name!r} is not 'module:function'.")
    if os.getcwd() not in sys.path:
        # Users keep their functions beside their configuration, where console scripts do not look.
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as err:
        raise ConfigError(f"{field}: {name!r} cannot be imported ({err}).") from err
    if not callable(found):
        raise ConfigError(f"{field}: {name!r} is not a function.")
    return cast(Callable[..., Any], found)
