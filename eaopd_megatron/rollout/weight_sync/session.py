"""What is said to one server when it gets weights, in the order in which SGLang 0.5.21 demands it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import SGLangClient

ABORTED_UPDATE = "broken off"
"""The version of weights of which an update may have changed a part."""


@dataclass(frozen=True)
class UpdateSession:
    """seconds: limit on what takes as long as a model is large; the rest is up to the clients' patience.

    All raise ServerGone, Busy or UserError; nothing is said twice.
    """

    seconds: float

    async def post(self, client: SGLangClient, path: str, body: Mapping[str, Any]) -> Any:
        """The server's answer to what takes long."""
        return await client.request("POST", path, body, seconds=self.seconds, attempts=1)

    async def tp_size(self, client: SGLangClient) -> int:
        """How many processes share its weights. Refuses (UserError) servers that take weights from a folder alone."""
        info = await client.server_info()
        if info["dp_size"] != 1:
            raise UserError(f"{client.url} has dp_size {info['dp_size']}, which takes weight_sync.transport=disk")
        return int(info["tp_size"])

    async def begin_update(self, client: SGLangClient) -> None:
        """From now on it generates nothing and takes weights."""
        await self._pause(client)
        try:
            await post_once(client, "/begin_weight_update", {})
        except UserError as refusal:
            if "already open" not in str(refusal):
                raise
            await post_once(client, "/end_weight_update", {})  # of an update that broke off
            await post_once(client, "/begin_weight_update", {})

    async def end_update(self, client: SGLangClient, version: str) -> None:
        """It has all weights: they are `version`, and it generates again."""
        await post_once(client, "/end_weight_update", {})
        await post_once(client, "/update_weight_version", {"new_version": version, "abort_all_requests": False})
        await self._resume(client, version)

    async def load_from_disk(self, client: SGLangClient, folder: Path, version: str) -> None:
        """It reads weights from a folder, whatever it did before, and generates again."""
        await self._pause(client)
        await _end_broken_off(client)
        body = {"model_path": str(folder), "weight_version": version}
        await self.post(client, "/update_weights_from_disk", body)
        await self._resume(client, version)

    async def checksum(self, client: SGLangClient) -> str:
        """Of the weights that it has, over all of its ranks."""
        try:
            answer = await self.post(client, "/weights_checker", {"action": "checksum"})
        except UserError as refusal:
            raise UserError(
                f"{refusal}: this server cannot compute checksums (0.5.21 does it on GPUs alone): set "
                "weight_sync.verify=version"
            ) from None
        return str(answer["per_engine_checksum"])

    async def _pause(self, client: SGLangClient) -> None:
        # retracted, what may still run gives its cache back: the server ends itself if that is in use afterwards
        await post_once(client, "/pause_generation", {"mode": "retract"})

    async def _resume(self, client: SGLangClient, version: str) -> None:
        await post_once(client, "/continue_generation", {})
        found = (await client.model_info()).get("weight_version")
        if found != version:
            raise UserError(f"it has weights '{found}' after an update to '{version}'")


async def resume_generation(client: SGLangClient) -> None:
    """A server that an update which broke off left paused generates again. Raises as `Session` does."""
    await _end_broken_off(client)
    await post_once(client, "/update_weight_version", {"new_version": ABORTED_UPDATE, "abort_all_requests": False})
    await post_once(client, "/continue_generation", {})


async def _end_broken_off(client: SGLangClient) -> None:
    """End the session of an update that broke off, if there is one."""
    try:
        await post_once(client, "/end_weight_update", {})
    except UserError as refusal:
        if "no weight-update session is open" not in str(refusal):
            raise


async def post_once(client: SGLangClient, path: str, body: Mapping[str, Any]) -> None:
    """What does not take long. Raises as `Session` does."""
    await client.request("POST", path, body, attempts=1)
