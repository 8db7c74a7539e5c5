"""SGLang servers that the trainer starts itself, on this host, and ends.

On a machine without CUDA a server is SGLang as `tools/install_sglang_cpu.sh` installs it; with CUDA it is the one of
this environment (the `sglang` extra). The flags for CUDA have not been run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.process import ROOT, ServerProcess, stop_servers, wait_until_serving

SGLANG_VENV_VARIABLE = "EAOPD_SGLANG_VENV"

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--disable-overlap-schedule", "--sleep-on-idle"),  # without the latter an idle server takes a whole core
)
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # with more, small models are an order of magnitude slower
}


@dataclass(frozen=True)
class SGLangSettings:
    """What the servers of a run have in common."""

    model: Path  # a Hugging Face folder
    context_length: int  # `wire.RESERVED_TOKENS` more than a prompt and its response take
    tensor_parallel: int = 1
    precision: str = "bf16"  # "bf16" | "fp32"
    mem_fraction_static: float = 0.8  # of a GPU's memory, or of the host's, for weights and cache
    max_concurrent_requests: int = 64  # requests that one server works on at the same time
    colocated: bool = False  # on the trainer's GPUs, from `first_gpu` 0: their memory can be released (`memory.py`)
    host: str = "127.0.0.1"  # the address to listen on
    api_key: str | None = field(default=None, repr=False)

    def flags(self, port: int, *, cuda: bool) -> list[str]:
        """The server's command line but for the API key, which is given in a file."""
        return [
            *("--model-path", str(self.model), "--host", self.host, "--port", str(port)),
            *("--dtype", {"bf16": "bfloat16", "fp32": "float32"}[self.precision]),
            *("--tp-size", str(self.tensor_parallel), "--context-length", str(self.context_length)),
            *(
                "--mem-fraction-static",
                str(self.mem_fraction_static),
                "--max-running-requests",
                str(self.max_concurrent_requests),
            ),
            *("--weight-version", "0", "--skip-tokenizer-init", "--grammar-backend", "none"),
            *(("--enable-memory-saver",) if cuda and self.colocated else ()),
            *(
                ()
                if cuda
                else (*CPU_FLAGS, "--max-total-tokens", str(self.max_concurrent_requests * self.context_length))
            ),
        ]

    def gpu_flags(self, first_gpu: int) -> list[str]:
        """Flags for a server on `tensor_parallel` GPUs from this one on, counted among the visible ones.

        It sees all of them: weights may come to it as handles of the trainer's memory. Raises UserError where there are
        too few.
        """
        there = torch.cuda.device_count()
        last = first_gpu + self.tensor_parallel - 1
        if last >= there:
            raise UserError(
                f"a rollout server needs GPUs {first_gpu} to {last} of this host, which shows {there} "
                "(counted from 0): lower servers.count or servers.tensor_parallel"
            )
        return ["--base-gpu-id", str(first_gpu)]

    def environment(self, *, cuda: bool) -> dict[str, str]:
        """Variables of a server."""
        if not cuda:
            threads = {"SGLANG_CPU_OMP_THREADS_BIND": _one_core_a_rank(self.tensor_parallel)}
            return {**CPU_ENVIRONMENT, **(threads if self.tensor_parallel > 1 else {})}
        return {}


class SGLangServer(ServerProcess):
    """One server of a run."""

    kind = "rollout server"
    key_suffix = ".yaml"

    def __init__(self, settings: SGLangSettings, log: Path, *, first_gpu: int = 0) -> None:
        super().__init__(
            log, api_key=settings.api_key, host=settings.host
        )  # SGLang prints its settings, the key among them
        self.settings, self.first_gpu = settings, first_gpu

    def command(self) -> list[str]:
        cuda = torch.cuda.is_available()
        placed = self.settings.gpu_flags(self.first_gpu) if cuda else []
        return [*sglang_command(cuda), *self.settings.flags(self.port, cuda=cuda), *placed]

    def key_arguments(self, file: Path) -> list[str]:
        return ["--config", str(file)]

    def key_file_contents(self, key: str) -> str:
        return f"api-key: '{key.replace(chr(39), 2 * chr(39))}'\n"

    def environment(self) -> Mapping[str, str | None]:
        cuda = torch.cuda.is_available()
        own: dict[str, str | None] = {**self.settings.environment(cuda=cuda)}
        return own if cuda else {**own, "PYTHONPATH": None}  # another environment has its own path


class SGLangServers:
    """The servers of a run; a context manager that starts them all and leaves none behind."""

    def __init__(self, settings: SGLangSettings, count: int, logs: Path, *, first_gpu: int = 0) -> None:
        """logs: folder of server_N.log. first_gpu: of the first server; the others follow."""
        self.all = [
            SGLangServer(settings, logs / f"server_{i}.log", first_gpu=first_gpu + i * settings.tensor_parallel)
            for i in range(count)
        ]

    def __enter__(self) -> SGLangServers:
        try:
            for server in self.all:
                server.start()
            wait_until_serving(self.all)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_servers(self.all)


def sglang_command(cuda: bool) -> list[str]:
    """The interpreter that has SGLang, and its module. Raises UserError where there is none."""
    if cuda and importlib.util.find_spec("sglang") is not None:
        return [sys.executable, "-m", "sglang.launch_server"]
    python = Path(os.environ.get(SGLANG_VENV_VARIABLE) or ROOT / ".venv-sglang") / "bin" / "python"
    if not cuda and python.exists():
        return [str(python), "-m", "sglang.launch_server"]
    remedy = "pip install 'eaopd-megatron[sglang]'" if cuda else "bash tools/install_sglang_cpu.sh"
    raise UserError(f"SGLang is not installed ({'in this environment' if cuda else python}): {remedy}")


def _one_core_a_rank(ranks: int) -> str:
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[i % len(cores)]) for i in range(ranks))
