"""Every exception Stillhouse raises on purpose, as one tree. Knows nothing about who raises or catches them.

    StillhouseError
    ├── ConfigError (ValueError)      the user's configuration is wrong; names the field and the fix
    ├── DataError (ValueError)        a dataset, log segment or manifest is malformed or empty
    ├── NotFoundError (LookupError)   a route, model, rollout or artifact does not exist
    ├── ConflictError                 a write lost a race, or an object is in the wrong phase for it
    ├── GateError                     a gate refused; carries the report in its message
    ├── StateError                    the state store is unreachable or its schema is not ours
    ├── TrainingError                 a training run cannot continue
    ├── QuantizationError             the compression environment failed or wrote a damaged artifact
    └── EngineError                   an engine did not start, or an upstream cannot be reached

To add one: subclass the nearest category, give it one sentence, draw it above. Keep the message a
whole sentence that says what to do. Exceptions take one positional message so they pickle.
"""


class StillhouseError(Exception):
    """Base of every error raised on purpose; the CLI prints its message without a traceback."""


class ConfigError(StillhouseError, ValueError):
    """The user's configuration is wrong; the message names the field and the fix."""


class DataError(StillhouseError, ValueError):
    """A dataset, log segment or manifest is malformed, empty or does not match its digest."""


class NotFoundError(StillhouseError, LookupError):
    """A route, model, rollout or artifact does not exist; the message lists what does."""


class ConflictError(StillhouseError):
    """A write lost a race, or the object is in a phase in which this is not allowed."""


class GateError(StillhouseError):
    """An offline or online gate refused a model."""


class StateError(StillhouseError):
    """The state store cannot be reached, or holds a schema this version does not know."""


class TrainingError(StillhouseError):
    """A training run cannot continue (diverged, no data, checkpoint damaged)."""


class QuantizationError(StillhouseError):
    """The compression environment failed, or the artifact it wrote is damaged."""


class EngineError(StillhouseError):
    """An inference engine did not start in time, or an upstream cannot be reached."""
