"""The two kinds of failure, and the exit codes that scripts may rely on.

A `UserError` is found before any device work: one message (what, where, got, what to do), exit code
2. A `RunError` is raised while running; its reason is the last line printed, exit code 1. A run
that was stopped by a signal or by the loss of a process exits with `EXIT_RESUMABLE`: the same
command resumes from the last checkpoint, or starts again if there is none.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
EXIT_RESUMABLE = 75


class UserError(ValueError):
    """A mistake in the input: config, path, model directory, data. Shown without a traceback."""


class RunError(RuntimeError):
    """A failure after the start of a run, with a reason that the user can act on."""
