"""Replicas of a teacher that the trainer starts on its own host: `eaopd teach`, or SGLang servers."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe, dump_recipe
from eaopd_megatron.config.schema import TeacherConfig, teacher_key
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.requests import required_context_length
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings
from eaopd_megatron.serving.http import poll_until_done, read_api_key
from eaopd_megatron.serving.process import ServerProcess
from eaopd_megatron.serving.supervisor import Supervisor
from eaopd_megatron.utils.files import atomic_write

REPLICA_KIND = "teacher replica"


class TeacherReplicas:
    """The replicas of one teacher, on the main rank. With CUDA each replica has its own GPUs."""

    def __init__(self, recipe: Recipe, name: str, logs: Path, *, first_gpu: int, report: Callable[[str], None]) -> None:
        """name: the teacher's; "" if the recipe has one teacher. logs: folder of the replicas' logs. first_gpu: index,
        among the visible GPUs, of the first replica's first GPU."""
        self._recipe, self._name, self._logs = recipe, name, logs
        self._first_gpu, self._report = first_gpu, report
        self._options: TeacherConfig = recipe.named_teachers()[name]
        self._servers: Sequence[ServerProcess] = ()
        self._supervisor: Supervisor | None = None
        self.api_key: str | None = None  # for the Authorization header; set by `start`

    def start(self, longest: int) -> None:
        """Start the replicas in the background. longest: maximum tokens of a prompt and its response.

        Raises UserError if there are too few GPUs.
        """
        options = self._options
        key_file = options.api_key_file
        self.api_key = secrets.token_urlsafe(24) if key_file is None else read_api_key(Path(key_file))
        make = self._sglang if options.placement == "served" else self._separate
        logs = (self._logs / f"{self._name or 'teacher'}_{number}.log" for number in range(options.replicas))
        self._servers = [make(log, gpus, longest) for log, gpus in zip(logs, self._gpus(), strict=True)]
        self._supervisor = Supervisor(self._servers, minutes=options.startup_timeout_minutes, report=self._report)
        self._supervisor.start()

    def wait_urls(self) -> Generator[None, None, list[str]]:
        """Yield until all replicas serve; return their URLs. Raises UserError."""
        assert self._supervisor is not None, "start comes first"
        yield from poll_until_done(self._supervisor.ready)
        return [server.url for server in self._servers]

    def close(self) -> None:
        """Stop the replicas. Idempotent."""
        if self._supervisor is not None:
            self._supervisor.stop()

    def _gpus(self) -> list[range]:
        """Return each replica's GPUs, as indices among the visible ones. Raises UserError if there are too few."""
        size, count = self._options.parallel_layout.min_world_size, self._options.replicas
        gpus = [range(first, first + size) for first in range(self._first_gpu, self._first_gpu + size * count, size)]
        if torch.cuda.is_available() and gpus[-1].stop > torch.cuda.device_count():
            key = teacher_key(self._name)
            raise UserError(
                f"{key}.replicas={count} of {size} GPUs each take GPUs {self._first_gpu} to {gpus[-1].stop - 1} of "
                f"this host, which shows {torch.cuda.device_count()} (counted from 0): lower {key}.replicas or its "
                f"layout, or start them elsewhere and name them in {key}.urls"
            )
        return gpus

    def _separate(self, log: Path, gpus: range, longest: int) -> ServerProcess:
        recipe = self._logs / "recipe.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(recipe, dump_recipe(self._recipe))
        return SeparateReplica(recipe, self._name, log, gpus=gpus, api_key=self.api_key)

    def _sglang(self, log: Path, gpus: range, longest: int) -> ServerProcess:
        options = self._options
        settings = SGLangSettings(
            HfFolder.open(options.model, f"{teacher_key(self._name)}.model").path,
            required_context_length(longest),
            tensor_parallel=len(gpus),
            precision=options.precision,
            mem_fraction_static=options.mem_fraction_static,
            max_concurrent_requests=options.max_concurrent_requests,
            api_key=self.api_key,
        )
        server = SGLangServer(settings, log, first_gpu=gpus.start)
        server.kind = REPLICA_KIND
        return server


class SeparateReplica(ServerProcess):
    """One `eaopd teach`, which launches its ranks."""

    kind = REPLICA_KIND

    def __init__(self, recipe: Path, name: str, log: Path, *, gpus: Sequence[int], api_key: str | None) -> None:
        super().__init__(log, api_key=api_key)
        self._recipe, self._name, self._gpus = recipe, name, gpus

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "eaopd_megatron", "teach", str(self._recipe)]
        named = ["--teacher", self._name] if self._name else []
        return [*command, *named, f"{teacher_key(self._name)}.listen=127.0.0.1:{self.port}"]

    def key_arguments(self, file: Path) -> list[str]:
        return [f"{teacher_key(self._name)}.api_key_file={file}"]

    def environment(self) -> Mapping[str, str | None]:
        if not torch.cuda.is_available():
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = [visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu) for gpu in self._gpus]
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
