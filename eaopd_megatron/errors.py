"""Errors that a user can mend: one line that names the key, file or server, and the remedy."""


class UserError(Exception):
    """A fault that the user can mend. Its text is one line; the command line prints it without a traceback (exit 1)."""

    exit_code = 1


class RecipeError(UserError):
    """A recipe that cannot be run as it stands (exit 2)."""

    exit_code = 2
