"""A server process on this host: it ends with the thread that started it and never shows its API key."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from eaopd_megatron.serving.http import server_is_ready
from eaopd_megatron.utils.gpu_environment import own_variables
from eaopd_megatron.utils.lifetime import ERROR_FILE_VARIABLE, LAUNCHER_PID_VARIABLE
from eaopd_megatron.utils.ports import reserve_port

ROOT = Path(__file__).resolve().parents[2]
BIND_ATTEMPTS = 3  # a port that was free when it was chosen may be taken before the server binds it
_STOP_SECONDS = 15.0  # from SIGTERM to SIGKILL
_REDACTED = "***"
# Becomes the program in argv[2:], of any environment: the parent-death signal survives exec.
_DIE_WITH_PARENT_PRELUDE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from eaopd_megatron.utils.lifetime import die_with_parent
die_with_parent()
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Of the trainer's own process group, which the server would take for its own.
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK"),
    *("SLURM_PROCID", ERROR_FILE_VARIABLE),
)


class ServerProcess(ABC):
    """One server: its process, port and log. Start it from a thread that outlives it."""

    kind = "server"  # in messages
    key_suffix = ""  # of the file that holds the API key

    def __init__(self, log: Path, *, api_key: str | None = None, host: str = "127.0.0.1") -> None:
        """host: address to listen on. log: output is appended. The server reads its API key from a file: the
        key is in no log and on no command line."""
        self.log, self.api_key, self.host = log, api_key, host
        self.port = 0
        self.on_exit: Callable[[str], None] | None = None  # called in another thread with the exit reason
        self._process: subprocess.Popen[bytes] | None = None
        self._log_thread: threading.Thread | None = None
        self._exit_thread: threading.Thread | None = None
        self._last_lines: deque[str] = deque(maxlen=200)
        self._key_file: Path | None = None
        self._reserved = socket.socket()  # keeps the port from others while the server is down

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line for `port`, without the API key. Raises UserError."""

    @abstractmethod
    def key_arguments(self, file: Path) -> list[str]:
        """Return arguments, for the end of the command line, that name the file of the API key."""

    def key_file_contents(self, key: str) -> str:
        return f"{key}\n"

    def environment(self) -> Mapping[str, str | None]:
        """Return environment overrides for the server. A value of None removes the variable."""
        return {}

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process, on the same port as before if it was started before. Returns before it serves."""
        if self._exit_thread is not None:
            self._exit_thread.join()
        if not self.port:
            self._reserved.close()
            self._reserved, self.port = reserve_port()
        self._last_lines.clear()
        command = self.command()
        if self.api_key is not None:
            descriptor, name = tempfile.mkstemp(prefix="eaopd-key-", suffix=self.key_suffix)  # mode 0600
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(self.key_file_contents(self.api_key))
            self._key_file = Path(name)
            command += self.key_arguments(self._key_file)
        overrides: dict[str, str | None] = {
            **dict.fromkeys((*_RANK_VARIABLES, *own_variables())),
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            **self._no_proxy(),
            **self.environment(),
            LAUNCHER_PID_VARIABLE: str(os.getpid()),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT_PRELUDE, str(ROOT), *command],
            env={name: value for name, value in {**inherited, **overrides}.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its worker processes are killed with it, as a group
        )
        self._log_thread = threading.Thread(target=self._copy_output, args=(self._process,), daemon=True)
        self._log_thread.start()
        self._exit_thread = threading.Thread(target=self._await_exit, args=(self._process,), daemon=True)
        self._exit_thread.start()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        """Ask the server whether it serves. Blocks for up to 5 s."""
        if server_is_ready(self.url, self.api_key):
            self.remove_key_file()
            return True
        return False

    def exit_reason(self) -> str:
        """Return how the process ended, with the most telling line of its log, in one line."""
        code = None if self._process is None else self._process.poll()
        if self._log_thread is not None and code is not None:
            self._log_thread.join(timeout=5.0)
        ended = "runs" if code is None else f"ended with exit code {code}" if code >= 0 else f"was killed by {-code}"
        lines = [line for line in self._last_lines if line.strip()]
        errors = [line for line in lines if re.match(r"(.*\berror: |[\w.]*(Error|Exception)\b)", line)]
        line = (errors or lines or ["it wrote nothing"])[-1]
        return f"{ended}: {line.strip()[:300]} (log: {self.log})"

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whatever is left of its process group."""
        self.on_exit = None
        self.remove_key_file()
        self._reserved.close()
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        _kill_group(self._process.pid)
        self._process.wait()

    def last_line(self) -> str:
        return self._last_lines[-1].strip() if self._last_lines else "no output yet"

    def port_was_taken(self) -> bool:
        return any("address already in use" in line.lower() for line in self._last_lines)

    def remove_key_file(self) -> None:
        """Remove the file of the API key, once the server has read it."""
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    def _no_proxy(self) -> dict[str, str]:
        """Exempt the server's address from proxies: SGLang requests its own address to see whether it serves."""
        inherited = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        return dict.fromkeys(("no_proxy", "NO_PROXY"), f"{inherited},{self.host}" if inherited else self.host)

    def _copy_output(self, process: subprocess.Popen[bytes]) -> None:
        key = self.api_key
        assert process.stdout is not None
        with self.log.open("a", encoding="utf-8") as log, process.stdout:
            for raw in process.stdout:
                line = raw.decode("utf-8", errors="replace")
                line = line.replace(key, _REDACTED) if key else line
                log.write(line)
                log.flush()
                self._last_lines.append(line)

    def _await_exit(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        _kill_group(process.pid)  # workers may outlive the server
        self.remove_key_file()
        if self.on_exit is not None:
            self.on_exit(self.exit_reason())


def stop_servers(servers: Sequence[ServerProcess]) -> None:
    """Stop all servers at the same time."""
    threads = [threading.Thread(target=server.stop) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
