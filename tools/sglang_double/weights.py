"""The receiving end of a weight update in a double: what the real server's ranks do, into tensors by name.

It blocks as the real one does; the double calls it from threads. torch.distributed uses a group's name once in a
process, so a double in its trainer's process takes no `distributed` update.
"""

from __future__ import annotations

import base64
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.rendezvous import rendezvous

from eaopd_megatron.rollout.weight_sync import distributed_transport as group

SECONDS = 60.0
"""Timeout of a group's operations."""

Load = Callable[[Mapping[str, torch.Tensor]], None]
"""Takes received tensors by Hugging Face name. Raises ValueError for a tensor that the model does not have."""


class Receiver:
    """A server of one rank. Each method takes the body of the request that it is named after."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._groups: dict[str, dist.ProcessGroup] = {}

    def init_group(self, body: Mapping[str, Any]) -> str | None:
        """What went wrong, if anything did; so do the others."""
        address = f"tcp://{body['master_address']}:{body['master_port']}"
        rank, world_size, name = body["rank_offset"], body["world_size"], body["group_name"]
        try:
            store, _, _ = next(rendezvous(address, rank, world_size, timeout=timedelta(seconds=SECONDS)))
            self._groups[name] = group.join_process_group(store, name, rank, world_size, body["backend"], SECONDS)
        except RuntimeError as error:
            return f"Failed to initialize custom process group: {error}."
        return None

    def destroy_group(self, body: Mapping[str, Any]) -> str | None:
        if body["group_name"] not in self._groups:
            return "The group to be destroyed does not exist."
        dist.destroy_process_group(self._groups.pop(body["group_name"]))
        return None

    def distributed(self, body: Mapping[str, Any]) -> str | None:
        placed = [
            (name, getattr(torch, dtype), shape)
            for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True)
        ]
        name = body["group_name"]
        if name not in self._groups:
            known = list(self._groups)
            return (
                f"Failed to receive weights: Group {name} not in {known}. "
                "Please call `init_weights_update_group` first."
            )
        try:
            arrived = self._receive(placed, self._groups[name], body.get("load_format") == "flattened_bucket")
        except RuntimeError as error:
            return f"Failed to receive weights: {error}"
        try:
            self._load(arrived)
        except ValueError as error:
            return (
                f"Failed to update parameter online: {error}. The full weights of the ModelRunner are partially "
                "updated. Please discard the whole weights."
            )
        return None

    def tensor(self, body: Mapping[str, Any]) -> None:
        """Raises ValueError, of which the real server dies."""
        (own,) = body["serialized_named_tensors"]
        self._load(dict(pickle.loads(base64.b64decode(own))))

    def disk(self, path: Path) -> None:
        """Raises ValueError."""
        for file in sorted(path.glob("*.safetensors")):
            self._load(load_file(file))

    def _receive(
        self, placed: Sequence[tuple[str, torch.dtype, list[int]]], joined: dist.ProcessGroup, flattened: bool
    ) -> dict[str, torch.Tensor]:
        if not flattened:
            found = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in placed}
            for tensor in found.values():
                dist.broadcast(tensor, group_src=0, group=joined)
            return found
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in placed]
        # as the real server does it: new memory for the tensors, put together, is where the bucket arrives
        flat = torch.cat([torch.empty(size, dtype=torch.uint8) for size in sizes])
        dist.broadcast(flat, group_src=0, group=joined)
        parts = flat.split(sizes)
        return {name: part.view(dtype).view(shape) for (name, dtype, shape), part in zip(placed, parts, strict=True)}
