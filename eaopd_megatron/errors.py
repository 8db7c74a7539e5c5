"""Errors that end a command in good order, and the exit codes of those that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A fault that the user can mend. Its text is one line; the command prints it without a traceback (exit code 1)."""

    exit_code = 1


class RecipeError(UserError):
    """A recipe that cannot be run as it stands (exit code 2)."""

    exit_code = 2


def one_line(text: object, limit: int | None = None) -> str:
    """Return a text in one line, cut off after `limit` characters."""
    line = " ".join(str(text).split())
    return line if limit is None or len(line) <= limit else f"{line[:limit]} ..."


class StopRequested(Exception):
    """A signal asked the run to stop while it waited for another role. The argument is the signal's number.

    The iteration in progress cannot be finished; the trainer's own state is intact.
    """


class ServiceUnavailable(UserError):
    """Another role (rollout servers, a teacher) gives no answers any more. The trainer's own state is intact."""
