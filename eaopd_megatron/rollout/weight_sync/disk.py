"""Weights through a folder that the trainer and its servers share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from eaopd_megatron.checkpoint.hf_export import Tensors, write_hf
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.rollout.weight_sync.session import Session
from eaopd_megatron.rollout.weight_sync.transport import Push, Run, Transport
from eaopd_megatron.serving.client import SGLangClient


class Disk(Transport):
    """See the module. seconds: limit on a server's reading. Of all versions the last one stays in `scratch`."""

    def __init__(self, run: Run, seconds: float, source: HfFolder, scratch: Path, dtype: torch.dtype) -> None:
        self._run, self._session, self._source = run, Session(seconds), source
        self._scratch, self._dtype = scratch, dtype

    def send(self, tensors: Tensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Raises UserError when the folder cannot be written."""
        folder = self.folder(version)
        write_hf(tensors, self._source, folder, self._dtype)
        for other in self._scratch.glob("version_*"):
            if other != folder:
                shutil.rmtree(other)
        return self.load(version, clients)

    def load(self, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Give servers a version that is in the folder already. Returns those that have not got it, with the reason."""
        push = Push(self._run, clients)
        push.each(lambda client: self._session.load(client, self.folder(version).resolve(), version))
        return push.failed

    def folder(self, version: str) -> Path:
        """Where a version is."""
        return self._scratch / f"version_{version}"

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
