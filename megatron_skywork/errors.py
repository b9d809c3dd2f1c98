"""The errors a user can cause, and the exit code each one ends a process with.

A user's mistake is answered by one of these: it names the thing (a key, a file), the value that was found and what to do instead,
and the command line prints it without a traceback. Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_CONFIG = 2
EXIT_REFUSED = 3
EXIT_REQUEUE = 75


class UserError(Exception):
    """Base of the errors that are shown as a message, not as a traceback."""

    exit_code = EXIT_OTHER

    def __str__(self) -> str:
        # Names from a stranger's file are quoted; a terminal would obey the control characters in them, and half a character cannot be written at all.
        return "".join(letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode() for letter in super().__str__())


class ConfigError(UserError):
    """One or more settings are wrong. All problems of one configuration are reported together.

    Args:
        problems: one line each: dotted key, value, what to type instead.
    """

    exit_code = EXIT_CONFIG

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A data file is missing, damaged, or does not fit the model."""

    exit_code = EXIT_REFUSED


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the model."""

    exit_code = EXIT_REFUSED


class TrainingError(UserError):
    """Training cannot go on: the loss or a gradient is not finite, a limit was passed."""

    exit_code = EXIT_OTHER
