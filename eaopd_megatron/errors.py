"""Why an iteration that was begun cannot be finished. The trainer's own state is whole."""

from __future__ import annotations


class UserError(Exception):
    """A fault that the user can mend. Its text is one line; the command line prints it without a traceback (exit 1)."""

    exit_code = 1


class RecipeError(UserError):
    """A recipe that cannot be run as it stands (exit 2)."""

    exit_code = 2


class StopRequested(Exception):
    """A signal asked the run to stop while it waited for another role. Its argument is the signal's number."""


class ServiceUnavailable(UserError):
    """What the other role gives cannot be had any more."""
