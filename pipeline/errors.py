"""Defines the errors that a user can meet, each one sentence: what, where, found, allowed, next step.

UserError
├── ConfigError     a job file or a command-line setting
├── DataError       shards, images, labels, selections
├── WeightsError    checkpoints and model files
├── OutputError     the output folder: not writable, in use, not shared by the workers
├── ClusterError    the cluster cannot be reached, or work on it failed for good
└── TrainingError   training cannot go on: loss is not finite, too few images for the step

RemoteError (an OSError) is nobody's mistake: a server failed again and again. Work that meets one is tried again; if it
ends a run, its text is shown like the others.

Everything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """A mistake or misfortune that the user can mend; its text is shown without a traceback."""


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class WeightsError(UserError):
    pass


class OutputError(UserError):
    pass


class ClusterError(UserError):
    pass


class TrainingError(UserError):
    pass


class RemoteError(OSError):
    pass
