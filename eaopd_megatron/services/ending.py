"""Why an iteration that was begun cannot be finished. The trainer's own state is whole."""

from __future__ import annotations

from eaopd_megatron.errors import UserError


class Asked(Exception):
    """A signal asked the run to stop while it waited for another role. Its argument is the signal's number."""


class ServiceFailed(UserError):
    """What the other role gives cannot be had any more."""
