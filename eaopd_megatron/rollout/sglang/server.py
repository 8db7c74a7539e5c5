"""SGLang servers that the trainer starts itself, on this host, and ends.

On a machine without CUDA a server is SGLang as `tools/install_sglang_cpu.sh` installs it; with CUDA it is the one of
this environment (the `sglang` extra). The flags for CUDA have not been run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.guard import say
from eaopd_megatron.launch import LAUNCHER_PID

ROOT = Path(__file__).resolve().parents[3]
SGLANG_VENV = "EAOPD_SGLANG_VENV"
STOP_SECONDS = 15.0
"""What a server has to end by itself."""
START_ATTEMPTS = 3
"""A port that was free when it was chosen may be taken before the server binds it."""
HIDDEN = "***"
# Becomes the program in argv[2:], which the kernel ends when the thread that started it ends: the wish to die with
# the parent is kept across exec, so a program of another environment can have it too.
TIED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from eaopd_megatron.launch import die_with_parent
die_with_parent()
os.execvp(sys.argv[2], sys.argv[2:])
"""
# What the trainer's ranks have of their own world, which would be taken for the server's.
RANKS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK")

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
class ServerSettings:
    """What the servers of a run have in common."""

    model: Path  # a Hugging Face folder
    context_length: int  # `wire.RESERVED_TOKENS` more than a prompt and its response take
    tensor_parallel: int = 1
    precision: str = "bf16"  # "bf16" | "fp32"
    memory_fraction: float = 0.8  # of a GPU's memory, or of the host's, for weights and cache
    max_running: int = 64  # requests that one server works on at the same time
    colocated: bool = False  # on the trainer's GPUs, from `first_gpu` 0: their memory can be released (`memory.py`)
    api_key: str | None = field(default=None, repr=False)

    def flags(self, port: int, *, cuda: bool) -> list[str]:
        """The server's command line but for the API key, which is given in a file."""
        return [
            *("--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", {"bf16": "bfloat16", "fp32": "float32"}[self.precision]),
            *("--tp-size", str(self.tensor_parallel), "--context-length", str(self.context_length)),
            *("--mem-fraction-static", str(self.memory_fraction), "--max-running-requests", str(self.max_running)),
            *("--weight-version", "0", "--skip-tokenizer-init", "--grammar-backend", "none"),
            *(("--enable-memory-saver",) if cuda and self.colocated else ()),
            *(() if cuda else (*CPU_FLAGS, "--max-total-tokens", str(self.max_running * self.context_length))),
        ]

    def placed(self, first_gpu: int) -> list[str]:
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


