"""Servers that are waited for before the first work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.client import Busy, ServerGone
from eaopd_megatron.serving.readiness import Arrival


@dataclass(frozen=True)
class Server:
    url: str
    fault: Exception | None = None


async def ask(server: Server) -> str:
    if server.fault is not None:
        raise server.fault
    return server.url


def arrived(*servers: Server) -> list[str]:
    """What the user is told."""
    said: list[str] = []
    asyncio.run(Arrival("replica", 0.0, said.append).of_all(servers, ask))
    return said


ABSENT = Server("http://b", ServerGone("refused"))


def test_one_absent_server_keeps_the_others_from_work() -> None:
    assert arrived(Server("http://a")) == []
    (line,) = arrived(Server("http://a"), ABSENT)
    assert line == "going on without replicas that are not there after 0 minutes: http://b: refused"


def test_no_server_is_waited_for_for_ever() -> None:
    message = r"no replica is there after 0 minutes \(http://b: refused; http://c: loading\): start one, or raise its"
    with pytest.raises(UserError, match=message):
        arrived(ABSENT, Server("http://c", Busy("loading")))


def test_a_server_that_is_another_one_is_gone_on_without() -> None:
    with pytest.raises(UserError, match="another model"):
        arrived(Server("http://a"), Server("http://d", UserError("another model")))
