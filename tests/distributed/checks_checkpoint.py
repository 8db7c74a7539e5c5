"""Checks of test_checkpoint.py: what each of four ranks does."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint import store
from eaopd_megatron.checkpoint.dist_checkpoint import (
    StagedState,
    load_sharded,
    load_training_state,
    save_sharded,
    sharded_training_state,
)
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.store import CheckpointStore
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import build_model
from tests.distributed.trainer import LEARNING_RATES, Precision, Trainer, world


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def check_update(group: Any, folder: str, hf: str, ranks: int, tp: int, sp: bool) -> None:
    expected = json.loads((Path(hf) / "expected.json").read_text())["updates"]
    with world(folder, ranks, ParallelLayout(tp, sp)) as parallel:
        if parallel is None:
            return
        found = Trainer(hf, parallel).train(LEARNING_RATES[: len(expected)])
        for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            for mine, its in zip(ours, theirs, strict=True):
                assert abs(mine - its) <= 1e-5 * its, f"update {place}: (loss, norm) {ours}, transformers has {theirs}"


def check_gradient_that_is_not_finite(group: Any, folder: str, hf: str) -> None:
    with world(folder, 4, ParallelLayout(2, True)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        trainer.train(LEARNING_RATES[:1])
        before = trainer.values()
        # one data-parallel rank overflows; all must refuse
        _, norm = trainer.update(1e-3, scale=float("inf") if parallel.dp_rank == 1 else 1.0)
        assert not torch.isfinite(torch.tensor(norm)), norm
        _equal(before, trainer.values())


def check_resume(group: Any, folder: str, hf: str, ranks: int, tp: int, sp: bool, precision: Precision) -> None:
    with world(f"{folder}/whole", ranks, ParallelLayout(tp, sp)) as parallel:
        if parallel is not None:
            whole = Trainer(hf, parallel, precision)
            figures = whole.train(LEARNING_RATES)
            expected = whole.values()
            first = Trainer(hf, parallel, precision)
            first.train(LEARNING_RATES[:2])
            sharded = sharded_training_state(first.model, first.optimizer)
            CheckpointStore(Path(folder), 1).save(2, sharded, {"updates": 2}, None, parallel)
    with world(f"{folder}/again", ranks, ParallelLayout(tp, sp)) as parallel:
        if parallel is None:
            return
        second = Trainer(hf, parallel, precision)
        with torch.no_grad():
            for parameter in second.model.parameters():
                parameter.fill_(7.0)  # nothing may be left of what was there
        checkpoints = CheckpointStore(Path(folder), 1)
        path = checkpoints.latest()
        assert path is not None and checkpoints.load_state(path) == {"updates": 2}
        loaded = checkpoints.load_sharded(path, sharded_training_state(second.model, second.optimizer), parallel)
        load_training_state(second.model, second.optimizer, loaded)
        assert {group["lr"] for group in second.optimizer.param_groups} == {1.0}, "the checkpoint set the learning rate"
        assert second.train(LEARNING_RATES[2:]) == figures[2:]
        _equal(expected, second.values())


def check_recipe_wins(group: Any, folder: str, hf: str) -> None:
    """A resumed run has its recipe's weight decay, betas and eps; a save before the first update can be loaded."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        first = Trainer(hf, parallel)
        os.makedirs(f"{folder}/sharded", exist_ok=True)
        save_sharded(Path(folder) / "sharded", sharded_training_state(first.model, first.optimizer), parallel)
        second = Trainer(hf, parallel, weight_decay=0.3, beta2=0.95)
        loaded = load_sharded(
            Path(folder) / "sharded", sharded_training_state(second.model, second.optimizer), parallel
        )
        load_training_state(second.model, second.optimizer, loaded)
        groups_ = second.optimizer.param_groups
        assert {(group["weight_decay"], group["betas"]) for group in groups_} == {(0.3, (0.9, 0.95))}
        fresh = Trainer(hf, parallel, weight_decay=0.3, beta2=0.95)
        assert second.train(LEARNING_RATES[:2]) == fresh.train(LEARNING_RATES[:2])
        _equal(fresh.values(), second.values())


