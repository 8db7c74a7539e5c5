"""Run the teachers and rollout servers of a job: stage models, serve, restart, wait until all of them answer."""

from __future__ import annotations

import fcntl
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import read_api_key, server_is_ready
from eaopd_megatron.serving.supervisor import RestartPolicy
from eaopd_megatron.slurm_job.allocate import staged_path
from eaopd_megatron.utils.files import atomic_directory, atomic_write
from eaopd_megatron.utils.log import log_rank0

_HEALTHY_SECONDS = 300  # after which a service's earlier deaths no longer count


def stage_models(stage: Path, models: Sequence[Path]) -> None:
    for model in models:
        stage_model(model, stage)


def stage_model(model: Path, stage: Path) -> Path:
    """Copy a model's folder to this node's disk unless a copy exists. Jobs on the same node wait for each other."""
    copy = staged_path(model, stage)
    try:
        stage.mkdir(parents=True, exist_ok=True)
        with (stage / f".{copy.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.exists():
                size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
                free = shutil.disk_usage(stage).free
                if size > free:
                    raise UserError(
                        f"EAOPD_STAGE: {stage} has {free / 2**30:.1f} GiB free, {model} takes {size / 2**30:.1f}"
                    )
                with atomic_directory(copy) as partial:
                    shutil.copytree(model, partial, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"EAOPD_STAGE: {model} could not be copied to {stage}: {error.strerror or error}") from None
    return copy


def serve_rollouts(recipe: str, overrides: Sequence[str], listen: str, key_file: Path, log: Path) -> None:
    """Run an SGLang server of the student at HOST:PORT until a signal. Raise UserError if it exits by itself."""
    from eaopd_megatron.checkpoint.hf_folder import HfFolder
    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.rollout.sglang.server import SGLangServer
    from eaopd_megatron.rollout.sglang.server_manager import rollout_server_settings

    loaded = load_recipe(recipe, overrides)
    host, _, port = listen.rpartition(":")
    student = HfFolder.open(loaded.student.model, "student.model")
    positions = student.max_positions
    longest = loaded.data.max_prompt_tokens + loaded.rollout.max_response_tokens
    if loaded.evaluation.benchmarks:  # the lengths of their problems are unknown here
        longest = positions
    settings = rollout_server_settings(
        loaded.servers, student, loaded.student.precision, longest, read_api_key(key_file)
    )
    # max_prompt_tokens may exceed the real prompts, and SGLang refuses more than the model has positions for
    context = min(settings.context_length, positions)
    server = SGLangServer(replace(settings, context_length=context, host=host), log)
    server.port = int(port)
    stop_requested, ended = threading.Event(), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stop_requested.set()
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.on_exit = lambda why: ended.set()
    server.start()
    log_rank0(f"starting a rollout server at {server.url}")
    ended.wait()
    if not stop_requested.is_set():
        raise UserError(f"the rollout server at {server.url} {server.exit_reason()}")
    server.stop()


def restart_service(name: str, folder: Path, log: Path, *, lived: float, max_deaths: int) -> bool:
    """Count the death of a service; return whether to restart it. Otherwise write why to NAME.lost."""
    policy = _count(folder / f"{name}.deaths", max_deaths - 1, reset=lived >= _HEALTHY_SECONDS)
    reason = f"{_last_line(log, folder / f'{name}.srun')} (log: {log})"
    if policy.exhausted:
        message = f"{name} died {policy.deaths} times in a row and is not started again: {reason}"
        atomic_write(folder / f"{name}.lost", message + "\n")
    else:
        message = f"{name} died and is started again: {reason}"
    print(f"[job] {message}", flush=True)
    return not policy.exhausted


def count_trainer_start(folder: Path, checkpoint: str, max_restarts: int) -> None:
    """Count a start, also of a requeued job. Raise UserError for one too many with the same newest checkpoint."""
    policy = _count(folder / "starts", max_restarts + 1, progress=checkpoint)
    if policy.exhausted:
        raise UserError(
            f"{policy.deaths - 1} starts without a new checkpoint (newest: {checkpoint}): not started again; see "
            f"{folder.parents[1] / 'logs'}"
        )


def _count(state: Path, max_restarts: int, *, progress: str = "", reset: bool = False) -> RestartPolicy:
    """Count one more in a file that outlives this process, from zero on `reset` or when `progress` has changed."""
    text = state.read_text() if state.exists() else f"0\n{progress}"
    count, *rest = text.split(maxsplit=1)  # a space instead of a newline in files of release 0.1
    previous = "".join(rest).strip()
    policy = RestartPolicy(max_restarts, deaths=int(count))
    if reset or previous != progress:
        policy.reset()
    policy.allows_restart()
    atomic_write(state, f"{policy.deaths}\n{progress}\n")
    return policy


def wait_for_services(
    names: Sequence[str],
    folder: Path,
    logs: Path,
    *,
    key: str,
    minutes: float,
    report: Callable[[str], None],
    interval: float = 15.0,
) -> list[str]:
    """Return the services' URLs once all answer. Raise UserError for a lost service and after `minutes`.

    folder: the job's, with NAME.url of each started service, and NAME.lost of one that will not be restarted.
    """
    started = reported = time.monotonic()
    urls: dict[str, str] = {}
    while True:
        for name in [name for name in names if name not in urls]:
            with suppress(FileNotFoundError):
                raise UserError((folder / f"{name}.lost").read_text().strip())
            if url := _ready_url(folder / f"{name}.url", key):
                urls[name] = url
        now = time.monotonic()
        missing = [name for name in names if name not in urls]
        if not missing:
            report(f"{', '.join(names)} ready after {now - started:.0f} s")
            return [urls[name] for name in names]
        last_line = _last_line(logs / f"{missing[0]}.log")
        if now - started > 60 * minutes:
            raise UserError(f"{missing[0]} is not ready after {minutes:g} minutes: {last_line}")
        if now - reported > interval:
            reported = now
            report(f"{len(urls)} of {len(names)} ready after {now - started:.0f} s; {missing[0]}: {last_line}")
        time.sleep(0.5)


def print_urls(folder: Path, logs: Path, key_file: Path, minutes: float, names: Sequence[str]) -> None:
    """Wait for the services and print their URLs as a list of the recipe."""

    def report(text: str) -> None:
        print(f"[job] {text}", file=sys.stderr, flush=True)

    urls = wait_for_services(names, folder, logs, key=read_api_key(key_file), minutes=minutes, report=report)
    print(f"[{','.join(urls)}]")


def _ready_url(url_file: Path, key: str) -> str | None:
    with suppress(FileNotFoundError):
        url = url_file.read_text().strip()
        if url and server_is_ready(url, key):
            return url
    return None


def _last_line(*files: Path) -> str:
    """The last line of the first file that has one."""
    for file in files:
        with suppress(OSError):
            lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").split("\n")]
            if lines := [line for line in lines if line]:
                return lines[-1][:200]
    return "it has written nothing"
