"""Check memory that is freed and taken back: the trainer's states, offloaded moments, a frozen teacher, checkpoints.

python tools/gpu_check/memory.py MODELS       MODELS: the folder of make_models.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from eaopd_megatron.checkpoint.convert import single_process_group
from eaopd_megatron.checkpoint.dist_checkpoint import (
    load_sharded,
    load_training_state,
    save_sharded,
    sharded_training_state,
    stage_sharded,
)
from eaopd_megatron.checkpoint.hf_export import gather_hf_tensors
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.megatron.offload import FrozenWeights, TrainerMemory
from eaopd_megatron.rollout.weight_sync.transport import pack_buckets
from tools.gpu_check.findings import record
from tools.gpu_check.fixed_trainer import FixedTrainer

CUDA = torch.cuda.is_available()
BUCKET_BYTES = 512 << 20


def gib() -> dict[str, float]:
    """GPU memory in GiB: of tensors, of torch's allocator, of all processes."""
    if not CUDA:
        return {}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    numbers = {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "used": total - free,
    }
    return {name: round(number / 2**30, 2) for name, number in numbers.items()}


@contextmanager
def timed(name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    if CUDA:
        torch.cuda.synchronize()
    record(f"seconds: {name}", round(time.monotonic() - started, 2))


def checksums(model: ModelChunks) -> torch.Tensor:
    """Return the fp64 sum of each parameter."""
    return torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])


def main() -> None:
    source = HfFolder.open(f"{sys.argv[1]}/student", "student.model")
    with single_process_group() as parallel:
        plain = check_updates(source, parallel)
        check_variant("moments on the host", {"offload": "moments"}, source, parallel, plain, lend=False)
        check_variant("distributed optimizer, lent", {"distributed": True}, source, parallel, plain, lend=True)
        check_variant("lent", {}, source, parallel, plain, lend=True)
        check_frozen(HfFolder.open(f"{sys.argv[1]}/teacher", "teacher.model"), parallel)
        sys.stdout.flush()
        os._exit(0)


def check_updates(source: HfFolder, parallel: ParallelState) -> torch.Tensor:
    """Return the weights after three updates. Checks that a resumed trainer makes the fourth update bit for bit."""
    trainer = FixedTrainer.load(source, parallel)
    record("gradient norms", [trainer.update() for _ in range(3)])
    record("GiB after three updates", gib())
    plain = checksums(trainer.model)
    with timed("gathering the weights into buckets on the device"):
        tensors = gather_hf_tensors(dict(trainer.model.global_parameters()), source, parallel, on_device=True)
        count = sum(1 for _ in pack_buckets(tensors, BUCKET_BYTES))
    record("buckets", count)
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    for which in ("first", "second"):
        with timed(f"{which} copy of a checkpoint to host memory"):
            stage_sharded(sharded_training_state(trainer.model, trainer.optimizer), parallel, stager)
    with tempfile.TemporaryDirectory() as folder:
        with timed("writing a checkpoint"):
            save_sharded(Path(folder), sharded_training_state(trainer.model, trainer.optimizer), parallel)
        resumed = FixedTrainer.load(source, parallel)
        state = sharded_training_state(resumed.model, resumed.optimizer)
        load_training_state(resumed.model, resumed.optimizer, load_sharded(Path(folder), state, parallel))
    norms = trainer.update(), resumed.update()
    same = norms[0] == norms[1] and torch.equal(checksums(trainer.model), checksums(resumed.model))
    record("a resumed trainer makes the same update bit for bit", list(norms), same)
    return plain


def check_variant(
    name: str, arguments: dict[str, Any], source: HfFolder, parallel: ParallelState, plain: torch.Tensor, *, lend: bool
) -> None:
    """Check that three updates give the weights `plain`, with memory freed between them if `lend`."""
    trainer = FixedTrainer.load(source, parallel, **arguments)
    memory = TrainerMemory(trainer.ddp, trainer.optimizer)
    for turn in range(3):
        trainer.update()
        if lend:
            before = gib()
            with timed(f"{name}: offload {turn}"):
                memory.offload()
            during = gib()
            with timed(f"{name}: onload {turn}"):
                memory.onload()
            if turn == 2:
                record(f"{name}: GiB before, while and after", [before, during, gib()])
    weights = checksums(trainer.model)
    difference = float((weights - plain).abs().max())
    record(f"{name}: the same weights bit for bit (largest difference of a sum)", difference, difference == 0)


def check_frozen(source: HfFolder, parallel: ParallelState) -> None:
    teacher = build_model(source.config, parallel.layout, torch.bfloat16)
    load_hf(teacher, source, parallel)
    teacher.eval().requires_grad_(False)
    expected, before = checksums(teacher), gib()
    with timed("offloading a teacher's weights"):
        frozen = FrozenWeights(teacher)
    during = gib()
    for _ in range(2):
        with ExitStack() as stack:
            with timed("onloading them"):
                stack.enter_context(frozen.onload())
            record("the teacher's weights are unchanged", True, torch.equal(checksums(teacher), expected))
    record("GiB with the teacher's weights and without", [before, during])


if __name__ == "__main__":
    main()