class Server:
    """One server: its process, its port and its log. Start it from a thread that lives as long as it shall."""

    def __init__(self, settings: ServerSettings, log: Path, *, first_gpu: int = 0) -> None:
        """log: appended. The API key never gets there, though SGLang prints its settings."""
        self.settings, self.log, self.first_gpu = settings, log, first_gpu
        self.port = 0
        self.on_exit: Callable[[str], None] | None = None  # called from another thread with how it ended
        self._process: subprocess.Popen[bytes] | None = None
        self._copying: threading.Thread | None = None
        self._last: deque[str] = deque(maxlen=200)  # lines of the log
        self._key_file: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, later again on the same port; `wait_ready` tells when it serves."""
        cuda = torch.cuda.is_available()
        self.port = self.port or _free_port()
        self._last.clear()
        placed = self.settings.placed(self.first_gpu) if cuda else []
        command = [*server_command(cuda), *self.settings.flags(self.port, cuda=cuda), *placed]
        if self.settings.api_key is not None:
            descriptor, name = tempfile.mkstemp(prefix="eaopd-server-", suffix=".yaml")  # mode 0600
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(f"api-key: '{self.settings.api_key.replace(chr(39), 2 * chr(39))}'\n")
            self._key_file = Path(name)
            command += ["--config", name]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")},
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            **self.settings.environment(cuda=cuda),
            LAUNCHER_PID: str(os.getpid()),
        }
        for name in (*RANKS_VARIABLES, *(() if cuda else ("PYTHONPATH",))):  # another environment has its own path
            environment.pop(name, None)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", TIED, str(ROOT), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own processes end with it
        )
        self._copying = threading.Thread(target=self._copy, args=(self._process,), daemon=True)
        self._copying.start()
        threading.Thread(target=self._await_exit, args=(self._process,), daemon=True).start()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        """Whether it serves; asks it."""
        with suppress(httpx.TransportError):
            served = httpx.get(f"{self.url}/ready", timeout=5.0, trust_env=False).status_code == 200
            if served:
                self.forget_key_file()
            return served
        return False

    def why(self) -> str:
        """How it ended, with the line of its log that tells most, in one line."""
        code = None if self._process is None else self._process.poll()
        if self._copying is not None and code is not None:
            self._copying.join(timeout=5.0)
        ended = "runs" if code is None else f"ended with exit code {code}" if code >= 0 else f"was killed by {-code}"
        lines = [line for line in self._last if line.strip()]
        errors = [line for line in lines if re.match(r"(.*\berror: |[\w.]*(Error|Exception)\b)", line)]
        said = (errors or lines or ["it wrote nothing"])[-1]
        return f"{ended}: {said.strip()[:300]} (log: {self.log})"

    def stop(self) -> None:
        """Ends it; SIGTERM first, then, for what is left of it, SIGKILL."""
        self.on_exit = None
        self.forget_key_file()
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        _kill_group(self._process.pid)
        self._process.wait()

    def last_line(self) -> str:
        return self._last[-1].strip() if self._last else "no output yet"

    def port_was_taken(self) -> bool:
        return any("address already in use" in line.lower() for line in self._last)

    def _copy(self, process: subprocess.Popen[bytes]) -> None:
        key = self.settings.api_key
        assert process.stdout is not None
        with self.log.open("a", encoding="utf-8") as log, process.stdout:
            for raw in process.stdout:
                line = raw.decode("utf-8", errors="replace")
                line = line.replace(key, HIDDEN) if key else line
                log.write(line)
                log.flush()
                self._last.append(line)

    def _await_exit(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        _kill_group(process.pid)  # its workers, should one have outlived it
        self.forget_key_file()
        if self.on_exit is not None and process is self._process:
            self.on_exit(self.why())

    def forget_key_file(self) -> None:
        """The server has read its API key."""
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)


class Servers:
    """The servers of a run; a context manager that starts them all and leaves none behind."""

    def __init__(self, settings: ServerSettings, count: int, logs: Path, *, first_gpu: int = 0) -> None:
        """logs: folder of server_N.log. first_gpu: of the first server; the others follow."""
        self.all = [
            Server(settings, logs / f"server_{i}.log", first_gpu=first_gpu + i * settings.tensor_parallel)
            for i in range(count)
        ]

    def __enter__(self) -> Servers:
        try:
            for server in self.all:
                server.start()
            wait_ready(self.all)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        threads = [threading.Thread(target=server.stop) for server in self.all]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def wait_ready(
    servers: Sequence[Server], *, limit: float = 900.0, interval: float = 15.0, report: Callable[[str], None] = say
) -> None:
    """Returns when all of them serve. Raises UserError when one ends, or does not serve within `limit` seconds.

    report: gets a line every `interval` seconds and at the end.
    """
    started = reported = time.monotonic()
    waiting = dict.fromkeys(range(len(servers)), 1)  # attempts
    report(f"starting {len(servers)} SGLang server{'s' * (len(servers) > 1)} (a minute or so on a CPU)")
    while waiting:
        now = time.monotonic()
        for i in list(waiting):
            server = servers[i]
            if not server.alive():
                why = server.why()
                if not server.port_was_taken() or waiting[i] == START_ATTEMPTS:
                    raise UserError(f"rollout server {i} did not start; it {why}")
                waiting[i] += 1
                server.port = 0
                server.start()
            elif server.ready():
                del waiting[i]
            elif now - started > limit:
                raise UserError(f"rollout server {i} does not serve after {limit:g} s; it {server.why()}")
        if waiting and now - reported > interval:
            reported = now
            first = min(waiting)
            report(f"server {first} is starting since {now - started:.0f} s: {servers[first].last_line()[:120]}")
        if waiting:
            time.sleep(0.2)
    report(f"{len(servers)} SGLang server{'s' * (len(servers) > 1)} ready after {time.monotonic() - started:.0f} s")


def server_command(cuda: bool) -> list[str]:
    """The interpreter that has SGLang, and its module. Raises UserError where there is none."""
    if cuda and importlib.util.find_spec("sglang") is not None:
        return [sys.executable, "-m", "sglang.launch_server"]
    python = Path(os.environ.get(SGLANG_VENV) or ROOT / ".venv-sglang") / "bin" / "python"
    if not cuda and python.exists():
        return [str(python), "-m", "sglang.launch_server"]
    remedy = "pip install 'eaopd-megatron[sglang]'" if cuda else "bash tools/install_sglang_cpu.sh"
    raise UserError(f"SGLang is not installed ({'in this environment' if cuda else python}): {remedy}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _one_core_a_rank(ranks: int) -> str:
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[i % len(cores)]) for i in range(ranks))


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
