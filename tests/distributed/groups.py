"""Megatron's groups for the length of a check."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed import parallel_state as groups
from eaopd_megatron.distributed.parallel_state import ParallelState


@contextlib.contextmanager
def model_parallel(layout: ParallelLayout) -> Iterator[ParallelState]:
    """Megatron's groups at a layout over the ranks that are there.

    A rank that ended its groups while another one still connects to them, or reads from them, would leave that one
    waiting for ever: all end them together.
    """
    try:
        yield groups.initialize_model_parallel(layout)
        dist.barrier()
    finally:
        groups.destroy_model_parallel()
