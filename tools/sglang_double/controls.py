"""Control requests of a server: pausing, releasing memory, weight updates and, for a double, faults."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.sglang_double.plain_http import NULL, Died, PlainServer, Refused

if TYPE_CHECKING:
    import torch

    from tools.sglang_double.weights import Receiver


def _invalid(field: str) -> Refused:
    body = {"object": "error", "message": f"2 validation errors:\n  {field}", "type": "Bad Request", "param": None}
    return Refused(400, {**body, "code": 400})


def _failed(message: str, **more: Any) -> Refused:
    return Refused(400, {"success": False, "message": message, **more})


@dataclass
class Faults:
    """What goes wrong from now on; counts go down as it happens."""

    drop: int = 0  # /generate requests whose connection is dropped before an answer
    fail: int = 0  # ... that get a 500 and lose the connection
    abort: int = 0  # ... that are given up with what they have
    nan: int = 0  # ... that end because the weights hold NaN
    mute: bool = False  # nothing is answered at all
    update: str = ""  # in the middle of an update of weights: "die", "hang" or "refuse"
    update_in: int = 0  # the update call at which that happens, counted from now; 0: at none
    checksum: str = "the same"  # of the weights, as it says; "": it cannot compute any, as 0.5.21 on a CPU

    def take(self, kind: str) -> bool:
        left: int = getattr(self, kind)
        setattr(self, kind, max(0, left - 1))
        return left > 0

    async def strike_update(self) -> None:
        """Once in each update call."""
        if not self.take("update_in") or self.update_in:
            return
        if self.update == "die":
            raise Died
        if self.update == "hang":
            await asyncio.Event().wait()
        raise _failed("Failed to receive weights: on command")


class Controlled(PlainServer):
    """The state that control requests change, and their handlers: `_post_PATH`, of the body."""

    def __init__(self, port: int, *, model_path: str, weight_version: str) -> None:
        super().__init__(port)
        self.model_path, self.weight_version = model_path, weight_version
        self.faults = Faults()
        self.running: set[str] = set()  # ids of requests
        self.aborting: set[str] = set()
        self.session = self.paused = False
        self.going = asyncio.Event()  # cleared while it is paused
        self.going.set()
        self.away: set[str] = set()  # tags of released memory
        self.weights: dict[str, torch.Tensor] = {}

    @cached_property
    def _receiver(self) -> Receiver:
        from tools.sglang_double.weights import Receiver  # imports torch, which a double without weights does not need

        return Receiver(self.load_weights)

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the tensors of an update, in a thread. Raise ValueError for a tensor that does not fit the model."""
        for name, tensor in tensors.items():
            if name not in self.weights:
                self.weights[name] = tensor
            elif self.weights[name].shape == tensor.shape:
                self.weights[name].copy_(tensor)
            else:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}")

    def _post_pause_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("mode", "abort") not in ("abort", "retract", "in_place"):
            raise _invalid("mode")
        self.paused = True
        self.going.clear()
        if body.get("mode", "abort") == "abort":
            self._post_abort_request({"abort_all": True})
        return {"message": "Generation paused successfully.", "status": "ok"}

    def _post_continue_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        self.paused = False
        self.going.set()
        return {"message": "Generation continued successfully.", "status": "ok"}

    def _post_abort_request(self, body: dict[str, Any]) -> None:
        self.aborting |= set(self.running) if body.get("abort_all") else {str(body.get("rid"))} & self.running

    def _post_flush_cache(self, body: dict[str, Any]) -> bytes:
        if self.running:
            raise Refused(400, b"Flush cache failed.\n")
        return (
            b"Cache flushed.\nPlease check backend logs for more details. (When there are running or waiting requests, "
            b"the operation will not be performed.)\n"
        )

    def _post_release_memory_occupation(self, body: dict[str, Any]) -> Any:
        if self.running or self.away & set(body["tags"]):
            raise Died
        self.away |= set(body["tags"])
        return NULL

    def _post_resume_memory_occupation(self, body: dict[str, Any]) -> Any:
        if not set(body["tags"]) <= self.away:
            raise Died
        self.away -= set(body["tags"])
        return NULL

    def need(self, *tags: str) -> None:
        if self.away & set(tags):
            raise Died

    def _post_begin_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.session:
            raise _failed("a weight-update session is already open; call end_weight_update() first")
        self.session = True
        return {"success": True, "message": "Success"}

    def _post_end_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.session:
            raise _failed("no weight-update session is open; call begin_weight_update() first")
        self.session = False
        return {"success": True, "message": "Success"}

    async def _post_init_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        if refusal := await asyncio.to_thread(self._receiver.init_group, body):
            raise _failed(refusal)
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    async def _post_destroy_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        if refusal := await asyncio.to_thread(self._receiver.destroy_group, body):
            raise _failed(refusal)
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    async def _post_update_weights_from_tensor(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._in_session("update_weights_from_tensor")
        try:
            await asyncio.to_thread(self._receiver.tensor, body)
        except ValueError:
            raise Died from None
        return self._updated("Success", body)

    async def _post_update_weights_from_distributed(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._in_session("update_weights_from_distributed")
        if refusal := await asyncio.to_thread(self._receiver.distributed, body):
            raise _failed(refusal)
        return self._updated("Succeeded to update parameter online.", body)

    async def _in_session(self, name: str) -> None:
        self.need("weights")
        if not self.session:
            raise _failed(f"{name} must run between begin_weight_update() and end_weight_update()")
        await self.faults.strike_update()

    def _updated(self, message: str, body: dict[str, Any], **more: Any) -> dict[str, Any]:
        if (version := body.get("weight_version")) is not None:
            self.weight_version, message = str(version), f"{message} Weight version updated to {version}."
        return {"success": True, "message": message, **more}

    async def _post_update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        self.need("weights")
        path = Path(body["model_path"])
        if not (path / "config.json").is_file():
            raise _failed(f"Failed to get weights iterator: {path}.", num_paused_requests=0)
        await asyncio.to_thread(self._receiver.disk, path)
        self.model_path = str(path)
        return self._updated("Succeeded to update model weights.", body, num_paused_requests=0)

    def _post_update_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        self.weight_version = str(body["new_version"])
        message = f"Weight version updated to {self.weight_version}"
        return {"success": True, "message": message, "new_version": self.weight_version}

    def _post_weights_checker(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.faults.checksum:
            raise _failed("Torch not compiled with CUDA enabled")
        return {"success": True, "message": "Success.", "per_engine_checksum": self.faults.checksum}

    def _post_faults(self, body: dict[str, Any]) -> None:
        for name, value in body.items():
            setattr(self.faults, name, value)

    def _post_weights(self, body: dict[str, Any]) -> None:
        import torch

        torch.save(self.weights, body["path"])
        self.weights.clear()
