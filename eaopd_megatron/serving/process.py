"""A server that this process starts on its own host, watches and ends; none is left behind, and none tells its key."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from eaopd_megatron.errors import UserError
from eaopd_megatron.utils.lifetime import ERROR_FILE_VARIABLE, LAUNCHER_PID_VARIABLE
from eaopd_megatron.utils.log import log_rank0

ROOT = Path(__file__).resolve().parents[2]
_STOP_SECONDS = 15.0
"""What a server has to end by itself."""
_BIND_ATTEMPTS = 3
"""A port that was free when it was chosen may be taken before the server binds it."""
_REDACTED = "***"
# Becomes the program in argv[2:], which the kernel ends when the thread that started it ends: the wish to die with
# the parent is kept across exec, so a program of another environment can have it too.
DIE_WITH_PARENT_PRELUDE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from eaopd_megatron.launch import die_with_parent
die_with_parent()
os.execvp(sys.argv[2], sys.argv[2:])
"""
# What the trainer's ranks have of their own world, which would be taken for the server's.
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK"),
    *("SLURM_PROCID", ERROR_FILE_VARIABLE),
)


class ServerProcess(ABC):
    """One server: its process, its port and its log. Start it from a thread that lives as long as it shall."""

    kind = "server"
    """What messages call it."""
    key_suffix = ""
    """Of the name of the file that holds its key."""

    def __init__(self, log: Path, *, api_key: str | None = None, host: str = "127.0.0.1") -> None:
        """host: the address to listen on. log: appended. The API key never gets there, nor onto a command line: the
        server reads it from a file."""
        self.log, self.api_key, self.host = log, api_key, host
        self.port = 0
        self.on_exit: Callable[[str], None] | None = None  # called from another thread with how it ended
        self._process: subprocess.Popen[bytes] | None = None
        self._copying: threading.Thread | None = None
        self._last: deque[str] = deque(maxlen=200)  # lines of the log
        self._key_file: Path | None = None
        self._place: socket.socket | None = None  # keeps the port from others while the server is not there

    @abstractmethod
    def command(self) -> list[str]:
        """Its command line, for `port`, without the key. Raises UserError where it cannot be started."""

    @abstractmethod
    def key_arguments(self, file: Path) -> list[str]:
        """What tells it the file of its key, appended to the command line."""

    def key_file_contents(self, key: str) -> str:
        """What is in that file."""
        return f"{key}\n"

    def environment(self) -> Mapping[str, str | None]:
        """Variables that it has beside this process's; None: that it has not."""
        return {}

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, later again on the same port; `wait_ready` tells when it serves."""
        if not self.port:
            self._free_place()
            self._place, self.port = _reserve()
        self._last.clear()
        command = self.command()
        if self.api_key is not None:
            descriptor, name = tempfile.mkstemp(prefix="eaopd-key-", suffix=self.key_suffix)  # mode 0600
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(self.key_file_contents(self.api_key))
            self._key_file = Path(name)
            command += self.key_arguments(self._key_file)
        changes: dict[str, str | None] = {
            **dict.fromkeys(_RANK_VARIABLES),
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            **self._without_proxy(),
            **self.environment(),
            LAUNCHER_PID_VARIABLE: str(os.getpid()),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT_PRELUDE, str(ROOT), *command],
            env={name: value for name, value in {**inherited, **changes}.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own processes end with it
        )
        self._copying = threading.Thread(target=self._copy, args=(self._process,), daemon=True)
        self._copying.start()
        threading.Thread(target=self._await_exit, args=(self._process,), daemon=True).start()

    def _without_proxy(self) -> dict[str, str]:
        """SGLang asks itself whether it serves, and would ask a site's proxy for its own address."""
        given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        return dict.fromkeys(("no_proxy", "NO_PROXY"), f"{given},{self.host}" if given else self.host)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        """Whether it serves; asks it."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{self.url}/ready", headers=headers, timeout=5.0, trust_env=False)
            if answer.status_code == 200:
                self.remove_key_file()
                return True
        return False

    def exit_reason(self) -> str:
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
        self.remove_key_file()
        self._free_place()
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        _kill_group(self._process.pid)
        self._process.wait()

    def last_line(self) -> str:
        return self._last[-1].strip() if self._last else "no output yet"

    def port_was_taken(self) -> bool:
        return any("address already in use" in line.lower() for line in self._last)

    def _free_place(self) -> None:
        if self._place is not None:
            self._place.close()
            self._place = None

    def _copy(self, process: subprocess.Popen[bytes]) -> None:
        key = self.api_key
        assert process.stdout is not None
        with self.log.open("a", encoding="utf-8") as log, process.stdout:
            for raw in process.stdout:
                line = raw.decode("utf-8", errors="replace")
                line = line.replace(key, _REDACTED) if key else line
                log.write(line)
                log.flush()
                self._last.append(line)

    def _await_exit(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        _kill_group(process.pid)  # its workers, should one have outlived it
        self.remove_key_file()
        if self.on_exit is not None and process is self._process:
            self.on_exit(self.exit_reason())

    def remove_key_file(self) -> None:
        """The server has read its API key."""
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)


def wait_until_serving(
    servers: Sequence[ServerProcess],
    *,
    limit: float = 900.0,
    interval: float = 15.0,
    report: Callable[[str], None] = log_rank0,
) -> None:
    """Returns when all of them serve. Raises UserError when one ends, or does not serve within `limit` seconds.

    report: gets a line every `interval` seconds and at the end.
    """
    kind, plural = servers[0].kind, "s" * (len(servers) > 1)
    started = reported = time.monotonic()
    waiting = dict.fromkeys(range(len(servers)), 1)  # attempts
    report(f"starting {len(servers)} {kind}{plural}")
    while waiting:
        now = time.monotonic()
        for i in list(waiting):
            server = servers[i]
            if not server.alive():
                why = server.exit_reason()
                if not server.port_was_taken() or waiting[i] == _BIND_ATTEMPTS:
                    raise UserError(f"{kind} {i} did not start; it {why}")
                waiting[i] += 1
                server.port = 0
                server.start()
            elif server.ready():
                del waiting[i]
            elif now - started > limit:
                raise UserError(f"{kind} {i} does not serve after {limit:g} s; it {server.exit_reason()}")
        if waiting and now - reported > interval:
            reported = now
            first = min(waiting)
            report(f"{kind} {first} is starting since {now - started:.0f} s: {servers[first].last_line()[:120]}")
        if waiting:
            time.sleep(0.2)
    report(f"{len(servers)} {kind}{plural} ready after {time.monotonic() - started:.0f} s")


def stop_servers(servers: Sequence[ServerProcess]) -> None:
    """Ends them, all at the same time."""
    threads = [threading.Thread(target=server.stop) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _reserve() -> tuple[socket.socket, int]:
    """A port of this host that nobody gets but who binds it with SO_REUSEADDR, as servers do, for as long as the socket
    is open: a server that is started again would else find an outgoing connection on its port."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    return place, int(place.getsockname()[1])


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
