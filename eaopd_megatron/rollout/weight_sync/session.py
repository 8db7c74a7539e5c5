"""Requests of a weight update to one server, in the order that SGLang 0.5.21 and later require."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import SGLangClient

ABORTED_UPDATE = "broken off"
"""Weight version of a server whose weights an aborted update may have changed in part."""


@dataclass(frozen=True)
class UpdateSession:
    """seconds: limit of requests whose time depends on the model's size; the others have the client's timeouts.

    All methods raise ServerGone, Busy or UserError, and send each request once.
    """

    seconds: float

    async def post(self, client: SGLangClient, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request whose time depends on the model's size and return the answer."""
        return await client.request("POST", path, body, seconds=self.seconds, attempts=1)

    async def tp_size(self, client: SGLangClient) -> int:
        """Return the number of ranks with weights. Raises UserError if the server supports disk updates only."""
        info = await client.server_info()
        if info["dp_size"] != 1:
            raise UserError(f"{client.url} has dp_size {info['dp_size']}, which takes weight_sync.transport=disk")
        return int(info["tp_size"])

    async def begin_update(self, client: SGLangClient) -> None:
        """Pause generation and prepare for weights."""
        await self._pause(client)
        try:
            await post_once(client, "/begin_weight_update", {})
        except UserError as refusal:
            if "already open" not in str(refusal):
                raise
            await post_once(client, "/end_weight_update", {})  # of an aborted update
            await post_once(client, "/begin_weight_update", {})

    async def end_update(self, client: SGLangClient, version: str) -> None:
        """Declare the received weights complete as `version` and resume generation."""
        await post_once(client, "/end_weight_update", {})
        await post_once(client, "/update_weight_version", {"new_version": version, "abort_all_requests": False})
        await self._resume(client, version)

    async def load_from_disk(self, client: SGLangClient, folder: Path, version: str) -> None:
        """Load weights from a folder, whatever the server's state, and resume generation."""
        await self._pause(client)
        await _end_aborted_update(client)
        body = {"model_path": str(folder), "weight_version": version}
        await self.post(client, "/update_weights_from_disk", body)
        await self._resume(client, version)

    async def checksum(self, client: SGLangClient) -> str:
        """Return the checksum of the weights over all ranks of the server."""
        try:
            answer = await self.post(client, "/weights_checker", {"action": "checksum"})
        except UserError as refusal:
            raise UserError(
                f"{refusal}: this server cannot compute checksums (0.5.21 does so on GPUs only): set "
                "weight_sync.verify=version"
            ) from None
        return str(answer["per_engine_checksum"])

    async def _pause(self, client: SGLangClient) -> None:
        # retract running requests: the server ends itself if their cache is still in use afterwards
        await post_once(client, "/pause_generation", {"mode": "retract"})

    async def _resume(self, client: SGLangClient, version: str) -> None:
        await post_once(client, "/continue_generation", {})
        actual = (await client.model_info()).get("weight_version")
        if actual != version:
            raise UserError(f"it has weights '{actual}' after an update to '{version}'")


async def resume_generation(client: SGLangClient) -> None:
    """Resume a server that an aborted update left paused. Raises as `UpdateSession` does."""
    await _end_aborted_update(client)
    await post_once(client, "/update_weight_version", {"new_version": ABORTED_UPDATE, "abort_all_requests": False})
    await post_once(client, "/continue_generation", {})


async def _end_aborted_update(client: SGLangClient) -> None:
    """End the session of an aborted update, if there is one."""
    try:
        await post_once(client, "/end_weight_update", {})
    except UserError as refusal:
        if "no weight-update session is open" not in str(refusal):
            raise


async def post_once(client: SGLangClient, path: str, body: Mapping[str, Any]) -> None:
    """Send a short request. Raises as `UpdateSession` does."""
    await client.request("POST", path, body, attempts=1)
