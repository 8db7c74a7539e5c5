"""Transports for servers that share a disk or a host with the trainer.

A request of TensorTransport holds the tensors' bytes on CPUs; on GPUs it holds CUDA IPC handles of the bucket on the
main rank's GPU, which the server must be able to see, and on which each of its ranks takes a CUDA context. torch keeps
the memory of a bucket until the handles are dropped: that of a server which died with some is lost to the trainer.
"""

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
    """Writes a Hugging Face folder that servers read. seconds: limit of a server's reading. Keeps the last version."""

    def __init__(self, run: RunCoroutine, seconds: float, source: HfFolder, scratch: Path, dtype: torch.dtype) -> None:
        self._run, self._session, self._source = run, UpdateSession(seconds), source
        self._scratch, self._dtype = scratch, dtype

    def send(self, tensors: NamedTensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Write the folder, then let the servers read it. Raises UserError if it cannot be written."""
        folder = self.folder(version)
        write_hf(tensors, self._source, folder, self._dtype)
        for other in self._scratch.glob("version_*"):
            if other != folder:
                shutil.rmtree(other)
        return self.load(version, clients)

    def load(self, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Let servers read a version that is already written. Return those that failed, each with the reason."""
        update = WeightUpdate(self._run, clients)
        update.call_all(lambda client: self._session.load_from_disk(client, self.folder(version).resolve(), version))
        return update.failed

    def folder(self, version: str) -> Path:
        """Return the folder of a version."""
        return self._scratch / f"version_{version}"

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


DEVICE_INDEX = 6
"""Position of the device among the arguments with which torch rebuilds a CUDA tensor."""


class TensorTransport(BucketTransport[PendingCalls]):
    """Sends the tensors in the requests themselves.

    On GPUs with `reads_late`: a server answers when its copies out of a bucket are enqueued, not when they are done.
    Its ranks wait for them when they drop the bucket, before they begin with the next request, and none is answered
    before all ranks have come that far.
    """

    _ranks: Mapping[SGLangClient, int]

    def connect(self, update: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None:
        self._ranks = ranks

    def start(self, update: WeightUpdate, bucket: Bucket) -> PendingCalls:
        # here, since handles refer to the stream of this thread; one string per rank, as each can be opened once
        strings = {client: [serialize_bucket(bucket) for _ in range(self._ranks[client])] for client in update.active}

        async def send(client: SGLangClient) -> Any:
            body = {"serialized_named_tensors": strings.pop(client)}
            return await self._session.post(client, "/update_weights_from_tensor", body)

        return update.start(send)

    def finish(self, update: WeightUpdate, sent: PendingCalls) -> None:
        update.finish(sent)


def serialize_bucket(bucket: Bucket) -> str:
    """Serialize the tensors for SGLang's unpickler, in base64."""
    if bucket.data.is_cuda:
        stream = io.BytesIO()
        _HandlePickler(stream).dump(list(bucket.tensors()))
        return base64.b64encode(stream.getvalue()).decode()
    # clone: pickling a view would include the bucket, and torch's own pickler shares memory with children only
    return base64.b64encode(pickle.dumps([(name, view.clone()) for name, view in bucket.tensors()])).decode()


class _HandlePickler(ForkingPickler):
    """Names the GPU by its UUID, as SGLang does: its index differs between processes."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_INDEX]).uuid)
        return rebuild, (*arguments[:DEVICE_INDEX], uuid, *arguments[DEVICE_INDEX + 1 :])
