"""The command line as a fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.end_to_end.runs import Command


@pytest.fixture
def eaopd() -> Iterator[Callable[..., Command]]:
    """Start the command; ends what still runs after the test."""
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        started.append(Command(*arguments))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
