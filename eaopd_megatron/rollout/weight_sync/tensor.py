"""Weights in the requests themselves, for servers on the trainer's host.

On a CPU a request holds the tensors' bytes. On GPUs it holds CUDA IPC handles of the bucket on the main rank's GPU,
which the server must see among its own; that has not been run.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from eaopd_megatron.rollout.weight_sync.transport import Bucket, BucketTransport, Calls, Push
from eaopd_megatron.serving.client import SGLangClient

DEVICE_INDEX = 6
"""The place of the device among the arguments with which torch rebuilds a CUDA tensor."""


class InRequest(BucketTransport[Calls]):
    """See the module."""

    _ranks: Mapping[SGLangClient, int]

    def connect(self, push: Push, ranks: Mapping[SGLangClient, int]) -> None:
        self._ranks = ranks

    def start(self, push: Push, bucket: Bucket) -> Calls:
        async def send(client: SGLangClient) -> Any:
            # each rank of a server opens the handles of its own string, once
            strings = [serialized(bucket) for _ in range(self._ranks[client])]
            body = {"serialized_named_tensors": strings}
            return await self._session.post(client, "/update_weights_from_tensor", body)

        return push.start(send)

    def finish(self, push: Push, sent: Calls) -> None:
        push.finish(sent)


def serialized(bucket: Bucket) -> str:
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
