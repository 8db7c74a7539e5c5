"""Waiting for servers before the first request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import Busy, ServerGone
from eaopd_megatron.serving.supervisor import wait_until_any_ready


@dataclass(frozen=True)
class Server:
    url: str
    fault: Exception | None = None


async def ask(server: Server) -> str:
    if server.fault is not None:
        raise server.fault
    return server.url


def wait_for(*servers: Server) -> list[str]:
    """Return what is reported."""
    reported: list[str] = []
    clients: Any = servers
    check: Any = ask
    asyncio.run(wait_until_any_ready(clients, check, kind="replica", minutes=0.0, report=reported.append))
    return reported


ABSENT = Server("http://b", ServerGone("refused"))


def test_one_absent_server_keeps_the_others_from_work() -> None:
    assert wait_for(Server("http://a")) == []
    (line,) = wait_for(Server("http://a"), ABSENT)
    assert line == "going on without replicas that are not there after 0 minutes: http://b: refused"


def test_no_server_is_waited_for_for_ever() -> None:
    message = r"no replica is there after 0 minutes \(http://b: refused; http://c: loading\): start one, or raise its"
    with pytest.raises(UserError, match=message):
        wait_for(ABSENT, Server("http://c", Busy("loading")))


def test_a_server_that_is_another_one_is_gone_on_without() -> None:
    with pytest.raises(UserError, match="another model"):
        wait_for(Server("http://a"), Server("http://d", UserError("another model")))
