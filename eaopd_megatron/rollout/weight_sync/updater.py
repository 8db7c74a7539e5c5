"""Send the model's current weights to the rollout servers and verify what they received."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eaopd_megatron.checkpoint.hf_export import NamedTensors, gather_hf_tensors, run_on_main
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import schema
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState, gather_objects
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.rollout.weight_sync.distributed_transport import DistributedTransport
from eaopd_megatron.rollout.weight_sync.local_transports import DiskTransport, TensorTransport
from eaopd_megatron.rollout.weight_sync.session import UpdateSession
from eaopd_megatron.rollout.weight_sync.transport import RunCoroutine, Transport, WeightUpdate, bucket_capacity
from eaopd_megatron.serving.http import SGLangClient
from eaopd_megatron.utils.log import log_rank0


class WeightUpdater:
    """Used on all ranks. The servers' clients live on the main rank, in the event loop that `run` reaches.

    A server that cannot be updated does not affect the others: it is returned with a one-line reason.
    """

    def __init__(
        self,
        model: ModelChunks,
        folder: HfFolder,
        parallel: ParallelState,
        options: schema.WeightSyncConfig,
        scratch: Path,
        run: RunCoroutine | None = None,
        report: Callable[[str], None] = log_rank0,
    ) -> None:
        """folder: the student's. scratch: shared with the servers, for `disk`. run: given on the main rank."""
        if not model.gpts[-1].share_embeddings_and_output_weights and folder.config.tie_word_embeddings:
            raise ValueError("a model with an output layer of its own cannot be given to servers of a tied one")
        self._model, self._folder, self._parallel, self._options = model, folder, parallel, options
        self._run, self._report = run or _no_clients, report
        self._written: int | None = None
        seconds = options.timeout_seconds
        self._session = UpdateSession(seconds)
        self._disk = DiskTransport(self._run, seconds, folder, scratch, model.dtype)
        self._transport = self._create_transport()

    def update(self, version: int, clients: Sequence[SGLangClient] = ()) -> dict[SGLangClient, str]:
        """Send the current weights to all servers as `version`, while none generates. Collective.

        Returns the servers that failed; one that is still reachable after a failed update is updated by disk. Raises
        UserError on all ranks if the folder cannot be written or the servers' checksums differ.
        """
        failed = self._send(self._transport, version, clients)
        if self._transport is not self._disk:
            answers = WeightUpdate(self._run, failed).call_all(lambda client: client.reachable())
            reachable = [client for client, answer in answers.items() if answer]
            for client in failed:
                self._report(f"rollout server {client.url}: no weights {version}: {failed[client]}")
            if any(gather_objects(bool(reachable), self._parallel.world_size)):
                retried = self.update_from_disk(version, reachable)
                failed = {client: failed[client] for client in failed if client not in reachable} | retried
        if self._options.verify == "checksum":
            run_on_all_or_raise(
                self._parallel, lambda: self._compare([client for client in clients if client not in failed])
            )
        return failed

    def update_from_disk(self, version: int, clients: Sequence[SGLangClient] = ()) -> dict[SGLangClient, str]:
        """Update servers that came back by disk, while others may generate. Collective; returns and raises as `update`.

        The folder is written once per version.
        """
        if self._written != version:
            return self._send(self._disk, version, clients)
        return self._disk.load(str(version), clients)

    def forget(self, client: SGLangClient) -> None:
        """Release what is kept for a dead server."""
        self._transport.forget(client)

    def close(self) -> None:
        """Remove the scratch folder and leave the groups, on the main rank."""
        if self._parallel.is_main:
            self._transport.close()
            self._disk.close()

    def _create_transport(self) -> Transport:
        options, seconds = self._options, self._options.timeout_seconds
        config = self._folder.config
        params = self._folder.family.params(config, own_output=not config.tie_word_embeddings)
        sizes = [
            sum(math.prod(shape) for _, shape in param.hf_tensors) * self._model.dtype.itemsize for param in params
        ]
        capacity = bucket_capacity(options.bucket_mib * 2**20, sizes)
        cuda = self._parallel.device.type == "cuda"
        if options.transport == "distributed":
            backend = "nccl" if cuda else "gloo"
            return DistributedTransport(self._run, seconds, capacity, backend=backend, address=options.address)
        if options.transport == "tensor":
            return TensorTransport(self._run, seconds, capacity * 2 // 3 if cuda else capacity, reads_late=cuda)
        return self._disk

    def _send(self, transport: Transport, version: int, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        by_disk = transport is self._disk
        parameters: Mapping[str, torch.Tensor] = self._model.global_parameters()
        tensors = gather_hf_tensors(parameters, self._folder, self._parallel, on_device=not by_disk)
        expected = self._folder.family.hf_shapes(self._folder.config)
        failed = run_on_main(
            tensors, self._parallel, lambda found: transport.send(_checked(found, expected), str(version), clients)
        )
        if by_disk:
            self._written = version
        return failed or {}

    def _compare(self, clients: Sequence[SGLangClient]) -> None:
        update = WeightUpdate(self._run, clients)
        sums = update.call_all(self._session.checksum)
        if update.failed:
            raise UserError(next(iter(update.failed.values())))
        for client in clients[1:]:
            if sums[client] != sums[clients[0]]:
                raise UserError(
                    f"{client.url} and {clients[0].url} have other weights after the same update (checksums): "
                    "weight_sync.transport=disk does not depend on the network between them"
                )


def _checked(tensors: NamedTensors, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors after checking names and shapes: a server ends itself over any other. Raises ValueError."""
    missing = dict(expected)
    for name, tensor in tensors:
        if missing.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"{name} {tuple(tensor.shape)} is no tensor of the student's folder")
        yield name, tensor
    if missing:
        raise ValueError(f"{next(iter(missing))} of the student's folder has no parameter")


def _no_clients(work: Coroutine[Any, Any, Any]) -> Any:
    """Replace `run` on ranks without clients."""
    work.close()
    raise ValueError("a rank with clients needs `run`")