def check_disk_full(group: Any, folder: str, hf: str, rank: int, file: str, limit: int | None) -> None:
    """One rank cannot write one file: all ranks get the same line, and what was saved before stays."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 2)
        good = checkpoints.save(1, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
        message = ""
        with _failing_disk(parallel.rank == rank, file, limit):
            try:
                checkpoints.save(2, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
            except UserError as error:
                message = str(error)
        failed = checkpoints.folder / "step_000002"
        end = f"the last good checkpoint is {good}"
        if limit is None:
            assert message == f"disk full while saving {failed}; {end}", message
        else:
            assert message.startswith(f"cannot save {failed}: ") and message.endswith(f"; {end}"), message
            assert "File too large" in message, message
        dist.barrier()
        assert os.listdir(checkpoints.folder) == ["step_000001"], os.listdir(checkpoints.folder)
        checkpoints.verify(good)
        assert (
            checkpoints.save(2, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel) == failed
        )
        checkpoints.verify(failed)


@contextlib.contextmanager
def _failing_disk(here: bool, file: str, limit: int | None) -> Iterator[None]:
    """On one rank: `file` is a full device, or no file may grow beyond `limit` bytes (a write that fails half way)."""
    write, soft = store.write_staged, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(folder: Path, staged: StagedState, parallel: ParallelState, group: Any = None) -> None:
        if here and limit is None:
            (folder / file).symlink_to("/dev/full")
        elif here and limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
        dist.barrier()
        write(folder, staged, parallel, group)

    store.write_staged = on_a_full_disk
    try:
        yield
    finally:
        store.write_staged = write
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)


def check_background_save(group: Any, folder: str, hf: str) -> None:
    """What is written is the state at the save, though training changes every tensor and uses its groups meanwhile."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        overlapped: dict[str, Any] = {"distributed": True, "overlap": True, "bucket_size": 3000}
        trainer = Trainer(hf, parallel, **overlapped)
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 2, background=True)
        trainer.train(LEARNING_RATES[:1])
        saved, go = trainer.whole(), threading.Event()
        write = store.write_staged

        def late(*arguments: Any) -> None:
            assert go.wait(30)
            write(*arguments)

        store.write_staged = late  # type: ignore[assignment]
        path = checkpoints.save(1, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
        figures = trainer.train(LEARNING_RATES[1:2])
        assert checkpoints.latest() is None, "seen before it is complete"
        go.set()
        figures += trainer.train(LEARNING_RATES[2:])
        checkpoints.wait()
        store.write_staged = write
        assert checkpoints.latest_valid(parallel) == path
        second = Trainer(hf, parallel, **overlapped)
        second.train(LEARNING_RATES[:1])
        wanted = sharded_training_state(second.model, second.optimizer)
        load_training_state(second.model, second.optimizer, checkpoints.load_sharded(path, wanted, parallel))
        _equal(saved, second.whole())
        assert second.train(LEARNING_RATES[1:]) == figures
        _equal(trainer.whole(), second.whole())


def check_reused_host_buffers(group: Any, folder: str, hf: str, options: dict[str, Any]) -> None:
    """The second background save writes the current state from the buffers that the first one allocated."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel, **options)
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 2, background=True)
        trainer.train(LEARNING_RATES[:1])
        checkpoints.save(1, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
        buffers = _host_buffers(checkpoints)
        trainer.train(LEARNING_RATES[1:2])
        saved = trainer.whole()
        path = checkpoints.save(2, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
        assert _host_buffers(checkpoints) == buffers and (buffers or parallel.dp_rank)
        trainer.train(LEARNING_RATES[2:])  # changes the weights while the thread writes
        checkpoints.wait()
        second = Trainer(hf, parallel, **options)
        wanted = sharded_training_state(second.model, second.optimizer)
        load_training_state(second.model, second.optimizer, checkpoints.load_sharded(path, wanted, parallel))
        _equal(saved, second.whole())


def _host_buffers(checkpoints: CheckpointStore) -> list[int]:
    """Addresses of the staged tensors that are about to be written."""
    assert checkpoints._stager is not None and checkpoints._stager.state_dict_cache is not None
    return [tensor.data_ptr() for tensor in checkpoints._stager.state_dict_cache.values()]


def check_background_save_on_a_full_disk(group: Any, folder: str, hf: str) -> None:
    """The thread's error on one rank is every rank's, at the next save, and training's groups are as they were."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 2, background=True)

        def save(step: int) -> Path:
            return checkpoints.save(step, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)

        good = save(1)
        checkpoints.wait()
        with _failing_disk(parallel.rank == 1, "__1_0.distcp", None):
            failed = save(2)
            _end_thread()
        _raises(UserError, f"disk full while saving {failed}; the last good checkpoint is {good}", lambda: save(3))
        dist.barrier()
        assert os.listdir(checkpoints.folder) == ["step_000001"]
        save(3)
        checkpoints.wait()
        assert checkpoints.latest_valid(parallel) == checkpoints.folder / "step_000003"


def _end_thread() -> None:
    """Let the thread end, without the error that it may have met."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def check_killed_before_the_rename(group: Any, folder: str, hf: str) -> None:
    """The main rank dies when everything is written but not yet visible."""

    def die(path: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 1)
        checkpoints.save(1, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
        if parallel.is_main:
            Path.rename = die  # type: ignore[method-assign, assignment]
        checkpoints.save(2, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)


def check_error_of_one_rank(group: Any, folder: str, hf: str) -> None:
    """Megatron-Core finds a lost shard on the first rank only: all ranks stop, and it does not pass as a full disk."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        state = sharded_training_state(trainer.model)
        if parallel.rank == 1:
            del state["model"]["0"]["model.embedding.word_embeddings.weight"]
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 2)
        _raises(RuntimeError, "Invalid access pattern", lambda: checkpoints.save(1, state, {}, None, parallel))
        dist.barrier()
        assert not checkpoints.folder.exists()


