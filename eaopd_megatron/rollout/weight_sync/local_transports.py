"""Weights through a folder that the trainer and its servers share."""

from __future__ import annotations

import base64
import io
import pickle
import shutil
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from eaopd_megatron.checkpoint.hf_export import NamedTensors, write_hf
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.rollout.weight_sync.session import UpdateSession
from eaopd_megatron.rollout.weight_sync.transport import (
    Bucket,
    BucketTransport,
    PendingCalls,
    RunCoroutine,
    Transport,
    WeightUpdate,
)
from eaopd_megatron.serving.http import SGLangClient


class DiskTransport(Transport):
    """See the module. seconds: limit on a server's reading. Of all versions the last one stays in `scratch`."""

    def __init__(self, run: RunCoroutine, seconds: float, source: HfFolder, scratch: Path, dtype: torch.dtype) -> None:
        self._run, self._session, self._source = run, UpdateSession(seconds), source
        self._scratch, self._dtype = scratch, dtype

    def send(self, tensors: NamedTensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Raises UserError when the folder cannot be written."""
        folder = self.folder(version)
        write_hf(tensors, self._source, folder, self._dtype)
        for other in self._scratch.glob("version_*"):
            if other != folder:
                shutil.rmtree(other)
        return self.load(version, clients)

    def load(self, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Give servers a version that is in the folder already. Returns those that have not got it, with the reason."""
        push = WeightUpdate(self._run, clients)
        push.call_all(lambda client: self._session.load_from_disk(client, self.folder(version).resolve(), version))
        return push.failed

    def folder(self, version: str) -> Path:
        """Where a version is."""
        return self._scratch / f"version_{version}"

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


DEVICE_INDEX = 6
"""The place of the device among the arguments with which torch rebuilds a CUDA tensor."""


class TensorTransport(BucketTransport[PendingCalls]):
    """See the module."""

    _ranks: Mapping[SGLangClient, int]

    def connect(self, push: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None:
        self._ranks = ranks

    def start(self, push: WeightUpdate, bucket: Bucket) -> PendingCalls:
        async def send(client: SGLangClient) -> Any:
            # each rank of a server opens the handles of its own string, once
            strings = [serialize_bucket(bucket) for _ in range(self._ranks[client])]
            body = {"serialized_named_tensors": strings}
            return await self._session.post(client, "/update_weights_from_tensor", body)

        return push.start(send)

    def finish(self, push: WeightUpdate, sent: PendingCalls) -> None:
        push.finish(sent)


def serialize_bucket(bucket: Bucket) -> str:
    """The tensors as SGLang's own unpickler takes them, in base64."""
    if bucket.data.is_cuda:
        stream = io.BytesIO()
        _HandlePickler(stream).dump(list(bucket.tensors()))
        return base64.b64encode(stream.getvalue()).decode()
    # a view would bring all of its bucket along, and torch's own pickler shares memory with its own children alone
    return base64.b64encode(pickle.dumps([(name, view.clone()) for name, view in bucket.tensors()])).decode()


class _HandlePickler(ForkingPickler):
    """Names the GPU by its UUID, as SGLang does: its index differs between processes that see other GPUs."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_INDEX]).uuid)
        return rebuild, (*arguments[:DEVICE_INDEX], uuid, *arguments[DEVICE_INDEX + 1 :])
