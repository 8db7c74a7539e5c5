"""An sglang-router (0.3.2) in front of the servers, for /generate alone.

It knows none of the other endpoints: what a server is, and its weights, is asked and told directly. It goes on calling
itself ready when its workers are dead, so the workers are what is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.wire import Limits
from eaopd_megatron.services.client import Busy, Client, ServerGone

READY_PATH = "/readiness"
"""The `ready_path` of a router's client."""


async def admit_workers(
    router: Client, admit: Callable[[Client], Awaitable[Limits]], worker: Callable[[str], Client]
) -> Limits:
    """What `pool.Pool` asks of a router: each of its servers that is there is admitted; what all of them can take.

    worker: a client for a server's URL, closed after use. Raises ServerGone where none is there, and UserError.
    """
    clients = [worker(url) for url in await worker_urls(router)]
    try:
        found = await asyncio.gather(*(admit(client) for client in clients), return_exceptions=True)
    finally:
        for client in clients:
            await client.close()
    limits: Limits | None = None
    for one in found:
        if isinstance(one, Limits):
            limits = one if limits is None else limits.both(one)
        elif not isinstance(one, ServerGone | Busy):
            raise one
    if limits is None:
        raise ServerGone(f"none of the router's {len(clients)} servers is there")
    return limits


async def worker_urls(router: Client) -> list[str]:
    """The URLs of the servers behind a router. Raises UserError where it is none."""
    found = await router.call("GET", "/workers")
    if not isinstance(found, dict) or "workers" not in found:
        raise UserError(f"{router.url} is no sglang-router: it lists no workers")
    return [str(worker["url"]) for worker in found["workers"]]
