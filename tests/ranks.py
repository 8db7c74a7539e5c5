"""Start N gloo ranks once and run many checks on them, each with its own outcome.

A check is a function ``check_xxx(group, **arguments)`` in a module that can be imported from its path. Every rank calls
it; ``group`` is the process group of all ranks (gloo, 127.0.0.1). A check passes when no rank raises. Ranks are forked
from one process that has imported torch and Megatron-Core, so new ones cost little. A test module looks like this::

    CHECKS = Path(__file__).with_name("checks_models.py")

    @pytest.fixture(scope="module")            # or "session", in a conftest.py, to share the ranks between modules
    def two_ranks():
        with Ranks(2) as ranks:
            yield ranks

    @pytest.mark.parametrize("check", checks_in(CHECKS))
    def test_two_ranks(two_ranks, check):
        two_ranks.run(CHECKS, check)           # or .run(CHECKS, "check_one", preset="opd"): arguments go through JSON

``run`` raises `RankFailure` (an AssertionError) with the traceback of each rank that failed, the first one first, and
what the check printed. A failure in one check does not disturb the next: the world is rebuilt, and ranks that died or
hung are started anew. So are ranks that a check leaves with many threads: those of gloo's groups poll for as long as
the process lives. A check has ``limit`` seconds; a rank that takes longer dies and its stack is in the report. The
state that a check leaves in its modules (Megatron's global groups, say) stays for the next check: a check must clean up
after itself, and module-level caches must not hold process groups.

Ranks have RANK, WORLD_SIZE and LOCAL_RANK set, one thread each (OMP_NUM_THREADS=1), and the repository's root on their
path.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = [
    "pytest",
    "eaopd_megatron.training.components",
    "eaopd_megatron.training.step",
    "eaopd_megatron.checkpoint.convert",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3", "qwen3_moe")),
    "transformers.tokenization_utils_base",
    "tests.tiny_models",
    "tests.ranks",
]
"""By the process from which ranks are forked."""
MOST_THREADS = 40
CRASHED = f"died with exit code {-signal.SIGSEGV}"


class RankFailure(AssertionError):
    """A check failed on at least one rank."""


class _Crashed(RankFailure):
    """A rank had a segmentation fault."""


def checks_in(module: str | Path) -> list[str]:
    """Return the names of a module's functions ``check_*``, in the order of the file, without importing it."""
    tree = ast.parse(Path(module).read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


class Ranks:
    """N gloo ranks that wait for checks. A context manager; the ranks start with the first check."""

    def __init__(self, world_size: int, *, limit: float = 60.0, environment: Mapping[str, str] | None = None) -> None:
        """limit: seconds for one check. environment: extra variables for the ranks, which then start without the
        preloaded process."""
        self.world_size = world_size
        self.limit = limit
        self._environment = dict(environment or {})
        self._processes: list[BaseProcess] = []
        self._store: dist.TCPStore | None = None
        self._folder: Path | None = None
        self._orders = 0
        self._world = 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, module: str | Path, check: str, **arguments: Any) -> None:
        """Run one check on every rank; raise RankFailure when a rank fails, dies or takes longer than the limit."""
        __tracebackhide__ = True  # pytest shows the ranks' tracebacks only
        try:
            self._run(module, check, arguments)
        except _Crashed as crash:
            # gloo's own thread jumps into freed memory once in some ten thousand checks; a crash of ours comes again
            print(f"run once more: {crash}")
            self._run(module, check, arguments)

    def _run(self, module: str | Path, check: str, arguments: Mapping[str, Any]) -> None:
        __tracebackhide__ = True
        if self._store is None:
            self._start()
        store = self._store
        assert store is not None
        order = self._orders
        self._orders += 1
        printed = [log.stat().st_size for log in self._logs()]
        request = {"module": str(Path(module).resolve()), "check": check, "arguments": arguments, "world": self._world}
        store.set(f"order/{order}", json.dumps(request))
        outcomes, dead = self._collect(store, order)
        failures = sorted((done for done in outcomes.values() if done["report"]), key=lambda done: done["time"])
        if not failures and not dead:
            if any(done["threads"] > MOST_THREADS for done in outcomes.values()):
                self.close()
            return
        report = [f"{check} failed on {self.world_size} ranks"]
        report += [f"--- rank {done['rank']} raised\n{done['report']}" for done in failures]
        report += [f"--- rank {rank} {how}" for rank, how in dead.items()]
        for rank, (log, start) in enumerate(zip(self._logs(), printed, strict=True)):
            tail = log.read_bytes()[start:].decode(errors="replace")[-4000:].strip()
            report += [f"--- rank {rank} printed\n{tail}"] if tail else []
        self._world += 1
        if dead:
            self.close()
        raise (_Crashed if CRASHED in dead.values() else RankFailure)("\n".join(report))

    def close(self) -> None:
        """Kill the ranks; they have no state to save."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._store, self._folder, self._orders = [], None, None, 0

    def _start(self) -> None:
        # The parent hosts the store on a port that the system chooses, so no other process can take it in between.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        environment = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **self._environment,
        }
        context: Any = multiprocessing.get_context("spawn" if self._environment else "forkserver")
        context.set_forkserver_preload(IMPORTED)
        with mock.patch.dict(os.environ, environment):
            for rank in range(self.world_size):
                log = self._folder / f"{rank}.txt"
                log.touch()
                arguments = (rank, self.world_size, self._store.port, self.limit, log)
                process = context.Process(target=_serve, args=arguments)
                process.start()
                self._processes.append(process)

    def _logs(self) -> list[Path]:
        assert self._folder is not None
        return [self._folder / f"{rank}.txt" for rank in range(self.world_size)]

    def _collect(self, store: dist.TCPStore, order: int) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """Return the outcomes by rank, and how ranks without an outcome ended."""
        outcomes: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.limit + 60 * (order == 0) + 10  # the first check includes the imports
        while True:
            alive = [process.is_alive() for process in self._processes]
            for rank in range(self.world_size):
                if rank not in outcomes and store.check([f"outcome/{order}/{rank}"]):
                    outcomes[rank] = json.loads(store.get(f"outcome/{order}/{rank}"))
            missing = [rank for rank in range(self.world_size) if rank not in outcomes]
            if not missing:
                return outcomes, {}
            gone = [rank for rank in missing if not alive[rank]]
            if gone or time.monotonic() > deadline:
                codes = {rank: f"died with exit code {self._processes[rank].exitcode}" for rank in gone}
                return outcomes, codes or dict.fromkeys(missing, f"gave no answer within {self.limit:g} s")
            time.sleep(0.005)


def _load(path: str) -> ModuleType:
    name = Path(path).stem
    if name in sys.modules:
        found = sys.modules[name].__file__
        assert found == path, f"{path} needs a file name of its own: {found} is loaded under it"
        return sys.modules[name]
    sys.path.insert(1, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _leave_world() -> None:
    # Closes the connections, so that ranks that still wait in a collective of the failed check get an error at once.
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def _serve(rank: int, world_size: int, port: int, limit: float, log: Path) -> None:
    """Serve on one rank: receive an order, run the check, report the outcome."""
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *[os.open(log, os.O_WRONLY | os.O_APPEND)] * 2)):
        os.dup2(file, number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(days=1))
    world = -1
    order = 0
    while True:
        store.wait([f"order/{order}"], timedelta(days=1))
        request = json.loads(store.get(f"order/{order}"))
        report = ""
        try:
            module = _load(request["module"])
            faulthandler.dump_traceback_later(limit, exit=True)
            if request["world"] != world:
                _leave_world()
                world = request["world"]
                dist.init_process_group(
                    "gloo",
                    store=dist.PrefixStore(f"world/{world}", store),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=0.8 * limit),
                )
            getattr(module, request["check"])(dist.group.WORLD, **request["arguments"])
        except Exception:
            report = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        outcome = {"rank": rank, "time": time.time(), "report": report, "threads": len(os.listdir("/proc/self/task"))}
        if report:
            world = -1
            with contextlib.suppress(Exception):
                _leave_world()
        store.set(f"outcome/{order}/{rank}", json.dumps(outcome))
        order += 1
