"""Check memory that is freed and taken back: the trainer's states, offloaded moments, a frozen teacher, checkpoints.

python tools/gpu_check/memory.py MODELS       MODELS: the folder of make_models.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import response_logits
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.megatron.offload import FrozenWeights, TrainerMemory
from eaopd_megatron.megatron.optimizer import build_optimizer, finalize_gradients, optimizer_step, wrap_ddp
from eaopd_megatron.megatron.pipeline import run_forward_backward, single_batch
from eaopd_megatron.rollout.weight_sync.transport import pack_buckets
from tools.gpu_check.findings import record

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


class Trainer:
    """A student with its optimizer, which makes updates of an arbitrary loss on fixed tokens."""

    def __init__(self, source: HfFolder, parallel: ParallelState, **settings: Any) -> None:
        """settings: those of OptimizerConfig that differ from its defaults."""
        options = OptimizerConfig(lr=1e-4, **settings)
        self.model = build_model(source.config, parallel.layout, torch.bfloat16)
        load_hf(self.model, source, parallel)
        self.ddp = wrap_ddp(self.model, distributed=options.distributed)
        self.optimizer = build_optimizer(self.ddp, options)
        generator = torch.Generator().manual_seed(0)
        self.batch = single_batch(torch.randint(0, source.vocab_size, (2, 128), generator=generator), parallel)

    def update(self) -> float:
        """Return the gradient norm."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(index: int, hidden: torch.Tensor) -> torch.Tensor:
            return response_logits(self.model, hidden).float().logsumexp(-1).sum()

        run_forward_backward(self.ddp, [self.batch], loss)
        finalize_gradients(self.ddp, torch.tensor(256))
        return optimizer_step(self.optimizer)[1]

    def weights(self) -> torch.Tensor:
        return checksums(self.model)


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
    trainer = Trainer(source, parallel)
    record("gradient norms", [trainer.update() for _ in range(3)])
    record("GiB after three updates", gib())
    plain = trainer.weights()
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
        resumed = Trainer(source, parallel)
        state = sharded_training_state(resumed.model, resumed.optimizer)
        load_training_state(resumed.model, resumed.optimizer, load_sharded(Path(folder), state, parallel))
    norms = trainer.update(), resumed.update()
    same = norms[0] == norms[1] and torch.equal(trainer.weights(), resumed.weights())
    record("a resumed trainer makes the same update bit for bit", list(norms), same)
    return plain


def check_variant(
    name: str, arguments: dict[str, Any], source: HfFolder, parallel: ParallelState, plain: torch.Tensor, *, lend: bool
) -> None:
    """Check that three updates give the weights `plain`, with memory freed between them if `lend`."""
    trainer = Trainer(source, parallel, **arguments)
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
    weights = trainer.weights()
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
        with timed("onloading them"):
            context = frozen.onload()
            context.__enter__()
        record("the teacher's weights are unchanged", True, torch.equal(checksums(teacher), expected))
        context.__exit__(None, None, None)
    record("GiB with the teacher's weights and without", [before, during])


if __name__ == "__main__":
    main()
