"""SGLang server processes on this host: settings, command line and environment.

Without CUDA a server is SGLang as `tools/install_sglang_cpu.sh` installs it; with CUDA it is this environment's (the
`sglang` extra).
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
from eaopd_megatron.serving.process import ROOT, ServerProcess
from eaopd_megatron.utils.gpu_environment import update_group_environment

SGLANG_VENV_VARIABLE = "EAOPD_SGLANG_VENV"

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--disable-overlap-schedule", "--sleep-on-idle"),  # without it an idle server burns a whole core
)
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # with more, small models are an order of magnitude slower
}


@dataclass(frozen=True)
class SGLangSettings:
    """Settings that the servers of a run share."""

    model: Path  # a Hugging Face folder
    context_length: int  # see `requests.required_context_length`
    tensor_parallel: int = 1
    precision: str = "bf16"  # "bf16" | "fp32"
    mem_fraction_static: float = 0.8  # fraction of the GPU's (or host's) memory for weights and KV cache
    max_concurrent_requests: int = 64  # per server
    colocated: bool = False  # on the trainer's GPUs: their memory can be released (`colocation.py`)
    host: str = "127.0.0.1"  # address to listen on
    api_key: str | None = field(default=None, repr=False)

    def flags(self, port: int, *, cuda: bool) -> list[str]:
        """Return the server's command line without the API key, which is passed in a file."""
        requests = self.max_concurrent_requests
        return [
            *("--model-path", str(self.model), "--host", self.host, "--port", str(port)),
            *("--dtype", {"bf16": "bfloat16", "fp32": "float32"}[self.precision]),
            *("--tp-size", str(self.tensor_parallel), "--context-length", str(self.context_length)),
            *("--mem-fraction-static", str(self.mem_fraction_static), "--max-running-requests", str(requests)),
            *("--weight-version", "0", "--skip-tokenizer-init", "--grammar-backend", "none"),
            *(("--enable-memory-saver",) if cuda and self.colocated else ()),
            *(() if cuda else (*CPU_FLAGS, "--max-total-tokens", str(requests * self.context_length))),
        ]

    def gpu_flags(self, first_gpu: int) -> list[str]:
        """Return the flags for a server on `tensor_parallel` GPUs starting at this one, among the visible GPUs.

        The server sees all of them, because weights may arrive as handles of the trainer's memory. Raises UserError if
        there are too few.
        """
        available = torch.cuda.device_count()
        last = first_gpu + self.tensor_parallel - 1
        if last >= available:
            raise UserError(
                f"a rollout server needs GPUs {first_gpu} to {last} of this host, which shows {available} "
                "(counted from 0): lower servers.count or servers.tensor_parallel"
            )
        return ["--base-gpu-id", str(first_gpu)]


class SGLangServer(ServerProcess):
    """One SGLang server."""

    kind = "rollout server"
    key_suffix = ".yaml"

    def __init__(self, settings: SGLangSettings, log: Path, *, first_gpu: int = 0) -> None:
        super().__init__(log, api_key=settings.api_key, host=settings.host)
        self.settings, self.first_gpu = settings, first_gpu

    def command(self) -> list[str]:
        cuda = torch.cuda.is_available()
        gpus = self.settings.gpu_flags(self.first_gpu) if cuda else []
        return [*sglang_command(cuda), *self.settings.flags(self.port, cuda=cuda), *gpus]

    def key_arguments(self, file: Path) -> list[str]:
        return ["--config", str(file)]

    def key_file_contents(self, key: str) -> str:
        return f"api-key: '{key.replace(chr(39), 2 * chr(39))}'\n"

    def environment(self) -> Mapping[str, str | None]:
        if torch.cuda.is_available():
            return update_group_environment()
        cores, ranks = sorted(os.sched_getaffinity(0)), self.settings.tensor_parallel
        one_core_per_rank = "|".join(str(cores[i % len(cores)]) for i in range(ranks))
        threads = {"SGLANG_CPU_OMP_THREADS_BIND": one_core_per_rank} if ranks > 1 else {}
        return {**CPU_ENVIRONMENT, **threads, "PYTHONPATH": None}  # SGLang's environment is another one


def sglang_servers(settings: SGLangSettings, count: int, logs: Path, *, first_gpu: int = 0) -> list[SGLangServer]:
    """Return the servers of a run, for a `Supervisor` to start. logs: folder of server_N.log. first_gpu: of the first
    server; the others follow."""
    return [
        SGLangServer(settings, logs / f"server_{i}.log", first_gpu=first_gpu + i * settings.tensor_parallel)
        for i in range(count)
    ]


def sglang_command(cuda: bool) -> list[str]:
    """Return the interpreter that has SGLang, and the module to run. Raises UserError if there is none."""
    if cuda and importlib.util.find_spec("sglang") is not None:
        return [sys.executable, "-m", "sglang.launch_server"]
    python = Path(os.environ.get(SGLANG_VENV_VARIABLE) or ROOT / ".venv-sglang") / "bin" / "python"
    if not cuda and python.exists():
        return [str(python), "-m", "sglang.launch_server"]
    remedy = "pip install 'eaopd-megatron[sglang]'" if cuda else "bash tools/install_sglang_cpu.sh"
    raise UserError(f"SGLang is not installed ({'in this environment' if cuda else python}): {remedy}")
