"""The two ways a run ends badly, and the exit codes that scripts may rely on.

A `UserError` is found before any device work: one message (what, where, got, what to do), exit code
2. A `RunError` is found while running, its reason is the last line printed, exit code 1. What a
signal or the loss of a process has stopped exits with `EXIT_RESUMABLE`: the same command goes on
from the last checkpoint, or starts again where there is none.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
EXIT_RESUMABLE = 75


class UserError(ValueError):
    """A mistake in what the user gave: config, path, model directory, data. Shown without a
    traceback.
    """


class RunError(RuntimeError):
    """A run that failed after it started, with a reason that a person can act on."""