def check_damaged_checkpoint(group: Any, folder: str, hf: str) -> None:
    """All ranks refuse a checkpoint with one changed byte, and name the file."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        checkpoints = CheckpointStore(Path(folder) / "checkpoints", 2)
        path = checkpoints.save(1, sharded_training_state(trainer.model), {}, None, parallel)
        damaged = path / "sharded" / "__1_0.distcp"
        if parallel.is_main:
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content)
        expected = f"damaged checkpoint: {damaged} has other contents"
        _raises(UserError, expected, lambda: checkpoints.latest_valid(parallel))
        _raises(UserError, expected, lambda: checkpoints.latest_valid(parallel, fall_back=True))  # to none
        later = checkpoints.save(2, sharded_training_state(trainer.model), {}, None, parallel)
        dist.barrier()
        if parallel.is_main:
            (later / "sharded" / "common.pt").unlink()
        said: list[str] = []
        _raises(UserError, "common.pt is missing", lambda: checkpoints.latest_valid(parallel))
        _raises(UserError, expected, lambda: checkpoints.latest_valid(parallel, fall_back=True, log=said.append))
        assert len(said) == 1 and said[0].startswith(f"damaged checkpoint: {later}/sharded/common.pt is missing"), said
        assert said[0].endswith(f"it is now step_000002.damaged: falling back to {path}"), said
        assert sorted(os.listdir(checkpoints.folder)) == ["step_000001", "step_000002.damaged"]


def check_tensors_that_do_not_fit(group: Any, folder: str, hf: str) -> None:
    """A missing tensor and another shape are told in one line on every rank."""
    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        path = Path(folder) / "sharded"
        os.makedirs(path, exist_ok=True)
        save_sharded(path, sharded_training_state(trainer.model), parallel)
        wanted = sharded_training_state(trainer.model, trainer.optimizer)
        _raises(UserError, "optimizer.state.exp_avg.model.", lambda: load_sharded(path, wanted, parallel))
        other = HfFolder.open(hf, "student.model").config
        other.intermediate_size *= 2
        larger = sharded_training_state(build_model(other, parallel.layout, torch.float32))
        _raises(UserError, "linear_fc1.weight", lambda: load_sharded(path, larger, parallel))
        _raises(UserError, "metadata.json is missing", lambda: load_sharded(path.parent, wanted, parallel))


def check_no_process_is_started(group: Any, folder: str, hf: str) -> None:
    """A save by this process alone: nothing can outlive `kill -9` or deadlock on a process that did not start."""

    def refuse(process: Any) -> None:
        raise AssertionError(f"{process} would be started")

    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        start, BaseProcess.start = BaseProcess.start, refuse  # type: ignore[method-assign, assignment]
        try:
            state = sharded_training_state(trainer.model, trainer.optimizer)
            CheckpointStore(Path(folder), 1).save(1, state, {}, None, parallel)
        finally:
            BaseProcess.start = start  # type: ignore[method-assign]
        children = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
        assert not any(children), children


def check_writer_and_reader_agree(group: Any, folder: str, hf: str) -> None:
    """torch's writer and Megatron-Core's planner still meet: its reader finds every tensor, each is stored once."""
    from megatron.core import dist_checkpointing

    with world(folder, 4, ParallelLayout(2)) as parallel:
        assert parallel is not None
        trainer = Trainer(hf, parallel)
        path = Path(folder) / "sharded"
        os.makedirs(path, exist_ok=True)
        save_sharded(path, sharded_training_state(trainer.model, trainer.optimizer), parallel)
        assert dist_checkpointing.check_is_distributed_checkpoint(str(path))
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        numbers: dict[str, int] = {}
        for name, tensor in stored.items():
            kind = name.partition("model.")[0]
            numbers[kind] = numbers.get(kind, 0) + math.prod(tensor.global_shape)
        parameters = json.loads((Path(hf) / "expected.json").read_text())["parameters"]
        assert numbers == dict.fromkeys(("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."), parameters)
        size = sum(file.stat().st_size for file in path.glob("*.distcp"))
        assert 12 * parameters < size < 20 * parameters, "a tensor is stored more than once"
        assert {file.name for file in path.iterdir()} >= {".metadata", "metadata.json", "common.pt"}


def _raises(kind: type[Exception], text: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except kind as error:
        assert text in str(error), str(error)
        assert kind is not UserError or "\n" not in str(error), str(error)
        return
    raise AssertionError(f"no {kind.__name__} with {text!r}")
