"""Until the services of a job serve: who is awaited, how far they are, and that one of them will never come."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import httpx

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.server import SGLangServer
from eaopd_megatron.rollout.sglang.server_manager import rollout_server_settings
from eaopd_megatron.serving.client import read_api_key
from eaopd_megatron.utils.log import log_rank0


def staged(model: Path, stage: Path) -> Path:
    """Where the copy of `model` lies: the same on every node."""
    return stage / f"{model.name}-{hashlib.sha256(str(model).encode()).hexdigest()[:12]}"


def stage_model(model: Path, stage: Path) -> Path:
    """Copies the folder where it is not there yet; jobs on the same node wait for each other. Raises UserError."""
    there = staged(model, stage)
    partial = there.with_name(f".{there.name}.partial")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        with (stage / f".{there.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not there.exists():
                needed = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
                free = shutil.disk_usage(stage).free
                if needed > free:
                    raise UserError(
                        f"EAOPD_STAGE: {stage} has {free / 2**30:.1f} GiB free, {model} takes {needed / 2**30:.1f}"
                    )
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(model, partial)
                os.replace(partial, there)
    except OSError as error:
        raise UserError(f"EAOPD_STAGE: {model} could not be copied to {stage}: {error.strerror or error}") from None
    return there


def serve(recipe: Recipe, listen: str, key_file: Path, log: Path) -> None:
    """Returns when a signal has ended the server. Raises UserError when it ends by itself.

    listen: HOST:PORT. log: the server's, in which its key never stands.
    """
    host, _, port = listen.rpartition(":")
    student = HfFolder.open(recipe.student.model, "student.model")
    positions = student.config.max_position_embeddings
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    if recipe.evaluation.benchmarks:  # whose problems are as long as they are
        longest = positions
    settings = rollout_server_settings(recipe, student, longest, read_api_key(key_file))
    # the prompts may be shorter than the recipe lets them be, and SGLang refuses more than the model has positions for
    context = min(settings.context_length, positions)
    server = SGLangServer(replace(settings, context_length=context, host=host), log)
    server.port = int(port)
    asked, ended = threading.Event(), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.on_exit = lambda why: ended.set()
    server.start()
    log_rank0(f"a rollout server starts at {server.url}")
    ended.wait()
    if not asked.is_set():
        raise UserError(f"the rollout server at {server.url} {server.exit_reason()}")
    server.stop()


POLL_SECONDS = 0.5
REPORT_SECONDS = 15.0


def await_services(
    names: Sequence[str],
    folder: Path,
    logs: Path,
    *,
    key: str,
    minutes: float,
    report: Callable[[str], None],
    interval: float = REPORT_SECONDS,
) -> list[str]:
    """Their URLs, once all of them serve.

    folder: the job's, with NAME.url of each that was started, and NAME.lost of one that is not started again, which
    holds why. logs: folder of NAME.log. Raises UserError for a lost one, and after so many minutes.
    """
    started = reported = time.monotonic()
    served: dict[str, str] = {}
    while waiting := [name for name in names if name not in served]:
        for name in waiting:
            with suppress(FileNotFoundError):
                raise UserError((folder / f"{name}.lost").read_text().strip())
            if url := _serving(folder / f"{name}.url", key):
                served[name] = url
        now = time.monotonic()
        missing = [name for name in names if name not in served]
        if missing and now - started > 60 * minutes:
            raise UserError(f"{missing[0]} does not serve after {minutes:g} minutes: {_last_line(logs, missing[0])}")
        if missing and now - reported > interval:
            reported = now
            line = _last_line(logs, missing[0])
            report(f"{len(served)} of {len(names)} serve after {now - started:.0f} s; {missing[0]}: {line}")
        if missing:
            time.sleep(POLL_SECONDS)
    report(f"{', '.join(names)} serve{'s' * (len(names) == 1)} after {time.monotonic() - started:.0f} s")
    return [served[name] for name in names]


def _serving(url_file: Path, key: str) -> str | None:
    with suppress(FileNotFoundError, httpx.TransportError):
        url = url_file.read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        if url and httpx.get(f"{url}/ready", headers=headers, timeout=5.0, trust_env=False).status_code == 200:
            return url
    return None


def _last_line(logs: Path, name: str) -> str:
    with suppress(OSError):
        lines = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return said[-1][:160]
    return "it has written nothing yet"
