"""Every error Spectrim raises on purpose.

    SpectrimError
     ├── ConfigError         params.yaml: all problems at once
     ├── SourceError         a model or text source is unreachable, malformed or has the wrong hash
     ├── DataError           the text or the windows cannot serve the run
     ├── ModelError          the model has nothing to compress, or a structure we do not know
     ├── NumericalError      non-finite values, a Gram that stays indefinite, a diverged loss
     ├── BudgetError         no ranks satisfy the byte budget
     ├── CheckpointError     a checkpoint's version, format, shapes or keys are wrong
     ├── StorageError        a folder is not writable, a disk is full, a stored file is damaged
     └── OrchestrationError  the Prefect server or a worker failed

A message says what was found (numbers, layer, file or parameter), what is required and what to do.
"""

from collections.abc import Iterable


class SpectrimError(Exception):
    """Base of every deliberate error; its text is meant for the person at the terminal."""


class ConfigError(SpectrimError):
    """One or more invalid parameters. ``problems`` holds one line each, ``file: section.key: what is wrong``."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class SourceError(SpectrimError):
    """A model or text source cannot be had, is malformed, or does not match its sha256."""


class DataError(SpectrimError):
    """The text is too short, empty or unreadable for the windows that were asked for."""


class ModelError(SpectrimError):
    """The model has no linear to compress, or a structure that cannot be walked block by block."""


class NumericalError(SpectrimError):
    """A non-finite or indefinite quantity; the message names the layer and the window."""


class BudgetError(SpectrimError):
    """No assignment of ranks fits the byte budget."""


class CheckpointError(SpectrimError):
    """A checkpoint that must not be loaded: version, format, shape, key or size is wrong."""


class StorageError(SpectrimError):
    """The disk is full, a folder is not writable, or a stored file is damaged."""


class OrchestrationError(SpectrimError):
    """The Prefect server or a worker went away, or a task failed for good."""
